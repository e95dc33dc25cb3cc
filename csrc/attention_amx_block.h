// More than sixteen query rows of one work item on AMX: groups of sixteen pass a part of the keys two by two.
//
//   part of 512 keys   K  placed (or where it lies)    V  transposed           once for all groups
//   two groups         scores, probabilities of one tile of 64 keys after the other ──> outputs over all of it ──> added to their totals
//
// So what two groups work with, probabilities and outputs of a part, stays in the nearest caches, and outputs in tiles for as long as no base grows.
#pragma once
#include "attention_amx_rows.h"
#include "thread_memory.h"

#if defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace tiles {

constexpr int kMostRows = 1536, kGroups = kMostRows / kLanes;  // query rows of one work item: many, since its values are transposed for it alone

// A thread's working memory, in floats.
struct Scratch {
  float *queries, *keys, *values, *scores, *pairs, *sums, *out, *total, *apart, *zeros;
};

inline bool carve_scratch(const AttendArgs& args, Scratch& s) {
  static thread_local ThreadMemory memory;
  const int64_t k_steps = round_up(args.layout.k.dim, kTileK) / kTileK, out = round_up(args.layout.v.dim, 32) * kLanes;
  const Wanted wanted[] = {{&s.queries, kGroups * k_steps * kTileFloats},
                           {&s.keys, kPartKeys * k_steps * 16},
                           {&s.values, out * kPartSteps},
                           {&s.scores, 2 * kScores},
                           {&s.pairs, 2 * kPartTiles * kPairs},
                           {&s.sums, 2 * kLanes * kLanes},
                           {&s.out, 2 * out},
                           {&s.total, kGroups * out},
                           {&s.apart, out},
                           {&s.zeros, zero_floats(args)}};
  if (!carve(memory, wanted)) return false;
  memset(s.zeros, 0, size_t(zero_floats(args)) * 4);
  return true;
}

struct Group {
  int first_token, last_token;
  Sums total;
};

struct Block {
  Item& item;
  Scratch& s;
  Operands x;
  float factor;
  float* states;  // of a shared item's rows, where they are left; else null
  int num_groups;
  Group groups[kGroups];

  const AttendArgs& args() const { return item.args; }
  int64_t out_floats() const { return int64_t(x.v_tiles) * kTileFloats; }
  const char* queries(int group) const { return (const char*)(s.queries + group * x.k_steps * kTileFloats); }
};

// The steps of the tile at `base` that any token of these groups sees.
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

// The tiles of the next part, whose lines are asked for while this one is computed.
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

// Tiles of keys that are placed, from `base` on, and which of them have only finite values.
struct Placed {
  int64_t base;
  int tiles;
  uint32_t finite;
};

// G groups that pass a part together.
template <int G>
struct Passing {
  Block& b;
  int group;
  Ahead& ahead;
  alignas(64) float base[G][kLanes];
  bool fresh = true;     // nothing is in the outputs yet
  Span waiting = {0, 0};  // steps whose values are still to be added to them

  float* out(int g) { return b.s.out + g * b.out_floats(); }
  float* sums(int g) { return b.s.sums + g * kLanes * kLanes; }
  uint32_t* pairs(int g) { return (uint32_t*)b.s.pairs + g * kPartTiles * kPairs; }

  void add_outputs() {
    if (waiting.first == waiting.end) return;
    float* const outs[] = {out(0), out(G - 1)};
    output_groups<G>(b.x, waiting, pairs(0), outs, fresh);
    fresh = false;
    waiting = {0, 0};
  }

  // Scores of one group and the part's tile `tile` at `at` to probabilities. Where its base has to follow them, what it has so far shrinks.
  void settle(int g, int tile, Span span, int64_t at, const char* const* next_keys) {
    float* const scores = b.s.scores + g * kScores;
    const F32x16 factor = set1(b.factor == 0.0f ? 1.0f : b.factor);
    const Follow now = follow(largest_scores(b, group + g, span, at, scores), factor, load(base[g]));
    if (mask_bits(now.grown) != 0) {
      add_outputs();
      store(base[g], now.base);
      for (float *to = sums(g), *const end = to + kLanes * kLanes; to < end; to += kLanes) store(to, mul(load(to), now.shrink));
      for (float *to = out(g), *const end = to + (fresh ? 0 : b.out_floats()); to < end; to += kLanes) store(to, mul(load(to), now.shrink));
    }
    probabilities(span, scores, factor, sub(zero(), now.finite), pairs(g) + tile * kPairs, sums(g), next_keys, b.x.k_steps);
  }

