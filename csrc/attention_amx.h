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
#include "attention_amx_rows.h"
#include "thread_memory.h"

#if defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace tiles {

constexpr float kSlack = 8.0f;
constexpr int kGroups = kBlockRows / kLanes;
static_assert(kBlockRows % kLanes == 0 && kSplitRows <= kLanes, "blocks are whole groups, and one that is split is a single one");

struct Scratch {
  float *queries, *keys, *values, *scores, *pairs, *out, *total, *rest, *apart, *zeros;
};

struct Group {
  int first_token, last_token;
  State part, total;
};

struct Block {
  Item& item;
  Scratch& s;
  Operands x;
  int num_groups;
  float factor;  // of scores; 0 where a factor is not all that shapes them
  Group groups[kGroups];

  const AttendArgs& args() const { return item.args; }
  int64_t out_floats() const { return int64_t(x.v_tiles) * kTileFloats; }
  const char* queries(int group) const { return (const char*)(s.queries + group * x.k_steps * kTileFloats); }
};

inline bool carve_scratch(const AttendArgs& args, Scratch& s) {
  static thread_local ThreadMemory memory;
  const int64_t k_steps = round_up(args.layout.k.dim, kTileK) / kTileK, out = round_up(args.layout.v.dim, 32) * kLanes;
  const Wanted wanted[] = {{&s.queries, kGroups * k_steps * kTileFloats},
                           {&s.keys, kTile * k_steps * 16},
                           {&s.values, out * kSteps},
                           {&s.scores, kScores},
                           {&s.pairs, kPairs},
                           {&s.out, kGroups * out},
                           {&s.total, kGroups * out},
                           {&s.rest, kGroups * kLanes * 4},
                           {&s.apart, out},
                           {&s.zeros, zero_floats(args)}};
  if (!carve(memory, wanted)) return false;
  memset(s.zeros, 0, size_t(zero_floats(args)) * 4);
  return true;
}

// The keys lo..hi-1 of the tile at `base` that a token sees.
struct Seen {
  int lo, hi;
};
QUIRE_INLINE Seen seen_by(const Item& item, int token, int64_t base) {
  return {clip(item.first_key(token) - base, kTile), clip(item.position(token) + 1 - base, kTile)};
}

// What a group sees of the tile at `base`; `whole`: each of its rows sees all keys of the span.
struct View {
  int64_t base;
  int group;
  Span span;
  bool whole;
};
inline View view_of(const Block& b, int group, int64_t base) {
  const Seen first = seen_by(b.item, b.groups[group].first_token, base), last = seen_by(b.item, b.groups[group].last_token, base);
  const Span span{first.lo / kTileK, (last.hi + kTileK - 1) / kTileK};
  return {base, group, span, last.lo <= span.first * kTileK && first.hi >= span.end * kTileK};
}

// The largest of each row's scores; where they are not to be used as they are, shapes them first, and sets those of unseen keys to -inf.
inline F32x16 largest_scores(const Block& b, const View& view) {
  float* const scores = b.s.scores;
  const Span span = view.span;
  const F32x16 none = set1(-__builtin_inff());
  F32x16 top[2] = {none, none};  // max() gives its second operand where the first is NaN, so these never are
  if (b.factor != 0.0f && view.whole) {
    for (int key = span.first * kTileK; key < span.end * kTileK; key += 2) {
      top[0] = max(load(scores + key * kLanes), top[0]);
      top[1] = max(load(scores + (key + 1) * kLanes), top[1]);
    }
    return max(top[0], top[1]);
  }
  float lo[kLanes], hi[kLanes];
  int token = b.groups[view.group].first_token, left = (token + 1) * b.item.heads - view.group * kLanes;  // rows of this token
  Seen seen = seen_by(b.item, token, view.base);
  for (int r = 0; r < kLanes; ++r, --left) {
    if (left == 0 && token < b.groups[view.group].last_token) {  // lanes without a row see what the last row sees
      seen = seen_by(b.item, ++token, view.base);
      left = b.item.heads;
    }
    lo[r] = float(seen.lo);
    hi[r] = float(seen.hi);
  }
  const F32x16 first = load(lo), last = load(hi);
  for (int key = span.first * kTileK; key < span.end * kTileK; ++key) {
    const F32x16 at = set1(float(key));
    F32x16 x = load(scores + key * kLanes);
    if (b.factor == 0.0f) x = shape_score(x, b.args().scale, b.args().softcap);
    x = select(gt(last, at), select(gt(first, at), none, x), none);
    store(scores + key * kLanes, x);
    top[0] = max(x, top[0]);
  }
  return top[0];
}

