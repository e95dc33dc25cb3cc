// One work item of attention: a block of query rows (tokens x query heads of one KV head) of one sequence, which keys each of
// its rows sees, and what a score becomes. How rows and keys lie in scratch concerns only those who compute with them.
#pragma once
#include "attention_rows.h"
#include "elements.h"
#include "kernels.h"
#include "simd_math.h"

namespace quire {
namespace QUIRE_ISA {
namespace {

constexpr int kSplitRows = 16;  // query rows of a work item that is split over its keys, at most

constexpr float kLog2E = 1.44269504088896341f;

QUIRE_INLINE int clip(int64_t x, int hi) { return x < 0 ? 0 : x > hi ? hi : int(x); }
QUIRE_INLINE int64_t round_up(int64_t x, int64_t to = 16) { return (x + to - 1) / to * to; }

struct Item {
  const AttendArgs& args;
  History from;
  const int32_t* tokens;               // of a shared item: its query tokens' places in the step; all of them see all keys
  int64_t packed_token;                // else the first one's place
  int32_t first_position, num_tokens;  // its absolute position
  int32_t heads, first_head;           // query heads of this item
  Rows tiles[2];                       // the one at hand and the next

  int rows() const { return num_tokens * heads; }
  int64_t place(int token) const { return tokens ? tokens[token] : packed_token + token; }
  const char* query(int row) const {
    return (const char*)args.q + place(row / heads) * args.q_token_stride + (first_head + row % heads) * args.q_head_stride;
  }
  // In elements of q's dtype.
  int64_t out(int row) const { return (place(row / heads) * args.num_heads + first_head + row % heads) * args.layout.v.dim; }
  int32_t position(int token) const { return tokens ? first_position : first_position + token; }
  // The first key a token sees; never falls from one token to the next.
  int32_t first_key(int token) const {
    const int32_t at = position(token);
    int32_t first = args.window > 0 && at >= args.window ? at - args.window + 1 : 0;
    if (args.chunk > 0 && at / args.chunk * args.chunk > first) first = at / args.chunk * args.chunk;
    return first;
  }
};

inline History history_of(const AttendArgs& args, int32_t seq, int32_t kv_head) {
  const Staged& staged = args.staged;
  const int64_t start = args.query_start[seq];
  return {&args.layout,
          (const char*)staged.k + start * staged.k_token_stride + kv_head * staged.k_head_stride,
          (const char*)staged.v + start * staged.v_token_stride + kv_head * staged.v_head_stride,
          staged.k_token_stride,
          staged.v_token_stride,
          args.page_ids + args.page_start[seq],
          args.num_committed[seq],
          kv_head};
}

// A slice of the query heads: those of one KV head, or some of them where they are many. `slice` counts them over all KV heads.
struct Heads {
  int32_t slice, kv_head, first, count;
};

inline Item item_of(const AttendArgs& args, const WorkItem& work, const Heads& of) {
  const History history = history_of(args, work.seq, of.kv_head);
  const int64_t place = args.query_start[work.seq] + work.first_token;
  return {args, history, nullptr, place, history.num_committed + work.first_token, work.num_tokens, of.count, of.first, {}};
}

inline Item item_of(const AttendArgs& args, const SharedItem& work, const Heads& of) {
  const int32_t* const tokens = args.shared_tokens + work.first_token;
  const int32_t last_key = work.part * kPartKeys + work.keys - 1;
  return {args, history_of(args, work.seq, of.kv_head), tokens, 0, last_key, work.num_tokens, of.count, of.first, {}};
}

// Where the rows of a shared item leave their states.
inline float* states_of(const AttendArgs& args, const SharedItem& work, const Heads& of) {
  return args.states + work.states + int64_t(of.slice) * work.num_tokens * of.count * state_floats(args.layout.v.dim);
}

// What the rows of a block have of a part already: their states after its first keys, if there are any.
struct Beginning {
  const float* states;
  int32_t keys;
};
inline Beginning beginning_of(const AttendArgs& args, const WorkItem& work, const Heads& of, int32_t part) {
  const Begun begun = work.begun < 0 ? Begun{-1, 0} : args.begun[work.begun + part - work.block_first_part];
  if (begun.shared < 0) return {nullptr, 0};
  const SharedItem& shared = args.shared[begun.shared];
  return {states_of(args, shared, of) + int64_t(begun.token) * of.count * state_floats(args.layout.v.dim), shared.keys};
}

// A work item's parts, one after the other. Where its block is split they are left for whichever of its items finishes last: that one merges them,
// in order. `rows` are the item's in scratch, whose own start_totals, run_part, save_part, begin_part, merge_part and write_out do the work.
template <class InScratch>
void run_parts(const AttendArgs& args, const WorkItem& work, const Heads& of, InScratch& rows) {
  const int64_t stride = rows.item.rows() * state_floats(args.layout.v.dim);
  float* const partials = work.num_splits > 1 ? args.partials + work.partials + of.slice * work.num_parts * stride : nullptr;
  if (!partials) start_totals(rows);
  for (int32_t part = work.first_part; part < work.end_part; ++part) {
    run_part(rows, part, beginning_of(args, work, of, part));
    partials ? save_part(rows, partials + (part - work.block_first_part) * stride) : merge_part(rows);
  }
  if (partials) {
    if (__atomic_add_fetch(args.counters + work.counter + of.slice, 1, __ATOMIC_ACQ_REL) < work.num_splits) return;
    start_totals(rows);
    for (int32_t i = 0; i < work.num_parts; ++i) {
      begin_part(rows, partials + i * stride);
      merge_part(rows);
    }
  }
  write_out(rows);
}

// Finds the rows of the tile at `base` that some token of the item sees; false if there are none.
inline bool locate_tile(const Item& item, int64_t base, const char* zeros, Rows& rows) {
  if (rows.base == base) return rows.first_token < rows.end_token;
  const int first = clip(base - item.first_position, item.num_tokens);
  int end = item.num_tokens;
  while (end > first && item.first_key(end - 1) >= base + kTile) --end;
  rows.base = base;
  rows.first_token = first;
  rows.end_token = end;
  if (first >= end) return false;
  const int lo = clip(item.first_key(first) - base, kTile), hi = clip(item.position(end - 1) + 1 - base, kTile);
  locate(item.from, base, lo, hi, zeros, rows);
  return true;
}

// Some keys: of a part, those from the first that some token sees, or that is not begun, to the last.
struct KeyRange {
  int64_t begin, end;
};
inline KeyRange keys_of_part(const Item& item, int64_t part, int32_t begun = 0) {
  const int64_t first = item.first_key(0), end = item.position(item.num_tokens - 1) + 1, part_end = (part + 1) * kPartKeys;
  const int64_t begin = part * kPartKeys + begun;
  return {first > begin ? first : begin, end < part_end ? end : part_end};
}

// A work item of some query heads; none where `work` is null.
struct Taken {
  const WorkItem* work;
  Heads of;
};

// What a thread does after the item at hand, and the first key it meets, where states do not have all of them: lines are asked for in time.
struct Coming {
  Item item;
  int64_t first_key = 0, end = 0;

