// More than sixteen query rows against bf16 keys and values: groups of sixteen pass a part of the keys two by two.
//
//   part of 512 keys   K  placed (or where it lies)    V  transposed           once for all groups
//   two groups         scores, probabilities of one tile of 64 keys after the other ──> outputs over all of it ──> added to their totals
//
// So what two groups work with, probabilities and outputs of a part, stays in the nearest caches, and outputs in tiles for as long as no base grows.
#pragma once
#include "attention_amx_block.h"

#if defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace tiles {

// G groups that pass a part together.
template <int G>
struct PassingPairs {
  Block& b;
  int group;
  TilesAhead& ahead;
  alignas(64) float base[G][kLanes] = {}, minus_base[G][kLanes] = {};
  int turn = 0;          // of two places for sums
  bool fresh = true;     // nothing is in the outputs yet
  Span waiting = {0, 0};  // steps whose values are still to be added to them

  float* out(int g) { return b.s.out + g * b.out_floats(); }
  float* sums(int g, int at) { return b.s.sums + (at * G + g) * kLanes * kLanes; }
  uint32_t* pairs(int g) { return (uint32_t*)b.s.pairs + g * kPartTiles * kPairs; }

  void add_outputs() {
    if (waiting.first == waiting.end) return;
    float* const outs[] = {out(0), out(G - 1)};
    output_groups<G>(b.x, waiting, pairs(0), outs, fresh);
    fresh = false;
    waiting = {0, 0};
  }

  float* scores(int g, int tile) { return b.s.scores + (tile % 2 * G + g) * kScores; }
  F32x16 factor() const { return set1(b.factor == 0.0f ? 1.0f : b.factor); }

  // Lets a group's base follow its scores of the part's tile `tile` at `at`; what it has so far shrinks with it. False if it stays.
  bool follow_scores(int g, int tile, Span span, int64_t at) {
    const Follow now = follow(largest_scores(b, group + g, span, at, scores(g, tile)), factor(), load(base[g]));
    store(minus_base[g], sub(zero(), now.finite));
    if (mask_bits(now.grown) == 0) return false;
    add_outputs();
    store(base[g], now.base);
    for (float *to = sums(g, turn), *const end = to + kLanes * kLanes; to < end; to += kLanes) store(to, mul(load(to), now.shrink));
    for (float *to = out(g), *const end = to + (fresh ? 0 : b.out_floats()); to < end; to += kLanes) store(to, mul(load(to), now.shrink));
    return true;
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

  Span span(const Placed& part, int tile) const {
    return tile < part.tiles ? span_of(b, group, group + G - 1, part.base + tile * kTile) : Span{0, 0};
  }

  // Two groups' next scores are multiplied while probabilities are computed: these take the vector units, those the tiles. Where a base may wait for
  // probabilities by what it was, and then has to follow, they are computed again.
  void pass(const Placed& part, int lines) {
    for (int g = 0; g < G; ++g) {
      store(base[g], set1(-__builtin_inff()));
      memset(sums(g, 0), 0, kLanes * kLanes * 4);
    }
    const auto scores_of = [&](int tile) -> PairScores {
      return {b.x.k_steps, b.x.keys + tile * (kTile / 16), span(part, tile), b.queries(group), scores(0, tile)};
    };
    PairScores next = scores_of(0);
    bool waits[G];
    for (int tile = 0; tile < part.tiles; ++tile) {
      const int64_t at = part.base + tile * kTile;
      const Span span = this->span(part, tile);
      if constexpr (G == 1) {
        const auto ask = [&] { fetch<true>(ahead.fetcher, lines / 4); };
        if (span.first < span.end) score_one(b.x.k_steps, b.x.keys + tile * (kTile / 16), span, b.queries(group), scores(0, tile), ask);
      } else {
        next.finish();
        next = scores_of(tile + 1);
      }
      if (span.first >= span.end) continue;
      go_on(ahead);
      for (int g = 0; g < G; ++g) {
        waits[g] = may_wait(b, group + g, base[g], span, at);
        if (!waits[g]) follow_scores(g, tile, span, at);
      }
      for (int g = 0; g < G; ++g) {
        const auto weigh = [&](const auto& meanwhile) __attribute__((always_inline)) {
          return probabilities(span, scores(g, tile), factor(), load(minus_base[g]), pairs(g) + tile * kPairs, sums(g, turn), sums(g, turn ^ 1),
                               meanwhile);
        };
        const Mask16 large = weigh([&](auto dot) __attribute__((always_inline)) {
          if constexpr (G == 1) return;
          if (dot == 0) fetch<true>(ahead.fetcher, lines);
          if (!next.over()) next.template dot<decltype(dot)::value>();
        });
        if (!waits[g] || mask_bits(large) == 0) continue;
        if (G == 2) next.finish();
        if (follow_scores(g, tile, span, at)) weigh([](auto) {});
      }
      turn ^= 1;
      if (part.finite >> tile & 1u) {
        if (waiting.first == waiting.end) waiting.first = tile * kSteps + span.first;
        waiting.end = tile * kSteps + span.end;
        continue;
      }
      if (G == 2) next.finish();
      add_outputs();
      for (int g = 0; g < G; ++g) add_apart(g, tile, span, at);
      fresh = false;
    }
    add_outputs();
    for (int g = 0; g < G && !fresh; ++g) end_group(b, group + g, base[g], sums(g, turn), out(g));
  }
};

}  // namespace tiles
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
