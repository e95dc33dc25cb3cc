// Sixteen query rows, a group, against a tile of 64 keys, by tiles of AMX (tiles_amx.h): scores, probabilities, outputs.
//
//   scores [key, row]  =  K [16 keys, 32 d]  x  Q [16 pairs of d, 16 rows]     K where it lies in its page: no key is transposed
//   out    [d, row]   +=  V [16 d, 32 keys]  x  P [16 pairs of keys, 16 rows]  V transposed once, for all groups that pass the tile
//
//               rows               rows         A lane is a query row throughout, so that maxima, sums and pairs of probabilities take no shuffles.
//               B 6                B 6
//   keys A 4 | C 0       d  A 4 | C 0
//        A 5 | C 1          A 5 | C 1
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
constexpr int kScores = kTile * kLanes, kPairs = kScores / 2;  // of a group

QUIRE_INLINE U32x16 zip_low(U32x16 even, U32x16 odd) { return {_mm512_unpacklo_epi16(even.v, odd.v)}; }
QUIRE_INLINE U32x16 zip_high(U32x16 even, U32x16 odd) { return {_mm512_unpackhi_epi16(even.v, odd.v)}; }
QUIRE_INLINE U32x16 max_u16(U32x16 a, U32x16 b) { return {_mm512_max_epu16(a.v, b.v)}; }
QUIRE_INLINE bool any_above_u16(U32x16 a, uint16_t most) { return _mm512_cmpgt_epu16_mask(a.v, _mm512_set1_epi16(short(most))) != 0; }

// The keys at hand: 16 of them in rows of `k_steps` lines from keys[t] on, and the values as [v_tiles][kSteps][16 d][16 pairs of keys].
struct Operands {
  const char* keys[kTile / 16];
  const uint32_t* values;
  int k_steps, v_tiles;  // v_tiles is even
};

// The keys, in steps of 32, that some row of a group sees.
struct Span {
  int first, end;
};

// A group's scores, [kTile][kLanes].
inline void score_group(const Operands& x, Span span, const char* queries, float* scores, Fetcher& fetcher, int lines) {
  const int64_t row_bytes = int64_t(x.k_steps) * 64;
  for (int step = span.first; step < span.end; ++step) {
    const char *low = x.keys[2 * step], *high = x.keys[2 * step + 1], *q = queries;
    tile_zero<0>();
    tile_zero<1>();
    for (int s = 0; s < x.k_steps; ++s, low += 64, high += 64, q += kTileBytes) {
      fetch(fetcher, lines);
      tile_load<4>(low, row_bytes);
      tile_load<6>(q, 64);
      tile_dot<0, 4, 6>();
      tile_load<5>(high, row_bytes);
      tile_dot<1, 5, 6>();
    }
    tile_store<0>(scores + 2 * step * kTileFloats, 64);
    tile_store<1>(scores + (2 * step + 1) * kTileFloats, 64);
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

// A group's probabilities in pairs of bf16, [kTile / 2][kLanes], and their sums: of even keys and odd ones, then both together. Meanwhile asks for
// the lines of its output, `lines` a pair, since other groups' have taken their place in the first cache.
inline F32x16 probabilities(Span span, const float* scores, F32x16 factor, F32x16 minus_base, uint32_t* pairs, const float* out, int lines) {
  F32x16 even_sum = zero(), odd_sum = zero();
  for (int i = span.first * kTileK / 2; i < span.end * kTileK / 2; ++i) {
    const F32x16 even = rounded_exp2(load(scores + 2 * i * kLanes), factor, minus_base);
    const F32x16 odd = rounded_exp2(load(scores + (2 * i + 1) * kLanes), factor, minus_base);
    store_u32(pairs + i * kLanes, or_(shr<16>(bits(even)), bits(odd)));
    even_sum = add(even_sum, even);
    odd_sum = add(odd_sum, odd);
    for (int line = 0; line < lines; ++line, out += kLine / 4) prefetch(out);
  }
  return add(even_sum, odd_sum);
}

// Adds the values to a group's output [v_tiles][16 d][kLanes], or sets it where that is fresh.
inline void output_group(const Operands& x, Span span, const uint32_t* pairs, float* out, bool fresh, Fetcher& fetcher, int lines) {
  for (int tile = 0; tile < x.v_tiles; tile += 2, out += 2 * kTileFloats) {
    if (fresh) {
      tile_zero<0>();
      tile_zero<1>();
    } else {
      tile_load<0>(out, 64);
      tile_load<1>(out + kTileFloats, 64);
    }
    for (int step = span.first; step < span.end; ++step) {
      const uint32_t* v = x.values + (tile * kSteps + step) * kTileFloats;
      fetch(fetcher, lines);
      tile_load<4>(v, 64);
      tile_load<6>(pairs + step * kTileFloats, 64);
      tile_dot<0, 4, 6>();
      tile_load<5>(v + kSteps * kTileFloats, 64);
      tile_dot<1, 5, 6>();
    }
    tile_store<0>(out, 64);
    tile_store<1>(out + kTileFloats, 64);
  }
}

}  // namespace tiles
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
