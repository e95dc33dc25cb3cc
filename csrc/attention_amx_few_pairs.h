// Up to sixteen query rows against bf16 keys and values.
//
//   scores [key, row]  =  K [16 keys, 32 d]  x  Q [16 pairs of d, 16 rows]           K where it lies, as in attention_amx_group.h
//   turned [row, key]
//   out    [row, d]   +=  P [16 rows, 32 keys]  x  V [16 pairs of keys, 16 d]        V zipped, two keys' rows at a time: a fifth of transposing it
//
// Zipping goes by quarters of a register, so of 32 dimensions the first tile has 0-3, 8-11, 16-19, 24-27 and the second has those between. Outputs
// stay in that order until they are written.
#pragma once
#include "attention_amx_few.h"

#if defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace tiles {

constexpr int kZipped = kSteps * 2 * kTileFloats;  // floats of a tile's values, 32 dimensions of them

// The next tile's rows, whose lines are asked for while this one is computed: of keys and of values, of two sixteens each, in turn. A CPU goes on by
// itself where it sees memory read in order; with four such places in turn it gets ahead of what is asked for, with one it does not (docs/speed.md).
struct RowsAhead {
  const Rows* rows;  // null once all is asked for
  int64_t bytes;     // of a row
  int row = 0;
  int64_t at = 0;
};
QUIRE_INLINE void ask(RowsAhead& a) {
  if (!a.rows) return;
  const char *const *const k = a.rows->k + a.row, *const *const v = a.rows->v + a.row;
  prefetch_l2(k[0] + a.at);
  prefetch_l2(v[0] + a.at);
  prefetch_l2(k[16] + a.at);
  prefetch_l2(v[16] + a.at);
  a.at += kLine;
  if (a.at < a.bytes) return;
  a.at = 0;
  if (++a.row % 16 != 0) return;
  a.row += 16;
  if (a.row == kTile) a.rows = nullptr;
}

// [keys][kLanes] of a tile's steps, to a row of kTile for each query row.
inline void turn_scores(Few& f, Span span) {
  for (int r = 0; r < f.item.rows(); r += 4) {
    for (int key = span.first * kTileK; key < span.end * kTileK; key += 16) {
      F32x16 x[4];
      turn_four(f.s.scores + key * kLanes + r, x);
      for (int i = 0; i < 4; ++i) store(f.row(r + i) + key, x[i]);
    }
  }
}

QUIRE_INLINE uint16_t* probabilities_of(Few& f, int r) { return (uint16_t*)f.s.pairs + r * kTile; }

// Scores to probabilities, rounded and summed up.
inline void round_rows(Few& f, Span span, F32x16 minus_base) {
  const F32x16 factor = set1(f.factor == 0.0f ? 1.0f : f.factor);
  alignas(64) float added[kLanes];
  store(added, minus_base);
  for (int r = 0; r < f.item.rows(); ++r) {
    F32x16 sum = load(f.sums(r));
    for (int key = span.first * kTileK; key < span.end * kTileK; key += 16) {
      const F32x16 p = exp2_of<true>(load(f.row(r) + key), factor, set1(added[r]));
      sum = add(sum, p);
      _mm256_storeu_si256((__m256i*)(probabilities_of(f, r) + key), _mm512_cvtepi32_epi16(shr<16>(bits(p)).v));
    }
    store(f.sums(r), sum);
  }
}

// Values d..d+31 of 32 keys, two keys together in a pair.
QUIRE_INLINE void zip_values(const char* const* from, int d, int v_dim, uint32_t* to, RowsAhead& ahead) {
  for (int i = 0; i < 16; ++i) {
    ask(ahead);
    const U32x16 even = bits(pairs_of_row(from[2 * i], d, v_dim)), odd = bits(pairs_of_row(from[2 * i + 1], d, v_dim));
    store_u32(to + i * 16, zip_low(even, odd));
    store_u32(to + kTileFloats + i * 16, zip_high(even, odd));
  }
}

// Adds 32 dimensions of a tile's values to `out`, in tiles C and C + 1.
template <int C>
void output_rows(const uint32_t* zipped, Span span, float* out, int64_t row_bytes, bool fresh) {
  if (fresh) {
    tile_zero<C>();
    tile_zero<C + 1>();
  } else {
    tile_load<C>(out, row_bytes);
    tile_load<C + 1>(out + 16, row_bytes);
  }
  if (span.first == 0) {
    tile_load<6>(zipped, 64);
    tile_dot<C, 4, 6>();
    tile_load<7>(zipped + kTileFloats, 64);
    tile_dot<C + 1, 4, 7>();
  }
  if (span.end == 2) {
    tile_load<6>(zipped + 2 * kTileFloats, 64);
    tile_dot<C, 5, 6>();
    tile_load<7>(zipped + 3 * kTileFloats, 64);
    tile_dot<C + 1, 5, 7>();
  }
  tile_store<C>(out, row_bytes);
  tile_store<C + 1>(out + 16, row_bytes);
}

