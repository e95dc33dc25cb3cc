// Sixteen query rows against one tile of keys: scores, probabilities, output, by tiles of AMX (tiles_amx.h).
//
//   scores [key, row]  =  K [16 keys, 32 d]  x  Q [16 pairs of d, 16 rows]     K where it lies in its page: no key is transposed
//   out    [d, row]   +=  V [16 d, 32 keys]  x  P [16 pairs of keys, 16 rows]  V transposed once per tile of keys, for all rows
//
// A lane is a query row throughout, so that maxima, sums and pairs of probabilities take no shuffles. Multiplications leave the vector units
// idle and probabilities need nothing else: those of one group are computed between the multiplications of its neighbours.
#pragma once
#include "attention_item.h"
#include "tiles_amx.h"

#if defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace tiles {

constexpr int kLanes = 16;                             // query rows of a group
constexpr int kTileFloats = kTileBytes / 4;            // of a whole tile
constexpr int kSteps = kTile / kTileK;                 // multiplications that a tile of keys takes
constexpr int kScoreFloats = kTile * kLanes, kPairs = kTile / 2 * kLanes;

QUIRE_INLINE U32x16 zip_low(U32x16 even, U32x16 odd) { return {_mm512_unpacklo_epi16(even.v, odd.v)}; }
QUIRE_INLINE U32x16 zip_high(U32x16 even, U32x16 odd) { return {_mm512_unpackhi_epi16(even.v, odd.v)}; }
QUIRE_INLINE U32x16 max_u16(U32x16 a, U32x16 b) { return {_mm512_max_epu16(a.v, b.v)}; }
QUIRE_INLINE bool any_above_u16(U32x16 a, uint16_t most) { return _mm512_cmpgt_epu16_mask(a.v, _mm512_set1_epi16(short(most))) != 0; }
// The upper halves of fp32 lanes, as pairs: one shift, and one operation that is (odd & 0xffff0000) | even.
QUIRE_INLINE U32x16 cut_pairs(U32x16 even, U32x16 odd) {
  return {_mm512_ternarylogic_epi32(odd.v, _mm512_set1_epi32(int(0xffff0000u)), shr<16>(even).v, 0xea)};
}

// The tile of keys at hand: 16 keys' rows from keys[t] on, and the values as [v_tiles][kSteps][16 d][16 pairs of keys].
struct Operands {
  const char* keys[kTile / 16];
  int64_t strides[kTile / 16];
  const uint32_t* values;
  int k_steps, v_tiles;  // v_tiles is even
};

// The keys, in sixteens first..last-1, that some row of a group sees.
struct Span {
  int first, last;
  bool whole;  // every row sees all of them

  int first_step() const { return first / 2; }
  int end_step() const { return (last + 1) / 2; }
  int dots(const Operands& x) const { return x.k_steps * (last - first); }
};

// 2^(score - base + 1/2) of a group's keys in pairs of bf16, rounded to nearest, for `left` pairs more. `base` holds the half, since then
// 2^(f + 1/2) with |f| <= 1/2 is in [1, 2]: rounding it is adding half a unit of its last place, which its polynomial does, and cutting it.
// Within 2^-13.7 before it is rounded. Below 2^-126 exponents end at that of denormal numbers, which AMX and dot_pair take for zero.
struct Probabilities {
  const float* scores;
  uint32_t* pairs;
  int left;
  F32x16 scale, minus_base, sums[2];  // sums of even and odd pairs, as they are rounded

};

QUIRE_INLINE U32x16 exp2_bits(const Probabilities& at, F32x16 score) {
  const F32x16 whole = set1(0x1.8p23f), x = max(set1(-127.0f), fma(score, at.scale, at.minus_base));
  const F32x16 n = add(x, whole), f = sub(x, sub(n, whole));
  F32x16 p = set1(7.802452332e-2f);
  p = fma(p, f, set1(3.431039440e-1f));
  p = fma(p, f, set1(9.804190882e-1f));
  p = fma(p, f, set1(1.414111843e+0f + 0x1p-8f));
  return add(bits(p), shl<23>(bits(n)));
}

// The next `count` pairs, as far as there are any.
QUIRE_INLINE void go_on(Probabilities& p, int count) {
  for (; count > 0 && p.left > 0; --count, --p.left, p.scores += 2 * kLanes, p.pairs += kLanes) {
    const U32x16 pair = cut_pairs(exp2_bits(p, load(p.scores)), exp2_bits(p, load(p.scores + kLanes)));
    store_u32(p.pairs, pair);
    const F32x16 sum = dot_pair(p.sums[0], pair, set1_u32(0x3f803f80u));
    p.sums[0] = p.sums[1];
    p.sums[1] = sum;
  }
}

// What is done between multiplications.
struct Between {
  Probabilities& p;
  int pairs;  // after each multiplication
  Fetcher& fetcher;
  int lines;  // after each step, in 1/256
};

