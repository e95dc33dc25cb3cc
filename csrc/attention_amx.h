// Attention of bf16 queries over bf16 keys and values on AMX. The law of a row, for any number of rows:
//
//   score  sums of q . k as tiles add them (tiles_amx.h), 32 dimensions at a time
//   base   for each tile of 64 keys: its largest score + 1/2, if that is more than 8 above the base so far; then the row's sums shrink
//   p      2^(score - base + 1/2), rounded to bf16; exactly 0 for a key that the row does not see
//   sum    of the rounded p, those of even keys and of odd ones apart, then both together, tile by tile
//   out    sums of p . v as tiles add them, 32 keys at a time
//
// and parts of 512 keys are merged in order, as everywhere (attention.h). Scores are log2(e) times what they usually are. A key that a row does
// not see adds 0 x v, which leaves its bits alone as long as v is finite; where some v is not, each token gets values of its own.
#pragma once
#include "attention_amx_block.h"

#if defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace tiles {

// Places the keys begin.. up to `end` and passes all groups that see any of them. What is asked for meanwhile, in 1/256 of lines: with a single
// group in proportion to the time that each phase takes.
inline void run_stretch(Block& b, int64_t begin, int64_t end) {
  Item& item = b.item;
  const PageLayout& at = b.args().layout;
  const char* const zeros = (const char*)b.s.zeros;
  const int lines = 256 * tile_lines(at), calls = kSteps * b.x.k_steps, v_calls = kSteps * b.x.v_tiles;
  const bool single = b.num_groups == 1;
  Stretch stretch{begin, int((end - begin + kTile - 1) / kTile), 0};
  Ahead ahead{item, zeros, begin + stretch.tiles * kTile, begin + 2 * stretch.tiles * kTile, {}};
  if (single) go_on(ahead);
  int first = b.num_groups, last = -1;
  for (int tile = 0; tile < stretch.tiles; ++tile) {
    const int64_t base = begin + tile * kTile;
    Rows& rows = item.tiles[base / kTile % 2];
    if (!locate_tile(item, base, zeros, rows)) continue;
    const int from = rows.first_token * item.heads / kLanes, to = (rows.end_token * item.heads - 1) / kLanes;
    first = from < first ? from : first;
    last = to > last ? to : last;
    place_keys(rows, at.k.dim, b.x.k_steps, (char*)b.s.keys + tile * kTile * b.x.k_steps * 64, b.x.keys + tile * (kTile / 16));
    uint32_t* const values = (uint32_t*)b.s.values + tile * kSteps * kTileFloats;
    if (place_values(rows, at.v.dim, b.x.v_tiles, values, ahead.fetcher, single ? lines / 2 / v_calls : 0)) stretch.finite |= 1u << tile;
  }
  if (last < first) return;
  const int passes = (last - first + 2) / 2 * stretch.tiles, share = single ? lines / 4 / calls : lines * stretch.tiles / passes / calls + 1;
  for (int group = first; group <= last; group += 2) {
    if (group < last)
      Passing<2>{b, group, ahead, 0}.pass(stretch, share);
    else
      Passing<1>{b, group, ahead, single ? lines / 2 / v_calls : 0}.pass(stretch, share);
  }
}

inline void start_totals(Block& b) {
  const AttendArgs& args = b.args();
  for (int g = 0; g < b.num_groups; ++g) {
    State& total = b.groups[g].total;
    total.fresh = args.sinks == nullptr;
    if (total.fresh) continue;
    for (int r = 0; r < kLanes; ++r) {
      total.base[r] = sink_score(args, b.item.first_head + (g * kLanes + r) % b.item.heads) + 0.5f;
      total.sum[r] = 1.0f;
    }
    memset(total.out, 0, size_t(b.out_floats()) * 4);
  }
}

// A single group's part as others will merge it: lanes of `rows` floats for its output, its base and its sum, which is -1 if there is nothing.
inline void store_part(const State& part, int rows, int v_tiles, float* to) {
  const int dims = 16 * v_tiles;
  if (part.fresh) {
    to[(dims + 1) * rows] = -1.0f;
    return;
  }
  for (int d = 0; d < dims; ++d) store_n(to + d * rows, load(part.out + d * kLanes), rows);
  store_n(to + dims * rows, load(part.base), rows);
  store_n(to + (dims + 1) * rows, load(part.sum), rows);
}

