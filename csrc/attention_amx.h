// Attention of bf16 queries over bf16 keys and values on AMX. The law of a row, for any number of rows:
//
//   score  sums of q . k as tiles add them (tiles_amx.h), 32 dimensions at a time
//   base   for each tile of 64 keys: its largest score + 1/2, if that is more than 8 above the base so far; then the row's sums shrink
//   p      2^(score - base + 1/2), rounded to bf16; exactly 0 for a key that the row does not see
//   sum    of the rounded p: in sixteen sums, a key's place modulo 16 being its sum, over a part of 512 keys; then these, as sum_lanes does
//   out    sums of p . v as tiles add them, 32 keys at a time
//
// and parts are merged in order, as everywhere (attention.h). Scores are log2(e) times what they usually are. A key that a row does not see adds
// 0 x v, which leaves its bits alone as long as v is finite; where some v may not be, each token gets values of its own.
//
// Up to sixteen rows of one block go one way (attention_amx_few.h), more go another (attention_amx_block.h): same law, different layouts. A product's
// factors may change places, x . y is y . x, so a tile may have rows down and dimensions across, or the other way round.
#pragma once
#include "attention_amx_block.h"
#include "attention_amx_few.h"

#if defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace tiles {

// Places the keys begin..end-1 of one part and lets all groups pass that see any of them. They ask for the lines of the next part meanwhile.
inline void run_part(Block& b, int64_t begin, int64_t end) {
  Item& item = b.item;
  const PageLayout& at = b.args().layout;
  const char* const zeros = (const char*)b.s.zeros;
  Placed part{begin / kTile * kTile, 0, 0};
  part.tiles = int((end - part.base + kTile - 1) / kTile);
  int first = b.num_groups, last = -1;
  for (int tile = 0; tile < part.tiles; ++tile) {
    const int64_t base = part.base + tile * kTile;
    Rows& rows = item.tiles[base / kTile % 2];
    if (!locate_tile(item, base, zeros, rows)) continue;
    const int from = rows.first_token * item.heads / kLanes, to = (rows.end_token * item.heads - 1) / kLanes;
    first = from < first ? from : first;
    last = to > last ? to : last;
    place_keys(rows, at.k.dim, b.x.k_steps, (char*)b.s.keys + tile * kTile * b.x.k_steps * 64, b.x.keys + tile * (kTile / 16));
    if (place_values(rows, at.v.dim, b.x.v_tiles, (uint32_t*)b.s.values + tile * kSteps * kTileFloats)) part.finite |= 1u << tile;
  }
  if (last < first) return;
  Ahead ahead{item, zeros, part.base + part.tiles * kTile, part.base + 2 * part.tiles * kTile, {}};
  const int calls = (last - first + 2) / 2 * kSteps * b.x.k_steps, share = 256 * tile_lines(at) / calls + 1;  // of fetch() for each tile
  for (int group = first; group <= last; group += 2) {
    if (group < last)
      Passing<2>{b, group, ahead, {}}.pass(part, share);
    else
      Passing<1>{b, group, ahead, {}}.pass(part, share);
  }
}

inline void prepare(Block& b) {
  const int rows = b.item.rows();
  load_queries(b.item, b.x.k_steps, (uint32_t*)b.s.queries);
  for (int g = 0; g < b.num_groups; ++g) {
    b.groups[g].first_token = g * kLanes / b.item.heads;
    b.groups[g].last_token = ((rows < (g + 1) * kLanes ? rows : (g + 1) * kLanes) - 1) / b.item.heads;
  }
}
inline Block block_of(Item& item, Scratch& s, float* states) {
  const PageLayout& at = item.args.layout;
  const int k_steps = int(round_up(at.k.dim, kTileK) / kTileK), v_tiles = int(state_outputs(at.v.dim) / 16);
  return {item, s, {{}, (const uint32_t*)s.values, k_steps, v_tiles}, score_factor(item.args), states, (item.rows() + kLanes - 1) / kLanes, {}};
}

inline void run_item(const AttendArgs& args, const WorkItem& work, const Heads& of, Scratch& s) {
  Item item = item_of(args, work, of);
  Block b = block_of(item, s, nullptr);
  prepare(b);
  for (int g = 0; g < b.num_groups; ++g) {
    start_sums(item, g * kLanes, b.groups[g].total);
    if (!b.groups[g].total.fresh) memset(s.total + g * b.out_floats(), 0, size_t(b.out_floats()) * 4);
  }
  for (int32_t part = work.first_part; part < work.end_part; ++part) {
    const KeyRange keys = keys_of_part(item, part);
    run_part(b, keys.begin, keys.end);
  }
  for (int g = 0; g < b.num_groups; ++g) write_group(item, g * kLanes, b.groups[g].total, s.total + g * b.out_floats(), b.x.v_tiles);
}

inline void share_item(const AttendArgs& args, const SharedItem& work, const Heads& of, Scratch& s) {
  Item item = item_of(args, work, of);
  Block b = block_of(item, s, states_of(args, work, of));
  prepare(b);
  const KeyRange keys = keys_of_part(item, work.part);
  run_part(b, keys.begin, keys.end);
}

struct ByTiles {
  static constexpr int kRows = kMostRows;
  Scratch s;
  TileShapes shapes;
  bool prepare(const AttendArgs& args) { return carve_scratch(args, s); }
  void run(const AttendArgs& args, const WorkItem& work, const Heads& of) {
    work.num_tokens * of.count <= kLanes ? run_few(args, work, of, s) : run_item(args, work, of, s);
  }
  void share(const AttendArgs& args, const SharedItem& work, const Heads& of) {
    work.num_tokens * of.count <= kLanes ? share_few(args, work, of, s) : share_item(args, work, of, s);
  }
};
static_assert(kSplitRows <= kLanes, "blocks that are split over their keys have few rows");

// Of the layout and the dtype alone, so that all rows of a layer have one law.
inline bool serve(const AttendArgs& args) { return args.dtype == kBF16 && args.layout.k.format == kBF16 && args.layout.v.format == kBF16; }

}  // namespace tiles
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
