// Attention of bf16 queries over bf16 keys and values on AMX. The law of a row, for any number of rows:
//
//   score  sums of q . k as tiles add them (tiles_amx.h), 32 dimensions at a time
//   base   for each stretch of 128 keys: its largest score + 1/2, if that is more than 8 above the base so far; then the row's sums shrink
//   p      2^(score - base + 1/2), rounded to bf16; exactly 0 for a key that the row does not see
//   sum    of the rounded p, those of even keys and of odd ones apart, then both together, stretch by stretch
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

struct Block {
  Item& item;
  Scratch& s;
  Operands x;
  int groups;
  float factor;  // of scores; 0 where a factor is not all that shapes them
  bool finite;   // all values of the stretch are
  State part[kGroups], total[kGroups];

  const AttendArgs& args() const { return item.args; }
  int64_t out_floats() const { return int64_t(x.v_tiles) * kTileFloats; }
  const char* queries(int group) const { return (const char*)(s.queries + group * x.k_steps * kTileFloats); }
  int first_token(int group) const { return group * kLanes / item.heads; }
  int last_token(int group) const {
    const int last = group * kLanes + kLanes - 1;
    return (last < item.rows() ? last : item.rows() - 1) / item.heads;
  }
};

inline bool carve_scratch(const AttendArgs& args, Scratch& s) {
  static thread_local ThreadMemory memory;
  const int64_t k_steps = round_up(args.layout.k.dim, kTileK) / kTileK, out = round_up(args.layout.v.dim, 32) * kLanes;
  const Wanted wanted[] = {{&s.queries, kGroups * k_steps * kTileFloats},
                           {&s.keys, kStretch * k_steps * 16},
                           {&s.values, out * kSteps},
                           {&s.scores, 2 * kScores},
                           {&s.pairs, 2 * kPairs},
                           {&s.out, kGroups * out},
                           {&s.total, kGroups * out},
                           {&s.rest, kGroups * kLanes * 4},
                           {&s.apart, out},
                           {&s.zeros, zero_floats(args)}};
  if (!carve(memory, wanted)) return false;
  memset(s.zeros, 0, size_t(zero_floats(args)) * 4);
  return true;
}

// The keys lo..hi-1 of the stretch at `base` that a token sees.
struct Seen {
  int lo, hi;
};
QUIRE_INLINE Seen seen_by(const Item& item, int token, int64_t base) {
  return {clip(item.first_key(token) - base, kStretch), clip(item.position(token) + 1 - base, kStretch)};
}
QUIRE_INLINE Span span_of(const Block& b, int first_group, int last_group, int64_t base) {
  const Seen first = seen_by(b.item, b.first_token(first_group), base), last = seen_by(b.item, b.last_token(last_group), base);
  return {first.lo / kTileK, (last.hi + kTileK - 1) / kTileK};
}
QUIRE_INLINE bool all_seen(const Block& b, int group, Span span, int64_t base) {
  return seen_by(b.item, b.last_token(group), base).lo <= span.first * kTileK && seen_by(b.item, b.first_token(group), base).hi >= span.end * kTileK;
}

