// What a row's probabilities and sums are on AMX, for those who hold rows in lanes (attention_amx_block.h) and those who hold keys in lanes
// (attention_amx_few.h): the same arithmetic, so the same bits. attention_amx.h tells the whole law.
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
constexpr int kSteps = kTile / kTileK;  // multiplications that a tile of keys takes

// Steps of 32 keys, from the beginning of a tile or of a part.
struct Span {
  int first, end;
};

// The keys lo..hi-1 of the tile at `base` that a token sees.
struct Seen {
  int lo, hi;
};
QUIRE_INLINE Seen seen_by(const Item& item, int token, int64_t base) {
  return {clip(item.first_key(token) - base, kTile), clip(item.position(token) + 1 - base, kTile)};
}

// What dot products are multiplied by to be scores; 0 where that is not all that shapes them, and they are shaped one by one.
inline float score_factor(const AttendArgs& args) { return args.softcap == 0.0f && args.scale > 0.0f ? args.scale * kLog2E : 0.0f; }

// 2^(score - base) within 2^-13.7, and rounded to bf16 if that is wanted: 2^f of the fraction, in [1, 2], where rounding is adding half a unit of the
// last place, which the polynomial does, and cutting. Exactly 0 below 2^-126 (FlushedSmall).
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
  return {base, finite, select(grown, exp2_nonpositive(sub(before, finite)), set1(1.0f)), grown};
}

// Where a base has to follow, its row has a probability of nearly 2^8 by what the base was before, and sums that it goes into are not below this. So
// sums, which are there anyway, show where to look; where they are not below it for other reasons, looking shows that, too.
constexpr float kMuch = 0x1p7f;
QUIRE_INLINE Mask16 not_below(F32x16 sum, float much) { return {_mm512_cmp_ps_mask(sum.v, set1(much).v, _CMP_NLT_UQ)}; }  // NaN is not

// The sum of sixteen vectors, lane by lane in the order of sum_lanes.
inline F32x16 sum_vectors(const float* from) {
  F32x16 x[8];
  for (int i = 0; i < 8; ++i) x[i] = add(load(from + i * kLanes), load(from + (i + 8) * kLanes));
  for (int half = 4; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] = add(x[i], x[i + half]);
  return x[0];
}

// Sixteen rows' sums over some keys.
struct Sums {
  alignas(64) float base[kLanes], sum[kLanes];
  bool fresh;  // nothing is in them yet, nor in the outputs beside them
};

// Totals before the first part: sinks, where there are any, whose outputs are zeros. Lane r has query row first_row + r.
inline void start_sums(const Item& item, int first_row, Sums& total) {
  total.fresh = item.args.sinks == nullptr;
  for (int r = 0; r < kLanes && !total.fresh; ++r) {
    total.base[r] = sink_score(item.args, item.first_head + (first_row + r) % item.heads);
    total.sum[r] = 1.0f;
  }
}

// Adds a part's sums to those of the parts before it. Outputs follow: the part's times `shrink`, plus the former times `shrink_before`; or, if the
// total was fresh, the part's as they are.
struct Merge {
  F32x16 shrink, shrink_before;
  bool first;
};
inline Merge merge_sums(F32x16 base, F32x16 sum, Sums& total) {
  Merge m{set1(1.0f), zero(), total.fresh};
  total.fresh = false;
  if (!m.first) {
    const F32x16 none = set1(-__builtin_inff()), before = load(total.base), high = max(base, before), finite = select(eq(high, none), zero(), high);
    m.shrink = exp2_nonpositive(sub(base, finite));
    m.shrink_before = exp2_nonpositive(sub(before, finite));
    sum = fma(sum, m.shrink, mul(load(total.sum), m.shrink_before));
    base = high;
  }
  store(total.base, base);
  store(total.sum, sum);
  return m;
}

}  // namespace tiles
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