template <int N>
QUIRE_INLINE void score_tiles(const Operands& x, int first, const char* q, float* scores, Probabilities& p, Between& between) {
  tile_zero<0>();
  if constexpr (N > 1) tile_zero<1>();
  if constexpr (N > 2) tile_zero<2>();
  if constexpr (N > 3) tile_zero<3>();
  for (int s = 0; s < x.k_steps; ++s, q += kTileBytes) {
    const int64_t at = s * kTileK * 2;
    fetch(between.fetcher, between.lines);
    tile_load<4>(q, 64);
    tile_load<5>(x.keys[first] + at, x.strides[first]);
    tile_dot<0, 5, 4>();
    go_on(p, between.pairs);
    if constexpr (N > 1) {
      tile_load<6>(x.keys[first + 1] + at, x.strides[first + 1]);
      tile_dot<1, 6, 4>();
      go_on(p, between.pairs);
    }
    if constexpr (N > 2) {
      tile_load<7>(x.keys[first + 2] + at, x.strides[first + 2]);
      tile_dot<2, 7, 4>();
      go_on(p, between.pairs);
    }
    if constexpr (N > 3) {
      tile_load<5>(x.keys[first + 3] + at, x.strides[first + 3]);
      tile_dot<3, 5, 4>();
      go_on(p, between.pairs);
    }
  }
  scores += first * kTileFloats;
  tile_store<0>(scores, 64);
  if constexpr (N > 1) tile_store<1>(scores + kTileFloats, 64);
  if constexpr (N > 2) tile_store<2>(scores + 2 * kTileFloats, 64);
  if constexpr (N > 3) tile_store<3>(scores + 3 * kTileFloats, 64);
}

// Scores of the keys of `span`, [kTile][kLanes].
inline void score_group(const Operands& x, const Span& span, const char* q, float* scores, Between between) {
  Probabilities p = between.p;
  switch (span.last - span.first) {
    case 1: score_tiles<1>(x, span.first, q, scores, p, between); break;
    case 2: score_tiles<2>(x, span.first, q, scores, p, between); break;
    case 3: score_tiles<3>(x, span.first, q, scores, p, between); break;
    default: score_tiles<4>(x, span.first, q, scores, p, between); break;
  }
  between.p = p;
}

template <int N>
QUIRE_INLINE void output_tiles(const Operands& x, const Span& span, const uint32_t* pairs, int tile, bool fresh, float* out, Probabilities& p,
                               Between& between) {
  out += tile * kTileFloats;
  if (fresh) {
    tile_zero<0>();
    tile_zero<1>();
    if constexpr (N > 2) tile_zero<2>();
    if constexpr (N > 2) tile_zero<3>();
  } else {
    tile_load<0>(out, 64);
    tile_load<1>(out + kTileFloats, 64);
    if constexpr (N > 2) tile_load<2>(out + 2 * kTileFloats, 64);
    if constexpr (N > 2) tile_load<3>(out + 3 * kTileFloats, 64);
  }
  for (int s = span.first_step(); s < span.end_step(); ++s) {
    const uint32_t* v = x.values + (tile * kSteps + s) * kTileFloats;
    fetch(between.fetcher, between.lines);
    tile_load<4>(pairs + s * kTileFloats, 64);
    tile_load<5>(v, 64);
    tile_dot<0, 5, 4>();
    go_on(p, between.pairs);
    tile_load<6>(v + kSteps * kTileFloats, 64);
    tile_dot<1, 6, 4>();
    go_on(p, between.pairs);
    if constexpr (N > 2) {
      tile_load<7>(v + 2 * kSteps * kTileFloats, 64);
      tile_dot<2, 7, 4>();
      go_on(p, between.pairs);
      tile_load<5>(v + 3 * kSteps * kTileFloats, 64);
      tile_dot<3, 5, 4>();
      go_on(p, between.pairs);
    }
  }
  tile_store<0>(out, 64);
  tile_store<1>(out + kTileFloats, 64);
  if constexpr (N > 2) tile_store<2>(out + 2 * kTileFloats, 64);
  if constexpr (N > 2) tile_store<3>(out + 3 * kTileFloats, 64);
}

// Adds a tile's values to a group's output [v_tiles][16 d][kLanes], or sets it where that is fresh.
inline void output_group(const Operands& x, const Span& span, const uint32_t* pairs, bool fresh, float* out, Between between) {
  Probabilities p = between.p;
  int tile = 0;
  for (; tile + 4 <= x.v_tiles; tile += 4) output_tiles<4>(x, span, pairs, tile, fresh, out, p, between);
  if (tile < x.v_tiles) output_tiles<2>(x, span, pairs, tile, fresh, out, p, between);
  between.p = p;
}

}  // namespace tiles
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