// The largest of each row's scores; where they are not to be used as they are, shapes them first, and sets those of unseen keys to -inf.
inline F32x16 largest_scores(const Block& b, int group, Span span, int64_t base, float* scores) {
  const F32x16 none = set1(-__builtin_inff());
  F32x16 top[2] = {none, none};  // max() gives its second operand where the first is NaN, so these never are
  if (b.factor != 0.0f && all_seen(b, group, span, base)) {
    for (int key = span.first * kTileK; key < span.end * kTileK; key += 2) {
      top[0] = max(load(scores + key * kLanes), top[0]);
      top[1] = max(load(scores + (key + 1) * kLanes), top[1]);
    }
    return max(top[0], top[1]);
  }
  float lo[kLanes] = {}, hi[kLanes];
  for (int r = 0; r < kLanes; ++r) {
    hi[r] = kStretch;
    if (group * kLanes + r >= b.item.rows()) continue;
    const Seen seen = seen_by(b.item, (group * kLanes + r) / b.item.heads, base);
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
inline void settle(Block& b, int group, Span span, int64_t base, float* scores, uint32_t* pairs) {
  State& part = b.part[group];
  const F32x16 none = set1(-__builtin_inff()), factor = set1(b.factor == 0.0f ? 1.0f : b.factor);
  const F32x16 wanted = fma(largest_scores(b, group, span, base, scores), factor, set1(0.5f));
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
  store(part.sum, add(sum, probabilities(span, scores, factor, sub(zero(), finite), pairs)));
}

// Where some value is not finite, a row must not meet those it does not see: for each token the others are zeros.
inline void output_apart(const Block& b, int group, Span span, int64_t base, const uint32_t* pairs) {
  const State& part = b.part[group];
  const int64_t size = b.out_floats();
  Fetcher nothing{};
  for (int token = b.first_token(group); token <= b.last_token(group); ++token) {
    const Seen seen = seen_by(b.item, token, base);
    for (const Rows& rows : b.item.tiles) {
      const int first_key = int(rows.base - base);
      if (rows.base < base || first_key >= kStretch || rows.first_token >= rows.end_token) continue;
      Rows own = rows;
      for (int j = rows.lo; j < rows.hi; ++j)
        if (first_key + j < seen.lo || first_key + j >= seen.hi) own.v[j] = (const char*)b.s.zeros;
      place_values(own, first_key, b.args().layout.v.dim, b.x.v_tiles, (uint32_t*)b.s.values, nothing, 0);
    }
    if (!part.fresh) memcpy(b.s.apart, part.out, size_t(size) * 4);
    output_groups<1>(b.x, span, pairs, &b.s.apart, &part.fresh, nothing, 0);
    const int begin = token * b.item.heads - group * kLanes, end = token == b.last_token(group) ? kLanes : begin + b.item.heads;
    const Mask16 lanes = lanes_between(clip(begin, kLanes), clip(end, kLanes));
    for (int64_t i = 0; i < size; i += kLanes) store(part.out + i, select(lanes, load(b.s.apart + i), load(part.out + i)));
  }
}

// Lines of the next stretch that are asked for in this one, in 1/256: with few rows in proportion to the time that each phase takes.
struct Rates {
  int values, scores, outputs;
};
inline Rates rates_of(const Block& b, int groups) {
  const int lines = 2 * 256 * tile_lines(b.args().layout), calls = kSteps * b.x.k_steps;
  if (groups > 1) return {0, lines / (groups / 2 * calls) + 1, 0};
  return {lines / 2 / (kSteps * b.x.v_tiles), lines / 4 / calls, lines / 4 / (kSteps * b.x.v_tiles / 2) + 1};
}

template <int G>
void pass_groups(Block& b, int group, int64_t base, const Rates& rates, Fetcher& fetcher) {
  Scratch& s = b.s;
  const Span span = span_of(b, group, group + G - 1, base);
  score_groups<G>(b.x, span, b.queries(group), s.scores, fetcher, rates.scores);
  for (int g = 0; g < G; ++g) settle(b, group + g, span, base, s.scores + g * kScores, (uint32_t*)s.pairs + g * kPairs);
  if (b.finite) {
    float* const outs[] = {b.part[group].out, b.part[group + G - 1].out};
    const bool fresh[] = {b.part[group].fresh, b.part[group + G - 1].fresh};
    output_groups<G>(b.x, span, (const uint32_t*)s.pairs, outs, fresh, fetcher, rates.outputs);
  }
  for (int g = 0; g < G; ++g) {
    if (!b.finite) output_apart(b, group + g, span, base, (const uint32_t*)s.pairs + g * kPairs);
    b.part[group + g].fresh = false;
  }
}

// Places a stretch of keys and passes all groups that see any of it.
inline void run_stretch(Block& b, int64_t base) {
  Item& item = b.item;
  const AttendArgs& args = b.args();
  const char* const zeros = (const char*)b.s.zeros;
  const Rows* tiles[2];
  int found = 0, ahead = 0;
  for (int64_t at = base; at < base + kStretch; at += kTile)
    if (locate_tile(item, at, zeros)) tiles[found++] = &item.tile(at);
  if (found == 0) return;
  const int first = tiles[0]->first_token * item.heads / kLanes, end = (tiles[found - 1]->end_token * item.heads + kLanes - 1) / kLanes;
  Fetcher fetcher{};
  for (int64_t at = base + kStretch; at < base + 2 * kStretch; at += kTile) {
    if (!locate_tile(item, at, zeros)) continue;
    const Rows& next = item.tile(at);
    (ahead == 0 ? fetcher.run : fetcher.later) = next.runs;
    (ahead++ == 0 ? fetcher.end_run : fetcher.end_later) = next.runs + next.num_runs;
  }
  const Rates rates = rates_of(b, end - first);
  b.finite = true;
  for (int i = 0; i < found; ++i) {
    const int first_key = int(tiles[i]->base - base);
    place_keys(*tiles[i], first_key, args.layout.k.dim, (char*)b.s.keys, b.x);
    if (!place_values(*tiles[i], first_key, args.layout.v.dim, b.x.v_tiles, (uint32_t*)b.s.values, fetcher, rates.values)) b.finite = false;
  }
  int group = first;
  for (; group + 2 <= end; group += 2) pass_groups<2>(b, group, base, rates, fetcher);
  if (group < end) pass_groups<1>(b, group, base, rates, fetcher);
}

inline void start_totals(Block& b) {
  const AttendArgs& args = b.args();
  for (int g = 0; g < b.groups; ++g) {
    State& total = b.total[g];
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
  Block b{item, s, {{}, {}, (const uint32_t*)s.values, k_steps, v_tiles}, (rows + kLanes - 1) / kLanes, plain ? args.scale * kLog2E : 0.0f, true, {}, {}};
  for (int g = 0; g < b.groups; ++g) {
    float* const rest = s.rest + g * 4 * kLanes;
    b.part[g] = {s.out + g * b.out_floats(), rest, rest + kLanes, true};
    b.total[g] = {s.total + g * b.out_floats(), rest + 2 * kLanes, rest + 3 * kLanes, true};
  }
  load_queries(item, k_steps, (uint32_t*)s.queries);
  const int64_t stride = rows * partial_stride(at.v.dim);
  float* const partials = work.num_splits > 1 ? args.partials + work.partials + head_index * work.num_parts * stride : nullptr;
  if (!partials) start_totals(b);
  for (int32_t part = work.first_part; part < work.end_part; ++part) {
    for (int g = 0; g < b.groups; ++g) b.part[g].fresh = true;
    const KeyRange keys = keys_of_part(item, part);
    for (int64_t base = keys.begin / kStretch * kStretch; base < keys.end; base += kStretch) run_stretch(b, base);
    for (int g = 0; g < b.groups; ++g) {
      if (partials)
        store_part(b.part[g], rows, v_tiles, partials + (part - work.block_first_part) * stride);
      else if (!b.part[g].fresh)
        merge_group(b.part[g], kLanes, v_tiles, b.total[g]);
    }
  }
  if (partials) {
    if (__atomic_add_fetch(args.counters + work.counter + head_index, 1, __ATOMIC_ACQ_REL) < work.num_splits) return;
    start_totals(b);
    for (int32_t i = 0; i < work.num_parts; ++i) {
      float *const out = partials + i * stride, *const base = out + 16 * v_tiles * rows, *const sum = base + rows;
      if (*sum == -1.0f) continue;
      State part{out, base, sum, false};
      merge_group(part, rows, v_tiles, b.total[0]);
    }
  }
  for (int g = 0; g < b.groups; ++g) write_group(item, g * kLanes, b.total[g], v_tiles);
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
