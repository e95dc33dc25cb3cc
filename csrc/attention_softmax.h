// Scores of a tile of keys to probabilities, for those who hold a row's keys in lanes and those who hold rows in lanes.
#pragma once
#include "attention_item.h"
#include "simd_math.h"

namespace quire {
namespace QUIRE_ISA {
namespace {

// Scores of up to 16 rows to probabilities, in place; updates each row's maximum and sums, and gives the factor by which its
// former output shrinks. Lanes outside a row's keys lo..hi-1 become exactly zero.
inline void softmax_rows(int rows, int groups, const int* lo, const int* hi, float scale, float softcap, const float*, float* scores, float* max,
                         float* sums, float* alpha) {
  float before[16], after[16];
  const F32x16 none = set1(-__builtin_inff());
  for (int r = 0; r < rows; ++r) {
    float* row = scores + r * kTile;
    F32x16 top = none;
    for (int j = 0; j < groups; ++j) {
      F32x16 x = shape_score(load(row + 16 * j), scale, softcap);
      if (lo[r] > 16 * j || hi[r] < 16 * j + 16) x = select(lanes_between(clip(lo[r] - 16 * j, 16), clip(hi[r] - 16 * j, 16)), x, none);
      store(row + 16 * j, x);
      top = quire::QUIRE_ISA::max(top, x);
    }
    const float tile_max = max_lanes(top);
    before[r] = max[r];
    max[r] = tile_max > max[r] ? tile_max : max[r];
    after[r] = finite_base(max[r]);
  }
  store_n(alpha, exp2_nonpositive(sub(load_n(before, rows), load_n(after, rows))), rows);
  for (int r = 0; r < rows; ++r) {
    float* row = scores + r * kTile;
    const F32x16 base = set1(after[r]);
    F32x16 sum = zero();
    for (int j = 0; j < groups; ++j) {
      const F32x16 p = exp2_nonpositive(sub(load(row + 16 * j), base));
      store(row + 16 * j, p);
      sum = add(sum, p);
    }
    store(sums + 16 * r, fma(load(sums + 16 * r), set1(alpha[r]), sum));
  }
}

#if defined(QUIRE_BF16_DOT)
// What dot products are multiplied by to be scores; 0 where that is not all that shapes them, and they are shaped one by one.
inline float score_factor(float scale, float softcap) { return softcap == 0.0f && scale > 0.0f ? scale * kLog2E : 0.0f; }

// 2^(score - base) within 2^-13.7, and rounded to bf16 if that is wanted: 2^f of the fraction, in [1, 2], where rounding is adding half a unit of the
// last place, which the polynomial does, and cutting. Exactly 0 below 2^-126 where such numbers are flushed (FlushedSmall).
template <bool kRounded>
QUIRE_INLINE F32x16 exp2_of(F32x16 score, F32x16 factor, F32x16 minus_base) {
  const F32x16 x = fma(score, factor, minus_base), f = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF)};
  F32x16 p = set1(7.802452332e-02f);
  p = fma(p, f, set1(2.260671590e-01f));
  p = fma(p, f, set1(6.958335367e-01f));
  p = fma(p, f, set1(9.999252195e-01f + (kRounded ? 0x1p-8f : 0.0f)));
  const F32x16 scaled = {_mm512_scalef_ps(p.v, x.v)};
  return kRounded ? floats(and_(bits(scaled), set1_u32(0xffff0000u))) : scaled;
}

// How sixteen rows' bases follow the largest score of a tile, and by what their sums shrink where they do.
struct Follow {
  F32x16 base, finite, shrink;  // finite: what scores are subtracted from, where a base is still -inf
  Mask16 grown;
};
QUIRE_INLINE Follow follow(F32x16 top, F32x16 factor, F32x16 before) {
  const F32x16 none = set1(-__builtin_inff()), wanted = mul(top, factor);
  const Mask16 grown = gt(wanted, add(before, set1(8.0f)));
  const F32x16 base = select(grown, wanted, before), finite = select(eq(base, none), zero(), base);
  Follow bases{base, finite, set1(1.0f), grown};
  if (mask_bits(grown) != 0) bases.shrink = select(grown, exp2_nonpositive(sub(before, finite)), bases.shrink);
  return bases;
}

// A row's scores shaped, -inf where it does not see a key; gives back the largest of each lane.
QUIRE_INLINE F32x16 shape_row(float* row, int groups, int lo, int hi, float scale, float softcap, bool plain) {
  const F32x16 none = set1(-__builtin_inff());
  F32x16 top = none;
  for (int j = 0; j < groups; ++j) {
    F32x16 x = load(row + 16 * j);
    if (!plain) x = shape_score(x, scale, softcap);
    x = select(lanes_between(clip(lo - 16 * j, 16), clip(hi - 16 * j, 16)), x, none);
    store(row + 16 * j, x);
    top = max(top, x);
  }
  return top;
}

// Up to sixteen rows' scores shaped, and their bases; a probability is then exp2_of(score, factor, minus[row]).
struct Settled {
  F32x16 factor;
  float minus[16];
};
inline Settled settle(int rows, int groups, const int* lo, const int* hi, float scale, float softcap, float* scores, float* max, float* alpha) {
  const F32x16 none = set1(-__builtin_inff());
  const float as_is = score_factor(scale, softcap);
  const bool plain = as_is != 0.0f, as_they_lie = plain && lo[rows - 1] == 0 && hi[0] >= 16 * groups;
  Settled settled{set1(plain ? as_is : 1.0f), {}};
  F32x16 tops[16];
  for (int r = rows; r < 16; ++r) tops[r] = none;
  for (int r = 0; r < rows; ++r) {
    float* const row = scores + r * kTile;
    if (!as_they_lie) {
      tops[r] = shape_row(row, groups, lo[r], hi[r], scale, softcap, plain);
      continue;
    }
    F32x16 top = load(row);
    for (int j = 1; j < groups; ++j) top = quire::QUIRE_ISA::max(top, load(row + 16 * j));
    tops[r] = top;
  }
  const Follow bases = follow(max_of_each(tops), settled.factor, load_n(max, rows));
  store_n(max, bases.base, rows);
  store_n(alpha, bases.shrink, rows);
  store(settled.minus, sub(zero(), bases.finite));
  return settled;
}
#endif

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
