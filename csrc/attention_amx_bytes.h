// Attention of bf16 queries over int8 keys and values on AMX, in integers (attention_bytes_law.h): what few and many rows have in common.
#pragma once
#include "attention_amx_block.h"
#include "attention_bytes_law.h"

#if defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace tiles {

// Bytes between rows of codes as tiles load them: whole 64s of codes may lie where they are, others are filled up in scratch.
inline int64_t codes_apart(const RowLayout& at) { return at.dim % kCodeK == 0 ? at.bytes : round_up(at.dim, kCodeK); }

// Where sixteen rows of codes may be loaded from: where they lie, if that is one behind the other, or `scratch`.
inline const char* place_codes(const char* const* rows, const RowLayout& at, char* scratch) {
  int64_t elsewhere = at.dim % kCodeK;
  for (int i = 1; i < 16; ++i) elsewhere |= rows[i] - rows[i - 1] - at.bytes;
  if (elsewhere == 0) return rows[0];
  for (int i = 0; i < 16; ++i)
    for (int d = 0; d < at.dim; d += kCodeK)
      store((float*)(scratch + i * codes_apart(at) + d), floats(load_bytes_n(rows[i] + d, at.dim - d < kCodeK ? at.dim - d : kCodeK)));
  return scratch;
}

// Zeros for the keys of the tile that no row sees, so that all of it can be multiplied.
inline void fill_up(Rows& rows, const char* zeros) {
  for (int j = 0; j < rows.lo; ++j) rows.k[j] = rows.v[j] = zeros;
  for (int j = rows.hi; j < kTile; ++j) rows.k[j] = rows.v[j] = zeros;
}

// Sixteen rows of `steps` times 64 bytes as columns of tiles, [step][16 fours of bytes][16 columns].
inline void columns_of_bytes(const char* rows, int steps, char* to) {
  for (int s = 0; s < steps; ++s) {
    F32x16 x[16];
    for (int r = 0; r < 16; ++r) x[r] = load((const float*)(rows + (r * steps + s) * kCodeK));
    transpose16(x);
    for (int i = 0; i < 16; ++i, to += 64) store((float*)to, x[i]);
  }
}

}  // namespace tiles
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
