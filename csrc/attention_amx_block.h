// What a thread works with on AMX: a block's groups of rows, a stretch of keys, and how they pass it.
#pragma once
#include "attention_amx_rows.h"
#include "thread_memory.h"

#if defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace tiles {

constexpr float kSlack = 8.0f;
constexpr int kMostRows = 1536, kGroups = kMostRows / kLanes;  // query rows of one work item: many, since its values are transposed for it alone
static_assert(kSplitRows <= kLanes, "a block that is split is a single group");

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
                           {&s.keys, kPartKeys * k_steps * 16},
                           {&s.values, out * kPartSteps},
                           {&s.scores, 2 * kScores},
                           {&s.pairs, 2 * kPartTiles * kPairs},
                           {&s.out, kGroups * out},
                           {&s.total, kGroups * out},
                           {&s.rest, kGroups * kLanes * 4},
                           {&s.apart, out},
                           {&s.zeros, zero_floats(args)}};
  if (!carve(memory, wanted)) return false;
  memset(s.zeros, 0, size_t(zero_floats(args)) * 4);
  return true;
}

// Tiles of keys that are placed, and which of them have only finite values.
struct Stretch {
  int64_t base;
  int tiles;
  uint32_t finite;
};

// The keys lo..hi-1 of the tile at `base` that a token sees.
struct Seen {
  int lo, hi;
};
QUIRE_INLINE Seen seen_by(const Item& item, int token, int64_t base) {
  return {clip(item.first_key(token) - base, kTile), clip(item.position(token) + 1 - base, kTile)};
}

QUIRE_INLINE Span span_of(const Block& b, int first_group, int last_group, int64_t base) {
  const Seen first = seen_by(b.item, b.groups[first_group].first_token, base), last = seen_by(b.item, b.groups[last_group].last_token, base);
  return {first.lo / kTileK, (last.hi + kTileK - 1) / kTileK};
}
QUIRE_INLINE bool all_seen(const Item& item, const Group& group, Span span, int64_t base) {
  return seen_by(item, group.last_token, base).lo <= span.first * kTileK && seen_by(item, group.first_token, base).hi >= span.end * kTileK;
}

