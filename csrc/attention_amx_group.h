// Groups of sixteen query rows against tiles of 64 keys, by tiles of AMX (tiles_amx.h): scores, probabilities, outputs.
//
//   scores [key, row]  =  K [16 keys, 32 d]  x  Q [16 pairs of d, 16 rows]     K where it lies in its page: no key is transposed
//   out    [d, row]   +=  V [16 d, 32 keys]  x  P [16 pairs of keys, 16 rows]  V transposed once, for all groups of a block
//
//              a group's rows, another's              A lane is a query row throughout, so that maxima, sums and pairs of probabilities
//                  B 6   B 7                B 6   B 7     take no shuffles. Two groups go together, since loading a tile takes half as
//   16 keys A 4 | C 0   C 1    16 d  A 4 | C 0   C 1      long as multiplying two.
//   16 keys A 5 | C 2   C 3    16 d  A 5 | C 2   C 3
#pragma once
#include "attention_item.h"
#include "tiles_amx.h"

#if defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace tiles {

constexpr int kLanes = 16;  // query rows of a group
constexpr int kTileFloats = kTileBytes / 4;
constexpr int kSteps = kTile / kTileK;                          // multiplications that a tile of keys takes
constexpr int kScores = kTile * kLanes, kPairs = kScores / 2;  // of a group and a tile
constexpr int kPartTiles = kPartKeys / kTile, kPartSteps = kPartTiles * kSteps;

QUIRE_INLINE U32x16 zip_low(U32x16 even, U32x16 odd) { return {_mm512_unpacklo_epi16(even.v, odd.v)}; }
QUIRE_INLINE U32x16 zip_high(U32x16 even, U32x16 odd) { return {_mm512_unpackhi_epi16(even.v, odd.v)}; }
QUIRE_INLINE U32x16 max_u16(U32x16 a, U32x16 b) { return {_mm512_max_epu16(a.v, b.v)}; }
QUIRE_INLINE bool any_above_u16(U32x16 a, uint16_t most) { return _mm512_cmpgt_epu16_mask(a.v, _mm512_set1_epi16(short(most))) != 0; }

// A stretch of keys, up to a part: 16 of them in rows of `k_steps` lines from keys[i] on, and values as [v_tiles][kPartSteps][16 d][16 pairs].
struct Operands {
  const char* keys[kPartKeys / 16];
  const uint32_t* values;
  int k_steps, v_tiles;  // v_tiles is even
};

// Steps of 32 keys, from the beginning of a tile or of a stretch.
struct Span {
  int first, end;
};

// Scores of G groups and one tile's keys, [G][kTile][kLanes].
template <int G>
void score_groups(const Operands& x, const char* const* keys, Span span, const char* queries, float* scores, Fetcher& fetcher, int lines) {
  const int64_t row_bytes = int64_t(x.k_steps) * 64, next_group = int64_t(x.k_steps) * kTileBytes;
  for (int step = span.first; step < span.end; ++step) {
    const char *low = keys[2 * step], *high = keys[2 * step + 1], *q = queries;
    float* const to = scores + 2 * step * kTileFloats;
    tile_zero<0>();
    tile_zero<2>();
    if constexpr (G == 2) tile_zero<1>();
    if constexpr (G == 2) tile_zero<3>();
    for (int s = 0; s < x.k_steps; ++s, low += 64, high += 64, q += kTileBytes) {
      fetch(fetcher, lines);
      tile_load<4>(low, row_bytes);
      tile_load<6>(q, 64);
      tile_dot<0, 4, 6>();
      if constexpr (G == 2) tile_load<7>(q + next_group, 64);
      if constexpr (G == 2) tile_dot<1, 4, 7>();
      tile_load<5>(high, row_bytes);
      tile_dot<2, 5, 6>();
      if constexpr (G == 2) tile_dot<3, 5, 7>();
    }
    tile_store<0>(to, 64);
    tile_store<2>(to + kTileFloats, 64);
    if constexpr (G == 2) tile_store<1>(to + kScores, 64);
    if constexpr (G == 2) tile_store<3>(to + kScores + kTileFloats, 64);
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
  const __mmask16 normal = _mm512_cmp_ps_mask(x.v, set1(-126.5f).v, _CMP_NLT_UQ);  // NaN is to stay
  return floats(and_({_mm512_maskz_add_epi32(normal, bits(p).v, shl<23>(bits(n)).v)}, set1_u32(0xffff0000u)));
}

// A group's probabilities of a tile's keys in pairs of bf16, [kTile / 2][kLanes], and their sums: of even keys and odd ones, then both together.
// Meanwhile brings `lines` lines of `ahead` a pair into the first cache, where there is any.
inline F32x16 probabilities(Span span, const float* scores, F32x16 factor, F32x16 minus_base, uint32_t* pairs, const char* const* ahead, int lines) {
  F32x16 even_sum = zero(), odd_sum = zero();
  for (int step = span.first; step < span.end; ++step) {
    const char* line = ahead ? ahead[step] : nullptr;
    for (int i = step * kTileK / 2; i < (step + 1) * kTileK / 2; ++i) {
      const F32x16 even = rounded_exp2(load(scores + 2 * i * kLanes), factor, minus_base);
      const F32x16 odd = rounded_exp2(load(scores + (2 * i + 1) * kLanes), factor, minus_base);
      store_u32(pairs + i * kLanes, or_(shr<16>(bits(even)), bits(odd)));
      even_sum = add(even_sum, even);
      odd_sum = add(odd_sum, odd);
      if (!line) continue;
      for (int n = 0; n < lines; ++n, line += kLine) prefetch(line);
    }
  }
  return add(even_sum, odd_sum);
}

// Adds the values of some steps of a stretch to the outputs [v_tiles][16 d][kLanes] of G groups, or sets those that are fresh.
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
    const uint32_t *low = x.values + (tile * kPartSteps + span.first) * kTileFloats, *p = pairs + span.first * kTileFloats;
    for (int step = span.first; step < span.end; ++step, low += kTileFloats, p += kTileFloats) {
      fetch(fetcher, lines);
      tile_load<4>(low, 64);
      tile_load<6>(p, 64);
      tile_dot<0, 4, 6>();
      if constexpr (G == 2) tile_load<7>(p + kPartTiles * kPairs, 64);
      if constexpr (G == 2) tile_dot<1, 4, 7>();
      tile_load<5>(low + kPartSteps * kTileFloats, 64);
      tile_dot<2, 5, 6>();
      if constexpr (G == 2) tile_dot<3, 5, 7>();
    }
    tile_store<0>(first, 64);
    tile_store<2>(first + kTileFloats, 64);
    if constexpr (G == 2) tile_store<1>(second, 64);
    if constexpr (G == 2) tile_store<3>(second + kTileFloats, 64);
  }
}

}  // namespace tiles
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
