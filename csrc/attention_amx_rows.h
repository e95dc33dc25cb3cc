// What tiles multiply, brought into their form: queries, keys, values; and results brought back into rows.
#pragma once
#include "attention_amx_group.h"

#if defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace tiles {

QUIRE_INLINE F32x16 pairs_of_row(const char* row, int d, int dim) {
  const int n = dim - d;
  return floats(n >= kTileK ? load_pairs((const uint16_t*)row + d) : load_pairs_n((const uint16_t*)row + d, n));
}

// Queries as [groups][k_steps][16 pairs of d][16 rows]; rows and dimensions that do not exist are zero.
inline void load_queries(const Item& item, int k_steps, uint32_t* to) {
  for (int r0 = 0; r0 < item.rows(); r0 += kLanes) {
    const int rows = item.rows() - r0 < kLanes ? item.rows() - r0 : kLanes;
    const char* from[kLanes];
    for (int r = 0; r < rows; ++r) from[r] = item.query(r0 + r);
    for (int r = r0 + kLanes; r < item.rows() && r < r0 + 2 * kLanes; ++r)  // rows lie anywhere: the next group's are asked for in time
      for (int s = 0; s < k_steps; ++s) prefetch(item.query(r) + s * 64);
    for (int s = 0; s < k_steps; ++s) {
      F32x16 x[kLanes];
      for (int r = 0; r < kLanes; ++r) x[r] = r < rows ? pairs_of_row(from[r], s * kTileK, item.args.layout.k.dim) : zero();
      transpose16(x);
      for (int i = 0; i < 16; ++i, to += kLanes) store((float*)to, x[i]);
    }
  }
}

// Where a tile's keys may be loaded from, sixteen by sixteen, as Operands has them: where they lie, if they are sixteen rows of whole steps one
// behind the other, or `scratch` [kTile][k_steps][64 bytes]. Rows a page of memory apart would all want the same few places in the first cache.
inline void place_keys(const Rows& rows, int k_dim, int k_steps, char* scratch, const char** keys) {
  const int64_t row_bytes = k_steps * 64;
  for (int key = rows.lo & ~(kTileK - 1); key < round_up(rows.hi, kTileK); key += 16) {
    const char* const* from = rows.k + key;
    int64_t apart = k_dim % kTileK;
    for (int i = 1; i < 16; ++i) apart |= from[i] - from[i - 1] - row_bytes;
    if (apart == 0) {
      keys[key / 16] = from[0];
      continue;
    }
    char* to = scratch + key * row_bytes;
    keys[key / 16] = to;
    for (int i = 0; i < 16; ++i)
      for (int s = 0; s < k_steps; ++s, to += 64) store((float*)to, pairs_of_row(from[i], s * kTileK, k_dim));
  }
}

// 32 keys' values d..d+31, transposed: half 0 gives dimensions 8 i .. 8 i + 3, half 1 those between them. Adds to `most` the largest magnitudes.
template <int kHalf>
QUIRE_INLINE void transpose_values(const char* const* from, int d, int v_dim, U32x16& most, uint32_t* to) {
  F32x16 x[16];
  for (int i = 0; i < 16; ++i) {
    const U32x16 even = bits(pairs_of_row(from[2 * i], d, v_dim)), odd = bits(pairs_of_row(from[2 * i + 1], d, v_dim));
    x[i] = floats(kHalf ? zip_high(even, odd) : zip_low(even, odd));
    if constexpr (kHalf == 0) most = max_u16(most, max_u16(and_(even, set1_u32(0x7fff7fffu)), and_(odd, set1_u32(0x7fff7fffu))));
  }
  transpose16(x);
  for (int i = 0; i < 16; ++i) {
    const int at = i / 4 * 8 + i % 4 + 4 * kHalf;
    store((float*)to + at / 16 * kPartSteps * kTileFloats + at % 16 * 16, x[i]);
  }
}

// A tile's values as Operands has them, and zeros for keys that do not exist; `values` are those of its first step. False if one is not finite.
inline bool place_values(const Rows& rows, int v_dim, int v_tiles, uint32_t* values) {
  U32x16 most = set1_u32(0);
  for (int step = rows.lo / kTileK; step * kTileK < rows.hi; ++step) {
    const char* const* from = rows.v + step * kTileK;
    for (int tile = 0; tile < v_tiles; tile += 2) {
      uint32_t* to = values + (tile * kPartSteps + step) * kTileFloats;
      transpose_values<0>(from, 16 * tile, v_dim, most, to);
      transpose_values<1>(from, 16 * tile, v_dim, most, to);
    }
  }
  return !any_above_u16(most, 0x7f7f);
}

// Zeros in the place of values that a token does not see.
inline void hide_values(Rows& rows, Seen seen, const char* zeros) {
  for (int j = rows.lo; j < rows.hi; ++j)
    if (j < seen.lo || j >= seen.hi) rows.v[j] = zeros;
}

// A group's states, from lanes to rows.
inline void save_group(const Item& item, int first_row, const float* base, const float* sums, const float* out, int v_tiles, float* states) {
  const int v_dim = item.args.layout.v.dim, rows = item.rows() - first_row < kLanes ? item.rows() - first_row : kLanes;
  const int64_t stride = state_floats(v_dim);
  states += first_row * stride;
  const auto turn = [&](const float* from, float* to) {
    F32x16 x[16];
    for (int i = 0; i < 16; ++i) x[i] = load(from + i * kLanes);
    transpose16(x);
    for (int r = 0; r < rows; ++r) store(to + r * stride, x[r]);
  };
  for (int d = 0; d < 16 * v_tiles; d += 16) turn(out + d * kLanes, states + d);
  turn(sums, states + state_sums(v_dim));
  for (int r = 0; r < rows; ++r) states[r * stride + state_base(v_dim)] = base[r];
}

// Rows first_row.. of the item: totals divided by their sums.
inline void write_group(const Item& item, int first_row, const Sums& total, const float* out) {
  const int v_dim = item.args.layout.v.dim, rows = item.rows() - first_row < kLanes ? item.rows() - first_row : kLanes;
  const F32x16 share = div(set1(1.0f), load(total.sum));
  uint16_t* to[kLanes];
  for (int r = 0; r < rows; ++r) to[r] = (uint16_t*)item.args.out + item.out(first_row + r);
  for (int r = first_row + kLanes; r < item.rows() && r < first_row + 2 * kLanes; ++r)
    for (int d = 0; d < v_dim; d += 32) __builtin_prefetch((uint16_t*)item.args.out + item.out(r) + d, 1, 3);
  for (int d = 0; d < v_dim; d += 32) {
    F32x16 x[16];
    for (int i = 0; i < 16; ++i) {
      const float* from = out + (d + 2 * i) * kLanes;
      // -0 to +0: a tile multiplication that adds nothing makes that of it too.
      x[i] = floats(make_pairs(add(mul(load(from), share), zero()), add(mul(load(from + kLanes), share), zero())));
    }
    transpose16(x);
    for (int r = 0; r < rows; ++r) store_pairs_n(to[r] + d, bits(x[r]), v_dim - d < 32 ? v_dim - d : 32);
  }
}

}  // namespace tiles
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
