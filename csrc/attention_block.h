// One work item against all its keys or some parts of them. Online softmax after Milakov & Gimelshein (2018), tiled as in
// FlashAttention (Dao et al., 2022).
#pragma once
#include "attention_bytes.h"
#include "attention_item.h"
#include "attention_keys.h"
#include "attention_values.h"
#include "kernels.h"
#include "simd.h"

namespace quire {
namespace QUIRE_ISA {
namespace {

constexpr int kBlockRows = 192;  // query rows of one work item

// One thread's working memory, in floats, carved from one allocation.
struct Scratch {
  float *q, *columns, *keys, *values, *scores, *out, *total_out, *sums, *max, *total_max, *total_sum, *alpha, *seen, *value_scales, *zeros;
  int lo[kBlockRows], hi[kBlockRows];  // the keys of the tile at hand that a row sees
};

struct Block {
  Item& item;
  Scratch& s;
  const KeyFormat& key;
  const ValueFormat& value;
  int64_t k_rows, v_stride;  // head dimensions in a panel of queries or keys; length of an output row in scratch
  int64_t end;               // of the keys that the item has here
  Coming* coming;            // null if that is not known

  const AttendArgs& args() const { return item.args; }
  const float* queries(int row) const { return s.q + row / kMaxRows * (k_rows * kMaxRows) + row % kMaxRows; }
};

inline const KeyFormat& keys_of(const AttendArgs& args) {
#if defined(QUIRE_VECTOR_DOTS)
  if (are_bytes(args)) return kByteKeys;
#endif
  return kKeyFormats[args.layout.k.format];
}
inline const ValueFormat& values_of(const AttendArgs& args) {
#if defined(QUIRE_VECTOR_DOTS)
  if (are_bytes(args)) return kByteValues;
#endif
  return kValueFormats[args.layout.v.format];
}

// Calls meet(first, count, lo, hi, alpha) so that rows 0..rows-1, of which row r sees keys lo[r]..hi[r]-1, each meet their
// keys in ascending order and never one that they do not see: together over the keys that all see, alone over the others. `unit` keys from an absolute
// multiple of it on are never taken apart, but where a row does not see all of them.
template <class Meet>
QUIRE_INLINE void for_visible_keys(int unit, int rows, const int* lo, const int* hi, const float* alpha, const Meet& meet) {
  int common_lo = lo[0], common_hi = hi[0];
  float shrink[kMaxRows > kDirectRows ? kMaxRows : kDirectRows];
  const float one = 1.0f;
  for (int r = 0; r < rows; ++r) {
    common_lo = lo[r] > common_lo ? lo[r] : common_lo;
    common_hi = hi[r] < common_hi ? hi[r] : common_hi;
    shrink[r] = alpha[r];
  }
  common_lo = (common_lo + unit - 1) / unit * unit;
  common_hi = common_hi < common_lo ? common_lo : common_hi / unit * unit;
  for (int r = 0; r < rows; ++r) {
    const int end = hi[r] < common_lo ? hi[r] : common_lo;
    if (lo[r] >= end) continue;
    meet(r, 1, lo[r], end, shrink + r);
    shrink[r] = one;
  }
  meet(0, rows, common_lo, common_hi, shrink);
  for (int r = 0; r < rows; ++r) {
    const int begin = lo[r] > common_hi ? lo[r] : common_hi;
    if (begin < hi[r]) meet(r, 1, begin, hi[r], &one);
  }
}

// How many of the rows from `row` on, before `end`, share its panel of queries.
QUIRE_INLINE int rows_in_panel(int row, int end) { return end - row < kMaxRows - row % kMaxRows ? end - row : kMaxRows - row % kMaxRows; }

// Up to kDirectRows rows against a tile, read where it lies.
inline void few_rows(Block& b, const Rows& tile, int first_row, int end_row, Fetcher& fetcher) {
  Scratch& s = b.s;
  QueryRows queries[kDirectRows];
  int num_queries = 0;
  for (int r0 = first_row, rows; r0 < end_row; r0 += rows) {
    rows = rows_in_panel(r0, end_row);
    queries[num_queries++] = {b.queries(r0), s.scores + (r0 - first_row) * kTile, rows, (s.hi[r0 + rows - 1] + 15) / 16};
  }
  b.key.score_few(tile, b.args().layout.k.dim, queries, num_queries, {s.columns, s.columns + kColumnFloats}, fetcher);
  int r0 = first_row;
  for (int i = 0; i < num_queries; r0 += queries[i++].rows) {
    const int rows = queries[i].rows, *lo = s.lo + r0, *hi = s.hi + r0;
    float* scores = queries[i].scores;
    b.value.softmax(rows, queries[i].groups, lo, hi, b.args().scale, b.args().softcap, s.value_scales, scores, s.max + r0, s.sums + 16 * r0, s.alpha + r0);
    const auto meet = [&](int r, int count, int from, int to, const float* shrink) {
      float* out = s.out + (r0 + r) * b.v_stride;
      b.value.output_few(count, scores + r * kTile, tile.v, from, to, b.args().layout.v.dim, shrink, out, b.v_stride, fetcher);
    };
    if (b.value.whole)
      meet(0, rows, lo[0], hi[rows - 1], s.alpha + r0);
    else
      for_visible_keys(b.value.together, rows, lo, hi, s.alpha + r0, meet);
  }
  ask_for_rest(fetcher);
}

// Any number of rows against a tile that is transposed and copied: each panel passes all rows before the next one.
inline void many_rows(Block& b, const KeyPanels& keys, bool values_finite, int first_row, int end_row, Fetcher& fetcher) {
  Scratch& s = b.s;
  const int passes = kTile / kPanelLanes + (int(b.v_stride) + kPanelLanes - 1) / kPanelLanes;
  const int rate = tile_lines(b.args().layout) * 256 / ((end_row - 1) / kMaxRows + 1 - first_row / kMaxRows) / passes + 1;
  int rows;
  for (int group = 0; group < kTile / 16; group += kPanel) {
    for (int r0 = first_row; r0 < end_row; r0 += rows) {
      rows = rows_in_panel(r0, end_row);
      fetch(fetcher, rate);
      const int groups = (s.hi[r0 + rows - 1] + 15) / 16 - group;
      if (groups > 0) b.key.score_panel(rows, b.queries(r0), keys, group, groups, b.args().layout.k.dim, s.scores + r0 * kTile);
    }
  }
  for (int r0 = first_row; r0 < end_row; r0 += rows) {
    rows = rows_in_panel(r0, end_row);
    const int groups = (s.hi[r0 + rows - 1] + 15) / 16;
    b.value.softmax(rows, groups, s.lo + r0, s.hi + r0, b.args().scale, b.args().softcap, s.value_scales, s.scores + r0 * kTile, s.max + r0, s.sums + 16 * r0,
                    s.alpha + r0);
  }
  for (int d = 0, unit = b.value.together; d < b.v_stride; d += kPanelLanes) {
    const int vecs = int(b.v_stride - d) / 16;
    for (int r0 = first_row; r0 < end_row; r0 += rows) {
      rows = rows_in_panel(r0, end_row);
      fetch(fetcher, rate);
      const int *lo = s.lo + r0, *hi = s.hi + r0;
      const auto meet = [&](int r, int n, int from, int to, const float* shrink) {
        b.value.output_panel(n, s.scores + (r0 + r) * kTile, s.values, from, to, d, vecs, shrink, s.out + (r0 + r) * b.v_stride, b.v_stride);
      };
      // A key that a row does not see has probability zero: adding zero times a finite value changes nothing.
      if (values_finite)
        meet(0, rows, lo[0] / unit * unit, (hi[rows - 1] + unit - 1) / unit * unit, s.alpha + r0);
      else
        for_visible_keys(b.value.together, rows, lo, hi, s.alpha + r0, meet);
    }
  }
}

inline void run_tile(Block& b, int64_t base) {
  Item& item = b.item;
  const char* const zeros = (const char*)b.s.zeros;
  const Rows* const found = tile_at(item, base, zeros);
  if (!found) return;
  const Rows& rows = *found;
  const int first_row = rows.first_token * item.heads, end_row = rows.end_token * item.heads;
  for (int token = rows.first_token; token < rows.end_token; ++token) {
    const int lo = clip(item.first_key(token) - base, kTile), hi = clip(item.position(token) + 1 - base, kTile);
    for (int r = token * item.heads; r < (token + 1) * item.heads; ++r) {
      b.s.lo[r] = lo;
      b.s.hi[r] = hi;
      b.s.seen[r] = 1.0f;
    }
  }
  Fetcher fetcher;
  if (const Rows* const next = tile_met(item, base + kTile, b.end, b.coming, zeros)) {
    fetcher.run = next->runs;
    fetcher.end_run = next->runs + next->num_runs;
  }
  if (b.value.scales) b.value.scales(rows, b.args().layout.v.dim, b.s.value_scales);
  if (end_row - first_row <= kDirectRows) {
    few_rows(b, rows, first_row, end_row, fetcher);
  } else {
    const PageLayout& at = b.args().layout;
    const KeyPanels keys{b.s.keys, b.k_rows * kPanelLanes};
    b.key.transpose(rows, at.k.dim, b.s.keys, keys.stride);
    const bool values_finite = b.value.copy(rows, at.v.dim, b.s.values);
    many_rows(b, keys, values_finite, first_row, end_row, fetcher);
  }
}

// What rows have of a part: nothing, or what they left.
inline void begin_part(Block& b, const float* states) {
  const int v_dim = b.args().layout.v.dim;
  for (int r = 0; r < b.item.rows(); ++r) {
    if (states) {
      memcpy(b.s.out + r * b.v_stride, states, size_t(b.v_stride) * 4);
      store(b.s.sums + 16 * r, load(states + state_sums(v_dim)));
    } else {
      memset(b.s.out + r * b.v_stride, 0, size_t(b.v_stride) * 4);
      store(b.s.sums + 16 * r, zero());
    }
    b.s.max[r] = states ? states[state_base(v_dim)] : -__builtin_inff();
    b.s.seen[r] = states ? states[state_seen(v_dim)] : 0.0f;
    if (states) states += state_floats(v_dim);
  }
}

inline void save_part(const Block& b, float* states) {
  const int v_dim = b.args().layout.v.dim;
  for (int r = 0; r < b.item.rows(); ++r, states += state_floats(v_dim)) {
    memcpy(states, b.s.out + r * b.v_stride, size_t(b.v_stride) * 4);
    store(states + state_sums(v_dim), load(b.s.sums + 16 * r));
    states[state_base(v_dim)] = b.s.max[r];
    states[state_seen(v_dim)] = b.s.seen[r];
  }
}

// One part of the keys, from the states that rows have of it on: afterwards s.max, s.sums and s.out hold the block's state for this part alone, and
// s.seen says which rows saw any of its keys.
inline void run_part(Block& b, int64_t part, const Beginning& begun) {
  begin_part(b, begun.states);
  const KeyRange keys = keys_of_part(b.item, part, begun.keys);
  for (int64_t base = keys.begin / kTile * kTile; base < keys.end; base += kTile) run_tile(b, base);
}

// Adds the part to the rows' totals; parts come in ascending order.
inline void merge_part(Block& b) {
  Scratch& s = b.s;
  for (int r = 0; r < b.item.rows(); ++r) {
    if (s.seen[r] == 0.0f) continue;
    const float high = s.max[r] > s.total_max[r] ? s.max[r] : s.total_max[r];
    const F32x16 base = set1(finite_base(high));
    const F32x16 shrink_total = exp2_nonpositive(sub(set1(s.total_max[r]), base)), shrink = exp2_nonpositive(sub(set1(s.max[r]), base));
    float *const out = s.out + r * b.v_stride, *const total = s.total_out + r * b.v_stride;
    for (int64_t d = 0; d < b.v_stride; d += 16) store(total + d, fma(load(out + d), shrink, mul(load(total + d), shrink_total)));
    float lanes[16];
    store(lanes, fma(set1(sum_lanes(load(s.sums + 16 * r))), shrink, mul(set1(s.total_sum[r]), shrink_total)));
    s.total_sum[r] = lanes[0];
    s.total_max[r] = high;
  }
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