inline void run_item(const AttendArgs& args, const WorkItem& work, int64_t head_index, int32_t kv_head, int32_t first_head, int32_t heads,
                     Scratch& s) {
  const PageLayout& at = args.layout;
  Item item = item_of(args, work, kv_head, first_head, heads);
  const int rows = item.rows(), k_steps = int(round_up(at.k.dim, kTileK) / kTileK), v_tiles = int(round_up(at.v.dim, 32) / 16);
  const bool plain = args.softcap == 0.0f && args.scale > 0.0f;
  Block b{item, s, {{}, (const uint32_t*)s.values, k_steps, v_tiles}, (rows + kLanes - 1) / kLanes, plain ? args.scale * kLog2E : 0.0f, {}};
  for (int g = 0; g < b.num_groups; ++g) {
    float* const rest = s.rest + g * 4 * kLanes;
    const int end = rows < (g + 1) * kLanes ? rows : (g + 1) * kLanes;
    b.groups[g] = {g * kLanes / heads,
                   (end - 1) / heads,
                   {s.out + g * b.out_floats(), rest, rest + kLanes, true},
                   {s.total + g * b.out_floats(), rest + 2 * kLanes, rest + 3 * kLanes, true}};
  }
  load_queries(item, k_steps, (uint32_t*)s.queries);
  const int64_t stride = rows * partial_stride(at.v.dim);
  float* const partials = work.num_splits > 1 ? args.partials + work.partials + head_index * work.num_parts * stride : nullptr;
  if (!partials) start_totals(b);
  for (int32_t part = work.first_part; part < work.end_part; ++part) {
    for (int g = 0; g < b.num_groups; ++g) {
      State& state = b.groups[g].part;
      state.fresh = true;
      store(state.base, set1(-__builtin_inff()));
      store(state.sum, zero());
    }
    const KeyRange keys = keys_of_part(item, part);
    const int64_t stretch = b.num_groups == 1 ? kTile : kPartKeys;
    for (int64_t base = keys.begin / kTile * kTile; base < keys.end; base += stretch) run_stretch(b, base, base + stretch < keys.end ? base + stretch : keys.end);
    for (int g = 0; g < b.num_groups; ++g) {
      if (partials)
        store_part(b.groups[g].part, rows, v_tiles, partials + (part - work.block_first_part) * stride);
      else if (!b.groups[g].part.fresh)
        merge_group(b.groups[g].part, kLanes, v_tiles, b.groups[g].total);
    }
  }
  if (partials) {
    if (__atomic_add_fetch(args.counters + work.counter + head_index, 1, __ATOMIC_ACQ_REL) < work.num_splits) return;
    start_totals(b);
    for (int32_t i = 0; i < work.num_parts; ++i) {
      float *const out = partials + i * stride, *const base = out + 16 * v_tiles * rows, *const sum = base + rows;
      if (*sum == -1.0f) continue;
      State part{out, base, sum, false};
      merge_group(part, rows, v_tiles, b.groups[0].total);
    }
  }
  for (int g = 0; g < b.num_groups; ++g) write_group(item, g * kLanes, b.groups[g].total, v_tiles);
}

struct ByTiles {
  static constexpr int kRows = kMostRows;
  Scratch s;
  TileShapes shapes;
  bool prepare(const AttendArgs& args) { return carve_scratch(args, s); }
  void run(const AttendArgs& args, const WorkItem& work, int64_t head_index, int32_t kv_head, int32_t first_head, int32_t heads) {
    run_item(args, work, head_index, kv_head, first_head, heads, s);
  }
};

// Of the layout and the dtype alone, so that all rows of a layer have one law.
inline bool serve(const AttendArgs& args) { return args.dtype == kBF16 && args.layout.k.format == kBF16 && args.layout.v.format == kBF16; }

}  // namespace tiles
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
