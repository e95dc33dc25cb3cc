// What a row's probabilities and sums are on AMX, for those who hold rows in lanes (attention_amx_block.h) and those who hold keys in lanes
// (attention_amx_few.h): the same arithmetic, so the same bits. attention_amx.h tells the whole law.
#pragma once
#include "attention_softmax.h"
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