  Coming(const AttendArgs& args, const WorkItem& work, const Heads& of) : item(item_of(args, work, of)) {
    for (int32_t part = work.first_part; part < work.end_part && first_key >= end; ++part) {
      const KeyRange keys = keys_of_part(item, part, beginning_of(args, work, of, part).keys);
      first_key = keys.begin;
      end = keys.end;
    }
  }
};

// The tile at `base`, found; null if no token of the item sees it.
inline Rows* tile_at(Item& item, int64_t base, const char* zeros) {
  Rows& rows = item.tiles[base / kTile % 2];
  return locate_tile(item, base, zeros, rows) ? &rows : nullptr;
}

// What a thread meets at `base`: a tile of the item, whose keys it takes up to `end`, or, behind these, one of what is coming; null where that is not known.
inline Rows* tile_met(Item& item, int64_t base, int64_t end, Coming* coming, const char* zeros) {
  if (base < end) return tile_at(item, base, zeros);
  if (!coming || coming->first_key >= coming->end) return nullptr;
  const int64_t then = coming->first_key / kTile * kTile + (base - round_up(end, kTile));
  return then < coming->end ? tile_at(coming->item, then, zeros) : nullptr;
}

// Tiles from `base` up to `stop`, as tile_met has them, whose lines are asked for one after the other while others are computed.
struct TilesAhead {
  Item& item;
  Coming* coming;
  const char* zeros;
  int64_t base, stop, end;
  Fetcher fetcher;
};
// Another tile, if the lines of the last one have all been asked for.
QUIRE_INLINE void go_on(TilesAhead& a) {
  if (!a.fetcher.done() || a.base >= a.stop) return;
  if (const Rows* const rows = tile_met(a.item, a.base, a.end, a.coming, a.zeros)) a.fetcher = whole_tile(*rows);
  a.base += kTile;
}

// log2(e) times the score, scaled and softcapped.
QUIRE_INLINE F32x16 shape_score(F32x16 dot, float scale, float softcap) {
  if (softcap == 0.0f) return mul(dot, set1(scale * kLog2E));
  return mul(tanh(mul(dot, set1(scale / softcap))), set1(softcap * kLog2E));
}

// What a running maximum is subtracted as: a row whose scores are all -inf so far must give zeros, not NaN.
QUIRE_INLINE float finite_base(float max) { return max == -__builtin_inff() ? 0.0f : max; }

// log2(e) times the sink of query head `head`, and -inf where there are no sinks.
QUIRE_INLINE float sink_score(const AttendArgs& args, int head) {
  if (!args.sinks) return -__builtin_inff();
  float lanes[16];
  store(lanes, load_elements_n(args.sinks_dtype, (const char*)args.sinks + head * element_bytes(args.sinks_dtype), 1));
  return lanes[0] * kLog2E;
}

// A row of keys or values, whatever their format, that does not exist.
QUIRE_INLINE int64_t zero_floats(const AttendArgs& args) {
  return round_up(args.layout.k.dim > args.layout.v.dim ? args.layout.k.dim : args.layout.v.dim, 32);
}

// Cache lines that a tile's rows take, about.
QUIRE_INLINE int tile_lines(const PageLayout& at) { return kTile * (at.k.bytes + at.v.bytes) / kLine + 16; }

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
