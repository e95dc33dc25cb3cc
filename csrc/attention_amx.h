// Attention of bf16 queries over bf16 keys and values on AMX. The law of a row, for any number of rows:
//
//   score  sums of q . k as tiles add them (tiles_amx.h), 32 dimensions at a time
//   base   for each tile of 64 keys: its largest score, if that is more than 8 above the base so far; then the row's sums shrink
//   p      2^(score - base), rounded to bf16; exactly 0 for a key that the row does not see, or below 2^-126
//   sum    of the rounded p: in sixteen sums, a key's place modulo 16 being its sum, over a part of 512 keys; then these, as sum_lanes does
//   out    sums of p . v as tiles add them, 32 keys at a time
//
// and parts are merged in order, as everywhere (attention.h). Scores are log2(e) times what they usually are. A key that a row does not see adds
// 0 x v, which leaves its bits alone as long as v is finite; where some v may not be, each token gets values of its own.
//
// Up to sixteen rows of one block go one way (attention_amx_few.h), more go another (attention_amx_block.h): same law, different layouts. A product's
// factors may change places, x . y is y . x, so a tile may have rows down and dimensions across, or the other way round.
//
// int8 keys and values have a law in integers, which follows this one in its bases, sums and parts (attention_bytes_law.h).
#pragma once
#include "attention_amx_block_bytes.h"
#include "attention_amx_block_pairs.h"
#include "attention_amx_few_bytes.h"
#include "attention_amx_few_pairs.h"

#if defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace tiles {

// What differs between formats. bf16 keys and values:
struct Pairs {
  static constexpr int kKeyDims = kTileK, kOutputs = 32;
  template <int G>
  using Passing = PassingPairs<G>;

  static void load_block(Block& b) { load_queries(b.item, b.x.k_steps, (uint32_t*)b.s.queries); }
  static bool place(Block& b, const Rows& rows, int tile) {
    place_keys(rows, b.args().layout.k.dim, b.x.k_steps, (char*)b.s.keys + tile * kTile * b.x.k_steps * 64, b.x.keys + tile * kSixteens);
    return place_values(rows, b.args().layout.v.dim, b.x.v_tiles, (uint32_t*)b.s.values + tile * kSteps * kTileFloats);
  }
  static void load_few(Few& f) { load_queries(f.item, f.k_steps, (uint32_t*)f.s.queries); }
  static void run_few_tile(Few& f, int64_t base) { run_pairs_tile(f, base); }
  static void in_order(const float* from, int dims, float* to) { unzip_outputs(from, dims, to); }
  static void out_of_order(const float* from, int dims, float* to) { zip_outputs(from, dims, to); }
};

// int8 keys and values:
struct Bytes {
  static constexpr int kKeyDims = kCodeK, kOutputs = kCodeK;
  template <int G>
  using Passing = PassingBytes<G>;

  static void load_block(Block& b) { load_query_bytes(b); }
  static bool place(Block& b, Rows& rows, int tile) {
    place_bytes(b, rows, tile);
    return true;
  }
  static void load_few(Few& f) { load_query_bytes(f); }
  static void run_few_tile(Few& f, int64_t base) { run_bytes_tile(f, base); }
  static void in_order(const float* from, int dims, float* to) { order_outputs(from, dims, to); }
  static void out_of_order(const float* from, int dims, float* to) { disorder_outputs(from, dims, to); }
};

template <class Format>
struct ByTiles {
  static constexpr int kRows = kMostRows;
  Scratch s;
  TileShapes shapes;
  FlushedSmall small;
  bool prepare(const AttendArgs& args) { return carve_scratch(args, s); }
  void run(const AttendArgs& args, const Taken& at, const Taken& then) {
    if (at.work->num_tokens * at.of.count > kLanes) return run_block<Format>(args, *at.work, at.of, s);
    if (!then.work) return run_few<Format>(args, *at.work, at.of, s, nullptr);
    Coming coming(args, *then.work, then.of);
    ask_for_rows(args, *then.work, then.of, coming.item);
    run_few<Format>(args, *at.work, at.of, s, &coming);
  }
  void share(const AttendArgs& args, const SharedItem& work, const Heads& of) {
    work.num_tokens * of.count <= kLanes ? share_few<Format>(args, work, of, s) : share_block<Format>(args, work, of, s);
  }
};
static_assert(kSplitRows <= kLanes, "blocks that are split over their keys have few rows");

// Of the layout and the dtype alone, so that all rows of a layer have one law.
inline bool are_pairs(const AttendArgs& args) { return args.dtype == kBF16 && args.layout.k.format == kBF16 && args.layout.v.format == kBF16; }

}  // namespace tiles
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
