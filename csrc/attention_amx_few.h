// Up to sixteen query rows of one work item on AMX: decoding above all, where keys and values are met once and what each costs counts. What is common
// to all formats of keys and values: how a row's scores, outputs and sums lie, how they are settled, merged, and split over work items. A row's keys
// are lanes: no lane without a row costs anything.
#pragma once
#include "attention_amx_block.h"

#if defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace tiles {

struct Few {
  Item& item;
  Scratch& s;
  int k_steps, v_dims;  // v_dims: a multiple of what outputs come in
  float factor;
  Sums part, total;

  float* row(int r) { return s.scores + 2 * kScores + r * kTile; }
  float* sums(int r) { return s.sums + r * kLanes; }
};

// Sixteen keys of four rows, [16 keys][kLanes], to a vector for each row.
QUIRE_INLINE void turn_four(const float* from, F32x16* rows) {
  __m512 x[4];  // in its quarter q: key 4 q + i of four rows
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_castps128_ps512(_mm_loadu_ps(from + i * kLanes));
    x[i] = _mm512_mask_broadcast_f32x4(x[i], 0x00f0, _mm_loadu_ps(from + (4 + i) * kLanes));
    x[i] = _mm512_mask_broadcast_f32x4(x[i], 0x0f00, _mm_loadu_ps(from + (8 + i) * kLanes));
    x[i] = _mm512_mask_broadcast_f32x4(x[i], 0xf000, _mm_loadu_ps(from + (12 + i) * kLanes));
  }
  const __m512d low = _mm512_castps_pd(_mm512_unpacklo_ps(x[0], x[1])), low2 = _mm512_castps_pd(_mm512_unpacklo_ps(x[2], x[3]));
  const __m512d high = _mm512_castps_pd(_mm512_unpackhi_ps(x[0], x[1])), high2 = _mm512_castps_pd(_mm512_unpackhi_ps(x[2], x[3]));
  rows[0] = {_mm512_castpd_ps(_mm512_unpacklo_pd(low, low2))};
  rows[1] = {_mm512_castpd_ps(_mm512_unpackhi_pd(low, low2))};
  rows[2] = {_mm512_castpd_ps(_mm512_unpacklo_pd(high, high2))};
  rows[3] = {_mm512_castpd_ps(_mm512_unpackhi_pd(high, high2))};
}

// Brings scores of the tile at `base` into their shape, those of unseen keys to -inf, and lets the bases follow them: where one has to, what its row
// has so far shrinks. Returns what is added to scores from here on.
inline F32x16 settle_rows(Few& f, Span span, int64_t base) {
  const Item& item = f.item;
  const F32x16 none = set1(-__builtin_inff()), factor = set1(f.factor == 0.0f ? 1.0f : f.factor);
  alignas(64) float top[kLanes], shrink[kLanes];
  store(top, none);
  for (int r = 0; r < item.rows(); ++r) {
    const Seen seen = seen_by(item, r / item.heads, base);
    F32x16 high = none;  // max() gives its second operand where the first is NaN, so this never is
    for (int key = span.first * kTileK; key < span.end * kTileK; key += 16) {
      F32x16 x = load(f.row(r) + key);
      if (f.factor == 0.0f) x = shape_score(x, item.args.scale, item.args.softcap);
      if (seen.lo > key || seen.hi < key + 16) x = select(lanes_between(clip(seen.lo - key, 16), clip(seen.hi - key, 16)), x, none);
      store(f.row(r) + key, x);
      high = max(x, high);
    }
    top[r] = max_lanes(high);
  }
  const Follow now = follow(load(top), factor, load(f.part.base));
  store(f.part.base, now.base);
  store(shrink, now.shrink);
  for (int r = 0; r < item.rows() && mask_bits(now.grown) != 0; ++r) {
    if ((mask_bits(now.grown) >> r & 1u) == 0) continue;
    store(f.sums(r), mul(load(f.sums(r)), set1(shrink[r])));
    float* const out = f.s.out + r * f.v_dims;
    for (int d = 0; d < (f.part.fresh ? 0 : f.v_dims); d += 16) store(out + d, mul(load(out + d), set1(shrink[r])));
  }
  return sub(zero(), now.finite);
}