// Adds a tile's values to `out` [rows][v_dims]. 32 dimensions are multiplied while the next are zipped.
inline void add_values(Few& f, const char* const* values, Span span, float* out, RowsAhead& ahead) {
  const int v_dim = f.item.args.layout.v.dim;
  const int64_t row_bytes = f.v_dims * 4;
  if (span.first == 0) tile_load<4>(probabilities_of(f, 0), kTile * 2);
  if (span.end == 2) tile_load<5>(probabilities_of(f, 0) + kTileK, kTile * 2);
  for (int d = 0; d <= f.v_dims; d += 32) {
    uint32_t* const zipped = (uint32_t*)f.s.values;
    for (int step = span.first; d < f.v_dims && step < span.end; ++step)
      zip_values(values + step * kTileK, d, v_dim, zipped + d / 32 % 2 * kZipped + step * 2 * kTileFloats, ahead);
    if (d == 0) continue;
    const int before = d - 32;
    if (before / 32 % 2 == 0)
      output_rows<0>(zipped, span, out + before, row_bytes, f.part.fresh);
    else
      output_rows<2>(zipped + kZipped, span, out + before, row_bytes, f.part.fresh);
  }
}

// Where tokens see different keys of the tile, values may be among those hidden that are not finite: for each token the others are zeros.
inline void add_apart(Few& f, const Rows& rows, Span span) {
  RowsAhead nothing{};
  const int64_t token_floats = int64_t(f.item.heads) * f.v_dims, size = f.item.num_tokens * token_floats;
  float* const collected = f.s.out + kLanes * f.v_dims;
  for (int token = 0; token < f.item.num_tokens; ++token) {
    Rows own = rows;
    hide_values(own, seen_by(f.item, token, rows.base), (const char*)f.s.zeros);
    if (!f.part.fresh) memcpy(f.s.apart, f.s.out, size_t(size) * 4);
    add_values(f, own.v, span, f.s.apart, nothing);
    memcpy(collected + token * token_floats, f.s.apart + token * token_floats, size_t(token_floats) * 4);
  }
  memcpy(f.s.out, collected, size_t(size) * 4);
}

// From the order that zipping leaves to that of elements, and back.
inline void unzip_outputs(const float* from, int dims, float* to) {
  for (int d = 0; d < dims; d += 32)
    for (int i = 0; i < 8; ++i) memcpy(to + d + 4 * i, from + d + i % 2 * 16 + i / 2 * 4, 16);
}

inline void zip_outputs(const float* from, int dims, float* to) {
  for (int d = 0; d < dims; d += 32)
    for (int i = 0; i < 8; ++i) memcpy(to + d + i % 2 * 16 + i / 2 * 4, from + d + 4 * i, 16);
}

inline void run_pairs_tile(Few& f, int64_t base) {
  Item& item = f.item;
  const PageLayout& at = item.args.layout;
  const char* const zeros = (const char*)f.s.zeros;
  const Rows* const found = tile_at(item, base, zeros);
  if (!found) return;
  const Rows& rows = *found;
  RowsAhead ahead{};
  if (Rows* const next = tile_met(item, base + kTile, f.end, f.coming, zeros)) {
    for (int j = 0; j < kTile; ++j)
      if (j < next->lo || j >= next->hi) next->k[j] = next->v[j] = zeros;
    ahead = {next, at.k.bytes > at.v.bytes ? at.k.bytes : at.v.bytes};
  }
  const Span span{rows.lo / kTileK, (rows.hi + kTileK - 1) / kTileK};
  const char* keys[kTile / 16];
  place_keys(rows, at.k.dim, f.k_steps, (char*)f.s.keys, keys);
  score_one(f.k_steps, keys, span, (const char*)f.s.queries, f.s.scores, [&] { ask(ahead); });
  turn_scores(f, span);
  round_rows(f, span, settle_rows(f, span, base));
  const Seen first = seen_by(item, 0, base), last = seen_by(item, item.num_tokens - 1, base);
  if (first.lo == last.lo && first.hi == last.hi)
    add_values(f, rows.v, span, f.s.out, ahead);
  else
    add_apart(f, rows, span);
  f.part.fresh = false;
}

}  // namespace tiles
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