// The largest of each row's scores; where they are not to be used as they are, shapes them first, and sets those of unseen keys to -inf.
inline F32x16 largest_scores(const Block& b, int group, Span span, int64_t base, float* scores) {
  const Group& g = b.groups[group];
  const F32x16 none = set1(-__builtin_inff());
  F32x16 top[2] = {none, none};  // max() gives its second operand where the first is NaN, so these never are
  if (b.factor != 0.0f && all_seen(b.item, g, span, base)) {
    for (int key = span.first * kTileK; key < span.end * kTileK; key += 2) {
      top[0] = max(load(scores + key * kLanes), top[0]);
      top[1] = max(load(scores + (key + 1) * kLanes), top[1]);
    }
    return max(top[0], top[1]);
  }
  float lo[kLanes], hi[kLanes];
  int token = g.first_token, left = (token + 1) * b.item.heads - group * kLanes;  // rows of this token
  Seen seen = seen_by(b.item, token, base);
  for (int r = 0; r < kLanes; ++r, --left) {
    if (left == 0 && token < g.last_token) {  // lanes without a row see what the last row sees
      seen = seen_by(b.item, ++token, base);
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

// The tiles after a stretch, whose lines are asked for while it is computed.
struct Ahead {
  Item& item;
  const char* zeros;
  int64_t base, end;
  Fetcher fetcher;
};
// Another tile, if the lines of the last one have all been asked for.
QUIRE_INLINE void go_on(Ahead& a) {
  if (a.fetcher.run != a.fetcher.end_run || a.base >= a.end) return;
  Rows& rows = a.item.tiles[a.base / kTile % 2];
  if (locate_tile(a.item, a.base, a.zeros, rows)) {
    a.fetcher.run = rows.runs;
    a.fetcher.end_run = rows.runs + rows.num_runs;
  }
  a.base += kTile;
}

// G groups that pass a stretch together, and the steps of it whose values are still to be added to their outputs.
template <int G>
struct Passing {
  Block& b;
  int group;
  Ahead& ahead;
  int lines;  // asked for with each step of outputs, in 1/256
  Span waiting = {0, 0};

  State& part(int g) { return b.groups[group + g].part; }
  uint32_t* pairs(int g) { return (uint32_t*)b.s.pairs + g * kPartTiles * kPairs; }

  void add_outputs() {
    if (waiting.first == waiting.end) return;
    float* const outs[] = {part(0).out, part(G - 1).out};
    const bool fresh[] = {part(0).fresh, part(G - 1).fresh};
    output_groups<G>(b.x, waiting, pairs(0), outs, fresh, ahead.fetcher, lines);
    for (int g = 0; g < G; ++g) part(g).fresh = false;
    waiting = {0, 0};
  }

  // Scores of one group and the stretch's tile `tile` at `base` to probabilities. Where its base has to follow them, what it has so far shrinks.
  void settle(int g, int tile, Span span, int64_t base, const char* const* next_keys) {
    State& state = part(g);
    float* const scores = b.s.scores + g * kScores;
    const F32x16 none = set1(-__builtin_inff()), factor = set1(b.factor == 0.0f ? 1.0f : b.factor);
    const F32x16 wanted = fma(largest_scores(b, group + g, span, base, scores), factor, set1(0.5f)), before = load(state.base);
    const Mask16 grown = gt(wanted, add(before, set1(kSlack)));
    const F32x16 now = select(grown, wanted, before), finite = select(eq(now, none), zero(), now);
    if (mask_bits(grown) != 0) {
      add_outputs();
      const F32x16 shrink = select(grown, exp2_nonpositive(sub(before, finite)), set1(1.0f));
      store(state.base, now);
      store(state.sum, mul(load(state.sum), shrink));
      for (float *at = state.out, *const end = at + (state.fresh ? 0 : b.out_floats()); at < end; at += kLanes) store(at, mul(load(at), shrink));
    }
    const F32x16 sum = probabilities(span, scores, factor, sub(zero(), finite), pairs(g) + tile * kPairs, next_keys, b.x.k_steps);
    store(state.sum, add(load(state.sum), sum));
  }

  // Where some value of the tile is not finite, a row must not meet those it does not see: for each token the others are zeros.
  void add_apart(int g, int tile, Span span, int64_t base) {
    const State& state = part(g);
    const Group& own = b.groups[group + g];
    const char* const zeros = (const char*)b.s.zeros;
    const int64_t size = b.out_floats();
    const Span steps{tile * kSteps + span.first, tile * kSteps + span.end};
    for (int token = own.first_token; token <= own.last_token; ++token) {
      const Seen seen = seen_by(b.item, token, base);
      Rows rows;
      locate_tile(b.item, base, zeros, rows);
      for (int j = rows.lo; j < rows.hi; ++j)
        if (j < seen.lo || j >= seen.hi) rows.v[j] = zeros;
      place_values(rows, b.args().layout.v.dim, b.x.v_tiles, (uint32_t*)b.s.values + tile * kSteps * kTileFloats, ahead.fetcher, 0);
      if (!state.fresh) memcpy(b.s.apart, state.out, size_t(size) * 4);
      output_groups<1>(b.x, steps, pairs(g), &b.s.apart, &state.fresh, ahead.fetcher, 0);
      const int begin = token * b.item.heads - (group + g) * kLanes, end = token == own.last_token ? kLanes : begin + b.item.heads;
      const Mask16 lanes = lanes_between(clip(begin, kLanes), clip(end, kLanes));
      for (int64_t i = 0; i < size; i += kLanes) store(state.out + i, select(lanes, load(b.s.apart + i), load(state.out + i)));
    }
  }

  void pass(const Stretch& at, int lines_of_scores) {
    for (int tile = 0; tile < at.tiles; ++tile) {
      const int64_t base = at.base + tile * kTile;
      const Span span = span_of(b, group, group + G - 1, base);
      if (span.first >= span.end) continue;
      go_on(ahead);
      const char* const* keys = b.x.keys + tile * (kTile / 16);
      score_groups<G>(b.x, keys, span, b.queries(group), b.s.scores, ahead.fetcher, lines_of_scores);
      for (int g = 0; g < G; ++g) settle(g, tile, span, base, G == 2 && tile + 1 < at.tiles ? keys + kTile / 16 + 2 * g : nullptr);
      if (at.finite >> tile & 1u) {
        if (waiting.first == waiting.end) waiting.first = tile * kSteps + span.first;
        waiting.end = tile * kSteps + span.end;
        continue;
      }
      add_outputs();
      for (int g = 0; g < G; ++g) add_apart(g, tile, span, base);
      for (int g = 0; g < G; ++g) part(g).fresh = false;
    }
    add_outputs();
  }
};

}  // namespace tiles
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
