// Query rows against a stretch of keys, by tiles of AMX (tiles_amx.h): scores, probabilities, outputs.
//
//   scores [key, row]  =  K [16 keys, 32 d]  x  Q [16 pairs of d, 16 rows]     K where it lies in its page: no key is transposed
//   out    [d, row]   +=  V [16 d, 32 keys]  x  P [16 pairs of keys, 16 rows]  V transposed once per stretch, for all rows
//
//               rows                             A lane is a query row throughout, so that maxima, sums and pairs of probabilities take no shuffles.
//            B 6   B 7                           Sixteen rows are a group; two groups pass a stretch together, since a tile takes as long to load as
//   keys A 4 | C 0  C 1     d A 4 | C 0  C 1     half a multiplication.
//        A 5 | C 2  C 3       A 5 | C 2  C 3
#pragma once
#include "attention_item.h"
#include "tiles_amx.h"

#if defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace tiles {

constexpr int kLanes = 16;                         // query rows of a group
constexpr int kStretch = 2 * kTile;                // keys from one look at the largest score to the next; start at absolute multiples of this
constexpr int kSteps = kStretch / kTileK;          // multiplications that they take
constexpr int kTileFloats = kTileBytes / 4;
constexpr int kScores = kStretch * kLanes, kPairs = kScores / 2;  // of a group

QUIRE_INLINE U32x16 zip_low(U32x16 even, U32x16 odd) { return {_mm512_unpacklo_epi16(even.v, odd.v)}; }
QUIRE_INLINE U32x16 zip_high(U32x16 even, U32x16 odd) { return {_mm512_unpackhi_epi16(even.v, odd.v)}; }
QUIRE_INLINE U32x16 max_u16(U32x16 a, U32x16 b) { return {_mm512_max_epu16(a.v, b.v)}; }
QUIRE_INLINE bool any_above_u16(U32x16 a, uint16_t most) { return _mm512_cmpgt_epu16_mask(a.v, _mm512_set1_epi16(short(most))) != 0; }

// The stretch of keys at hand: 16 keys' rows from keys[t] on, and the values as [v_tiles][kSteps][16 d][16 pairs of keys].
struct Operands {
  const char* keys[kStretch / 16];
  int64_t strides[kStretch / 16];
  const uint32_t* values;
  int k_steps, v_tiles;  // v_tiles is even
};

// The keys, in steps of 32, that some row of the groups at hand sees.
struct Span {
  int first, end;
};

// Scores of G groups, [G][kStretch][kLanes].
template <int G>
void score_groups(const Operands& x, Span span, const char* queries, float* scores, Fetcher& fetcher, int lines) {
  const int64_t next_group = int64_t(x.k_steps) * kTileBytes;
  for (int step = span.first; step < span.end; ++step) {
    const char *low = x.keys[2 * step], *high = x.keys[2 * step + 1], *q = queries;
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    for (int s = 0; s < x.k_steps; ++s, low += 64, high += 64, q += kTileBytes) {
      fetch(fetcher, lines);
      tile_load<4>(low, x.strides[2 * step]);
      tile_load<6>(q, 64);
      tile_dot<0, 4, 6>();
      tile_load<5>(high, x.strides[2 * step + 1]);
      tile_dot<2, 5, 6>();
      if constexpr (G == 2) {
        tile_load<7>(q + next_group, 64);
        tile_dot<1, 4, 7>();
        tile_dot<3, 5, 7>();
      }
    }
    float* const to = scores + 2 * step * kTileFloats;
    tile_store<0>(to, 64);
    tile_store<2>(to + kTileFloats, 64);
    if constexpr (G == 2) {
      tile_store<1>(to + kScores, 64);
      tile_store<3>(to + kScores + kTileFloats, 64);
    }
  }
}

// 2^(score - base + 1/2) rounded to bf16, within 2^-13.7 before it is. `base` holds the half, since then 2^(f + 1/2) with |f| <= 1/2 is in [1, 2],
// and rounding it is adding half a unit of its last place, which the polynomial does, and cutting it. Exactly 0 below 2^-126.
QUIRE_INLINE F32x16 rounded_exp2(F32x16 score, F32x16 factor, F32x16 minus_base) {
  const F32x16 whole = set1(0x1.8p23f), x = fma(score, factor, minus_base);
  const F32x16 n = add(x, whole), f = sub(x, sub(n, whole));
  F32x16 p = set1(7.802452332e-2f);
  p = fma(p, f, set1(3.431039440e-1f));
  p = fma(p, f, set1(9.804190882e-1f));
  p = fma(p, f, set1(1.414111843e+0f + 0x1p-8f));
  const U32x16 power = add(bits(p), shl<23>(bits(n)));
  return select(lt(x, set1(-126.5f)), zero(), floats(and_(power, set1_u32(0xffff0000u))));
}

// A group's probabilities in pairs of bf16, [kStretch / 2][kLanes], and their sums: of even keys and odd ones, then both together.
inline F32x16 probabilities(Span span, const float* scores, F32x16 factor, F32x16 minus_base, uint32_t* pairs) {
  F32x16 even_sum = zero(), odd_sum = zero();
  for (int i = span.first * kTileK / 2; i < span.end * kTileK / 2; ++i) {
    const F32x16 even = rounded_exp2(load(scores + 2 * i * kLanes), factor, minus_base);
    const F32x16 odd = rounded_exp2(load(scores + (2 * i + 1) * kLanes), factor, minus_base);
    store_u32(pairs + i * kLanes, or_(shr<16>(bits(even)), bits(odd)));
    even_sum = add(even_sum, even);
    odd_sum = add(odd_sum, odd);
  }
  return add(even_sum, odd_sum);
}

// Adds a stretch's values to the outputs [v_tiles][16 d][kLanes] of G groups, or sets those that are fresh.
template <int G>
void output_groups(const Operands& x, Span span, const uint32_t* pairs, float* const* outs, const bool* fresh, Fetcher& fetcher, int lines) {
  for (int tile = 0; tile < x.v_tiles; tile += 2) {
    float *const first = outs[0] + tile * kTileFloats, *const second = outs[G - 1] + tile * kTileFloats;
    if (fresh[0]) {
      tile_zero<0>();
      tile_zero<2>();
    } else {
      tile_load<0>(first, 64);
      tile_load<2>(first + kTileFloats, 64);
    }
    if constexpr (G == 2) {
      if (fresh[1]) {
        tile_zero<1>();
        tile_zero<3>();
      } else {
        tile_load<1>(second, 64);
        tile_load<3>(second + kTileFloats, 64);
      }
    }
    const uint32_t *low = x.values + (tile * kSteps + span.first) * kTileFloats, *p = pairs + span.first * kTileFloats;
    for (int step = span.first; step < span.end; ++step, low += kTileFloats, p += kTileFloats) {
      fetch(fetcher, lines);
      tile_load<4>(low, 64);
      tile_load<6>(p, 64);
      tile_dot<0, 4, 6>();
      tile_load<5>(low + kSteps * kTileFloats, 64);
      tile_dot<2, 5, 6>();
      if constexpr (G == 2) {
        tile_load<7>(p + kPairs, 64);
        tile_dot<1, 4, 7>();
        tile_dot<3, 5, 7>();
      }
    }
    tile_store<0>(first, 64);
    tile_store<2>(first + kTileFloats, 64);
    if constexpr (G == 2) {
      tile_store<1>(second, 64);
      tile_store<3>(second + kTileFloats, 64);
    }
  }
}

}  // namespace tiles
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