// Adds one part's outputs [rows][v_dims], bases and sums to the totals of those before it.
inline void merge_rows(Few& f, const float* out, F32x16 base, F32x16 sum) {
  const Merge m = merge_sums(base, sum, f.total);
  alignas(64) float shrink[kLanes], shrink_before[kLanes];
  store(shrink, m.shrink);
  store(shrink_before, m.shrink_before);
  for (int r = 0; r < f.item.rows(); ++r) {
    float* const to = f.s.total + r * f.v_dims;
    const float* const from = out + r * f.v_dims;
    for (int d = 0; d < f.v_dims; d += 16)
      store(to + d, m.first ? load(from + d) : fma(load(from + d), set1(shrink[r]), mul(load(to + d), set1(shrink_before[r]))));
  }
}

// Totals divided by their sums, in the order that dimensions have elsewhere.
template <class Format>
void write_rows(const Few& f) {
  const int v_dim = f.item.args.layout.v.dim;
  alignas(64) float share[kLanes];
  store(share, div(set1(1.0f), load(f.total.sum)));
  for (int r = 0; r < f.item.rows(); ++r) {
    uint16_t* const to = (uint16_t*)f.item.args.out + f.item.out(r);
    Format::in_order(f.s.total + r * f.v_dims, f.v_dims, f.s.out);
    // -0 to +0: a tile multiplication that adds nothing makes that of it too.
    for (int d = 0; d < v_dim; d += 16) store_bf16_n(to + d, add(mul(load(f.s.out + d), set1(share[r])), zero()), v_dim - d < 16 ? v_dim - d : 16);
  }
}

inline void start_few(Few& f) {
  start_sums(f.item, 0, f.total);
  if (!f.total.fresh) memset(f.s.total, 0, size_t(kLanes * f.v_dims) * 4);
}

template <class Format>
void run_few(const AttendArgs& args, const WorkItem& work, int64_t head_index, int32_t kv_head, int32_t first_head, int32_t heads, Scratch& s) {
  const PageLayout& at = args.layout;
  Item item = item_of(args, work, kv_head, first_head, heads);
  const int rows = item.rows();
  Few f{item, s, steps_of<Format>(at), int(round_up(at.v.dim, Format::kOutputs)), score_factor(args), {}, {}};
  Format::load_few(f);
  const int64_t stride = rows * partial_stride(at.v.dim), outs = int64_t(rows) * f.v_dims;
  float* const partials = work.num_splits > 1 ? args.partials + work.partials + head_index * work.num_parts * stride : nullptr;
  if (!partials) start_few(f);
  for (int32_t part = work.first_part; part < work.end_part; ++part) {
    f.part.fresh = true;
    store(f.part.base, set1(-__builtin_inff()));
    memset(s.sums, 0, size_t(rows * kLanes) * 4);
    const KeyRange keys = keys_of_part(item, part);
    for (int64_t base = keys.begin / kTile * kTile; base < keys.end; base += kTile) Format::run_few_tile(f, base);
    for (int r = 0; r < rows; ++r) f.part.sum[r] = sum_lanes(load(f.sums(r)));
    if (partials) {  // every part has a key that some row sees
      float* const to = partials + (part - work.block_first_part) * stride;
      memcpy(to, s.out, size_t(outs) * 4);
      memcpy(to + outs, f.part.base, size_t(rows) * 4);
      memcpy(to + outs + rows, f.part.sum, size_t(rows) * 4);
    } else {
      merge_rows(f, s.out, load(f.part.base), load(f.part.sum));
    }
  }
  if (partials) {
    if (__atomic_add_fetch(args.counters + work.counter + head_index, 1, __ATOMIC_ACQ_REL) < work.num_splits) return;
    start_few(f);
    for (int32_t i = 0; i < work.num_parts; ++i) {
      const float* const from = partials + i * stride;
      merge_rows(f, from, load_n(from + outs, rows), load_n(from + outs + rows, rows));
    }
  }
  write_rows<Format>(f);
}

}  // namespace tiles
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