// A group's scores to probabilities. Where its base has to follow them, what it has so far shrinks.
inline void settle(Block& b, const View& view) {
  State& part = b.groups[view.group].part;
  const F32x16 none = set1(-__builtin_inff()), factor = set1(b.factor == 0.0f ? 1.0f : b.factor);
  const F32x16 wanted = fma(largest_scores(b, view), factor, set1(0.5f));
  const F32x16 before = part.fresh ? none : load(part.base);
  const Mask16 grown = gt(wanted, add(before, set1(kSlack)));
  const F32x16 now = select(grown, wanted, before), finite = select(eq(now, none), zero(), now);
  F32x16 sum = part.fresh ? zero() : load(part.sum);
  if (mask_bits(grown) != 0 && !part.fresh) {
    const F32x16 shrink = select(grown, exp2_nonpositive(sub(before, finite)), set1(1.0f));
    sum = mul(sum, shrink);
    for (float *at = part.out, *const end = at + b.out_floats(); at < end; at += kLanes) store(at, mul(load(at), shrink));
  }
  store(part.base, now);
  const int lines = part.fresh || b.num_groups == 1 ? 0 : b.x.v_tiles / kSteps;
  store(part.sum, add(sum, probabilities(view.span, b.s.scores, factor, sub(zero(), finite), (uint32_t*)b.s.pairs, part.out, lines)));
}

// Where some value is not finite, a row must not meet those it does not see: for each token the others are zeros.
inline void output_apart(Block& b, const View& view) {
  const Rows& rows = b.item.tile(view.base);
  const State& part = b.groups[view.group].part;
  const int64_t size = b.out_floats();
  Fetcher nothing{};
  for (int token = b.groups[view.group].first_token; token <= b.groups[view.group].last_token; ++token) {
    const Seen seen = seen_by(b.item, token, view.base);
    Rows own = rows;
    for (int j = rows.lo; j < rows.hi; ++j)
      if (j < seen.lo || j >= seen.hi) own.v[j] = (const char*)b.s.zeros;
    place_values(own, b.args().layout.v.dim, b.x.v_tiles, (uint32_t*)b.s.values, nothing, 0);
    if (!part.fresh) memcpy(b.s.apart, part.out, size_t(size) * 4);
    output_group(b.x, view.span, (const uint32_t*)b.s.pairs, b.s.apart, part.fresh, nothing, 0);
    const int begin = token * b.item.heads - view.group * kLanes, end = token == b.groups[view.group].last_token ? kLanes : begin + b.item.heads;
    const Mask16 lanes = lanes_between(clip(begin, kLanes), clip(end, kLanes));
    for (int64_t i = 0; i < size; i += kLanes) store(part.out + i, select(lanes, load(b.s.apart + i), load(part.out + i)));
  }
}

// Lines of the next tile that are asked for in this one, in 1/256: with few rows in proportion to the time that each phase takes.
struct Rates {
  int values, scores, outputs;
};
inline Rates rates_of(const Block& b, int groups) {
  const int lines = 256 * tile_lines(b.args().layout), calls = kSteps * b.x.k_steps;
  if (groups > 1) return {0, lines / (groups * calls) + 1, 0};
  return {lines / 2 / (kSteps * b.x.v_tiles), lines / 4 / calls, lines / 4 / (kSteps * b.x.v_tiles / 2) + 1};
}

// A tile of keys passes all groups that see any of it.
inline void run_tile(Block& b, int64_t base) {
  Item& item = b.item;
  const PageLayout& at = b.args().layout;
  const char* const zeros = (const char*)b.s.zeros;
  if (!locate_tile(item, base, zeros)) return;
  const Rows& rows = item.tile(base);
  Fetcher fetcher = fetch_tile(item, base + kTile, zeros, {});
  const int first = rows.first_token * item.heads / kLanes, end = (rows.end_token * item.heads + kLanes - 1) / kLanes;
  const Rates rates = rates_of(b, end - first);
  place_keys(rows, at.k.dim, (char*)b.s.keys, b.x);
  const bool finite = place_values(rows, at.v.dim, b.x.v_tiles, (uint32_t*)b.s.values, fetcher, rates.values);
  for (int group = first; group < end; ++group) {
    const View view = view_of(b, group, base);
    State& part = b.groups[group].part;
    score_group(b.x, view.span, b.queries(group), b.s.scores, fetcher, rates.scores);
    settle(b, view);
    if (finite)
      output_group(b.x, view.span, (const uint32_t*)b.s.pairs, part.out, part.fresh, fetcher, rates.outputs);
    else
      output_apart(b, view);
    part.fresh = false;
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
    for (int g = 0; g < b.num_groups; ++g) b.groups[g].part.fresh = true;
    const KeyRange keys = keys_of_part(item, part);
    for (int64_t base = keys.begin / kTile * kTile; base < keys.end; base += kTile) run_tile(b, base);
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
