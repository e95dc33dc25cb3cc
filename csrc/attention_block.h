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

constexpr int kBlockRows = kPanel >= 2 ? 384 : 192;  // query rows of one work item, for which a tile is copied once: as many as the second cache has room for
// Tiles that many rows meet at once, a panel of rows after the other: outputs stay in registers meanwhile. Keys and values of a group, and what a block's
// rows have in scratch, fit into the second cache.
constexpr int kGroupTiles = kPanel >= 2 ? 4 : 2;

// One thread's working memory, in floats, carved from one allocation.
struct Scratch {
  float *q, *columns, *keys, *values, *scores, *out, *total_out, *sums, *max, *total_max, *total_sum, *seen, *value_scales, *zeros;
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
  // Of a group's tile.
  float* keys(int tile) const { return s.keys + tile * kTile * k_rows; }
  int64_t key_stride() const { return k_rows * kPanelLanes; }  // from panel to panel
  float* values(int tile) const { return s.values + tile * kTile * round_up(v_stride, kPanelLanes); }
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

// The keys lo[r]..hi[r]-1 of the tile at `base` that each of some rows sees; neither falls from row to row. False if that is none.
QUIRE_INLINE bool visible_keys(const Item& item, int64_t base, int first_row, int rows, int* lo, int* hi) {
  const int first = first_row / item.heads, last = (first_row + rows - 1) / item.heads;
  const bool all = item.first_key(last) <= base && item.position(first) + 1 >= base + kTile;
  for (int r = 0; r < rows; ++r) {
    lo[r] = all ? 0 : clip(item.first_key((first_row + r) / item.heads) - base, kTile);
    hi[r] = all ? kTile : clip(item.position((first_row + r) / item.heads) + 1 - base, kTile);
  }
  return lo[0] < kTile && hi[rows - 1] > 0;
}

// Up to kDirectRows rows against a tile, read where it lies.
inline void few_rows(Block& b, const Rows& tile, int first_row, int end_row) {
  Scratch& s = b.s;
  QueryRows queries[kDirectRows];
  int num_queries = 0, lo[kDirectRows], hi[kDirectRows];
  float alpha[kDirectRows];
  visible_keys(b.item, tile.base, first_row, end_row - first_row, lo, hi);
  for (int r0 = first_row, rows; r0 < end_row; r0 += rows) {
    rows = rows_in_panel(r0, end_row);
    queries[num_queries++] = {b.queries(r0), s.scores + (r0 - first_row) * kTile, rows, (hi[r0 - first_row + rows - 1] + 15) / 16};
  }
  if (b.value.scales) b.value.scales(tile, b.args().layout.v.dim, s.value_scales);
  Lines lines = lines_ahead(tile, tile_met(b.item, tile.base + kTile, b.end, b.coming, (const char*)s.zeros), b.args().layout.k.bytes);
  b.key.score_few(tile, b.args().layout.k.dim, queries, num_queries, {s.columns, s.columns + kColumnFloats}, lines);
  ask_for_rest(lines.first);
  for (int i = 0, at = 0; i < num_queries; at += queries[i++].rows) {
    const int rows = queries[i].rows, r0 = first_row + at;
    float* scores = queries[i].scores;
    b.value.softmax(rows, queries[i].groups, lo + at, hi + at, b.args().scale, b.args().softcap, s.value_scales, scores, s.max + r0, s.sums + 16 * r0, alpha);
    const auto meet = [&](int r, int count, int from, int to, const float* shrink) {
      float* out = s.out + (r0 + r) * b.v_stride;
      b.value.output_few(count, scores + r * kTile, tile.v, from, to, b.args().layout.v.dim, shrink, out, b.v_stride, lines.next);
    };
    if (b.value.whole)
      meet(0, rows, lo[at], hi[at + rows - 1], alpha);
    else
      for_visible_keys(b.value.together, rows, lo + at, hi + at, alpha, meet);
  }
  ask_for_rest(lines.next);
}

// Tiles of keys and values, transposed and copied to scratch.
struct Group {
  int64_t base[kGroupTiles];
  bool finite[kGroupTiles];  // all its values
  int count = 0;
};

inline void place_tile(Block& b, const Rows& rows, Group& group) {
  Scratch& s = b.s;
  const PageLayout& at = b.args().layout;
  const int i = group.count++;
  group.base[i] = rows.base;
  b.key.transpose(rows, at.k.dim, b.keys(i), b.key_stride());
  group.finite[i] = b.value.copy(rows, at.v.dim, b.values(i));
  if (b.value.scales) b.value.scales(rows, at.v.dim, s.value_scales + i * kTile);
}

// Any number of rows against the tiles of a group: a panel of rows meets all of them, then comes the next one.
inline void many_rows(Block& b, const Group& group, int64_t next) {
  Scratch& s = b.s;
  const AttendArgs& args = b.args();
  const int num_rows = b.item.rows(), unit = b.value.together;
  const int calls = group.count * kTile / kPanelLanes + (int(b.v_stride) + kPanelLanes - 1) / kPanelLanes;  // for each panel of rows
  const int rate = group.count * tile_lines(args.layout) * 256 / ((num_rows + kMaxRows - 1) / kMaxRows * calls) + 1;
  TilesAhead ahead{b.item, b.coming, (const char*)s.zeros, next, next + group.count * kTile, b.end, {}};
  const auto ask_some = [&] {
    go_on(ahead);
    fetch(ahead.fetcher, rate);
  };
  for (int r0 = 0; r0 < num_rows; r0 += kMaxRows) {
    const int rows = num_rows - r0 < kMaxRows ? num_rows - r0 : kMaxRows;
    int lo[kGroupTiles][kMaxRows], hi[kGroupTiles][kMaxRows], count = 0;
    float alpha[kGroupTiles][kMaxRows];
    Terms terms[kGroupTiles];
    bool finite = true;
    for (int i = 0; i < group.count; ++i) {
      if (!visible_keys(b.item, group.base[i], r0, rows, lo[count], hi[count])) continue;
      float* const scores = s.scores + count * kMaxRows * kTile;
      const int groups = (hi[count][rows - 1] + 15) / 16;
      const KeyPanels keys{b.keys(i), b.key_stride()};
      for (int at = 0; at < groups; at += kPanel) {
        ask_some();
        b.key.score_panel(rows, b.queries(r0), keys, at, groups - at, args.layout.k.dim, scores);
      }
      b.value.softmax(rows, groups, lo[count], hi[count], args.scale, args.softcap, s.value_scales + i * kTile, scores, s.max + r0, s.sums + 16 * r0, alpha[count]);
      // A key that a row does not see has probability zero: adding zero times a finite value changes nothing.
      terms[count] = {scores, b.values(i), alpha[count], lo[count][0] / unit * unit, (hi[count][rows - 1] + unit - 1) / unit * unit};
      finite &= group.finite[i];
      ++count;
    }
    for (int d = 0; d < b.v_stride; d += kPanelLanes) {
      const int vecs = int(b.v_stride - d) / 16;
      float* const out = s.out + r0 * b.v_stride;
      ask_some();
      if (finite) {
        b.value.output_panel(rows, terms, count, d, vecs, out, b.v_stride);
        continue;
      }
      for (int i = 0; i < count; ++i)
        for_visible_keys(unit, rows, lo[i], hi[i], alpha[i], [&](int r, int n, int from, int to, const float* shrink) {
          const Terms some{terms[i].weights + r * kTile, terms[i].values, shrink, from, to};
          b.value.output_panel(n, &some, 1, d, vecs, out + r * b.v_stride, b.v_stride);
        });
    }
  }
}

// Some tiles from `base` on, before `end`; gives back where the next ones begin.
inline int64_t run_tiles(Block& b, int64_t base, int64_t end) {
  Item& item = b.item;
  const char* const zeros = (const char*)b.s.zeros;
  const int most = item.rows() > 2 * kMaxRows ? kGroupTiles : 1;  // else there are too few steps to ask for more in
  Group group;
  for (; base < end && group.count < most; base += kTile) {
    const Rows* const rows = tile_at(item, base, zeros);
    if (!rows) continue;
    const int first_row = rows->first_token * item.heads, end_row = rows->end_token * item.heads;
    const bool few = end_row - first_row <= kDirectRows;
    if (few && group.count > 0) break;
    for (int r = first_row; r < end_row; ++r) b.s.seen[r] = 1.0f;
    if (!few) {
      place_tile(b, *rows, group);
      continue;
    }
    few_rows(b, *rows, first_row, end_row);
    return base + kTile;
  }
  if (group.count > 0) many_rows(b, group, base);
  return base;
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
  for (int64_t base = keys.begin / kTile * kTile; base < keys.end;) base = run_tiles(b, base, keys.end);
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
