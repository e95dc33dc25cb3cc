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
  int64_t end;     // of the item's keys
  Coming* coming;  // null if that is not known
  Sums part, total;

  float* row(int r) { return s.scores + 2 * kScores + r * kTile; }
  float* sums(int r) { return s.sums + r * kLanes; }
};

// Their keys and values in one format (attention_amx.h).
template <class Format>
struct FewOf : Few {};

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

// A part from its first key on, or from the states that rows have of it.
template <class Format>
void begin_part(FewOf<Format>& f, const float* states) {
  const int v_dim = f.item.args.layout.v.dim;
  f.part.fresh = !states;
  store(f.part.base, set1(-__builtin_inff()));
  for (int r = 0; r < f.item.rows(); ++r) {
    store(f.sums(r), states ? load(states + state_sums(v_dim)) : zero());
    if (!states) continue;
    Format::out_of_order(states, f.v_dims, f.s.out + r * f.v_dims);
    f.part.base[r] = states[state_base(v_dim)];
    states += state_floats(v_dim);
  }
}

template <class Format>
void save_part(FewOf<Format>& f, float* states) {
  const int v_dim = f.item.args.layout.v.dim;
  for (int r = 0; r < f.item.rows(); ++r, states += state_floats(v_dim)) {
    Format::in_order(f.s.out + r * f.v_dims, f.v_dims, states);
    store(states + state_sums(v_dim), load(f.sums(r)));
    states[state_base(v_dim)] = f.part.base[r];
  }
}

// Adds the part to the totals of those before it.
inline void merge_part(Few& f) {
  for (int r = 0; r < f.item.rows(); ++r) f.part.sum[r] = sum_lanes(load(f.sums(r)));
  const Merge m = merge_sums(load(f.part.base), load(f.part.sum), f.total);
  alignas(64) float shrink[kLanes], shrink_before[kLanes];
  store(shrink, m.shrink);
  store(shrink_before, m.shrink_before);
  for (int r = 0; r < f.item.rows(); ++r) {
    float* const to = f.s.total + r * f.v_dims;
    const float* const from = f.s.out + r * f.v_dims;
    for (int d = 0; d < f.v_dims; d += 16)
      store(to + d, m.first ? load(from + d) : fma(load(from + d), set1(shrink[r]), mul(load(to + d), set1(shrink_before[r]))));
  }
}

// Totals divided by their sums, in the order that dimensions have elsewhere.
template <class Format>
void write_out(const FewOf<Format>& f) {
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

// Asks for the queries of few rows, and for the states that these go on from.
inline void ask_for_rows(const AttendArgs& args, const WorkItem& work, const Heads& of, const Item& item) {
  if (item.rows() > kLanes) return;
  for (int r = 0; r < item.rows(); ++r)
    for (int at = 0; at < args.layout.k.dim * 2; at += kLine) prefetch(item.query(r) + at);
  for (int32_t part = work.first_part; part < work.end_part; ++part) {
    const char* const states = (const char*)beginning_of(args, work, of, part).states;
    const int64_t bytes = states ? item.rows() * state_floats(args.layout.v.dim) * 4 : 0;
    for (int64_t at = 0; at < bytes; at += kLine) prefetch(states + at);
  }
}

inline void start_totals(Few& f) {
  start_sums(f.item, 0, f.total);
  if (!f.total.fresh) memset(f.s.total, 0, size_t(kLanes * f.v_dims) * 4);
}

template <class Format>
FewOf<Format> few_of(Item& item, Scratch& s, int64_t end, Coming* coming) {
  const PageLayout& at = item.args.layout;
  const float factor = score_factor(item.args.scale, item.args.softcap);
  FewOf<Format> f{{item, s, steps_of<Format>(at), int(round_up(at.v.dim, Format::kOutputs)), factor, end, coming, {}, {}}};
  Format::load_few(f);
  return f;
}

template <class Format>
void run_part(FewOf<Format>& f, int64_t part, const Beginning& begun) {
  begin_part(f, begun.states);
  const KeyRange keys = keys_of_part(f.item, part, begun.keys);
  for (int64_t base = keys.begin / kTile * kTile; base < keys.end; base += kTile) Format::run_few_tile(f, base);
}

template <class Format>
void run_few(const AttendArgs& args, const WorkItem& work, const Heads& of, Scratch& s, Coming* coming) {
  Item item = item_of(args, work, of);
  FewOf<Format> f = few_of<Format>(item, s, keys_of_part(item, work.end_part - 1).end, coming);
  run_parts(args, work, of, f);
}

template <class Format>
void share_few(const AttendArgs& args, const SharedItem& work, const Heads& of, Scratch& s) {
  Item item = item_of(args, work, of);
  FewOf<Format> f = few_of<Format>(item, s, keys_of_part(item, work.part).end, nullptr);
  run_part(f, work.part, {nullptr, 0});
  save_part(f, states_of(args, work, of));
}

}  // namespace tiles
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