  // Where some value of the tile is not finite, a row must not meet those it does not see: for each token the others are zeros.
  void add_apart(int g, int tile, Span span, int64_t at) {
    const Group& own = b.groups[group + g];
    const char* const zeros = (const char*)b.s.zeros;
    const int64_t size = b.out_floats();
    for (int token = own.first_token; token <= own.last_token; ++token) {
      Rows rows;
      locate_tile(b.item, at, zeros, rows);
      hide_values(rows, seen_by(b.item, token, at), zeros);
      place_values(rows, b.args().layout.v.dim, b.x.v_tiles, (uint32_t*)b.s.values + tile * kSteps * kTileFloats);
      if (!fresh) memcpy(b.s.apart, out(g), size_t(size) * 4);
      output_groups<1>(b.x, {tile * kSteps + span.first, tile * kSteps + span.end}, pairs(g), &b.s.apart, fresh);
      const int begin = token * b.item.heads - (group + g) * kLanes, end = token == own.last_token ? kLanes : begin + b.item.heads;
      const Mask16 lanes = lanes_between(clip(begin, kLanes), clip(end, kLanes));
      for (int64_t i = 0; i < size; i += kLanes) store(out(g) + i, select(lanes, load(b.s.apart + i), load(out(g) + i)));
    }
  }

  void score(const char* const* keys, Span span, int lines) {
    if constexpr (G == 2)
      score_pair(b.x.k_steps, keys, span, b.queries(group), b.s.scores, ahead.fetcher, lines);
    else
      score_one(b.x.k_steps, keys, span, b.queries(group), b.s.scores, [&] { fetch<true>(ahead.fetcher, lines / 4); });
  }

  void pass(const Placed& part, int lines) {
    for (int g = 0; g < G; ++g) {
      store(base[g], set1(-__builtin_inff()));
      memset(sums(g), 0, kLanes * kLanes * 4);
    }
    for (int tile = 0; tile < part.tiles; ++tile) {
      const int64_t at = part.base + tile * kTile;
      const Span span = span_of(b, group, group + G - 1, at);
      if (span.first >= span.end) continue;
      go_on(ahead);
      const char* const* keys = b.x.keys + tile * (kTile / 16);
      score(keys, span, lines);
      for (int g = 0; g < G; ++g) settle(g, tile, span, at, G == 2 && tile + 1 < part.tiles ? keys + kTile / 16 + 2 * g : nullptr);
      if (part.finite >> tile & 1u) {
        if (waiting.first == waiting.end) waiting.first = tile * kSteps + span.first;
        waiting.end = tile * kSteps + span.end;
        continue;
      }
      add_outputs();
      for (int g = 0; g < G; ++g) add_apart(g, tile, span, at);
      fresh = false;
    }
    add_outputs();
    for (int g = 0; g < G && !fresh; ++g) b.states ? save(g) : merge(g);
  }

  void save(int g) {
    const int first = (group + g) * kLanes, rows = b.item.rows() - first < kLanes ? b.item.rows() - first : kLanes;
    save_group(rows, load(base[g]), sums(g), out(g), b.x.v_tiles, b.states + first * state_floats(16 * b.x.v_tiles));
  }

  void merge(int g) {
    const Merge m = merge_sums(load(base[g]), sum_vectors(sums(g)), b.groups[group + g].total);
    float *const from = out(g), *const to = b.s.total + (group + g) * b.out_floats();
    for (int64_t i = 0; i < b.out_floats(); i += kLanes)
      store(to + i, m.first ? load(from + i) : fma(load(from + i), m.shrink, mul(load(to + i), m.shrink_before)));
  }
};

}  // namespace tiles
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
