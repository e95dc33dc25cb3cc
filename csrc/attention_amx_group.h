// Groups of sixteen query rows against tiles of 64 keys, by tiles of AMX (tiles_amx.h): scores, probabilities, outputs.
//
//   scores [key, row]  =  K [16 keys, 32 d]  x  Q [16 pairs of d, 16 rows]     K where it lies in its page: no key is transposed
//   out    [d, row]   +=  V [16 d, 32 keys]  x  P [16 pairs of keys, 16 rows]  V transposed once, for all groups of a block
//
//              a group's rows, another's              A lane is a query row throughout, so that maxima, sums and pairs of probabilities
//                  B 6   B 7                B 6   B 7     take no shuffles. Two groups go together, since loading a tile takes half as
//   16 keys A 4 | C 0   C 1    16 d  A 4 | C 0   C 1      long as multiplying two.
//   16 keys A 5 | C 2   C 3    16 d  A 5 | C 2   C 3
#pragma once
#include <type_traits>

#include "attention_amx_law.h"

#if defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace tiles {

constexpr int kScores = kTile * kLanes, kPairs = kScores / 2;  // of a group and a tile
constexpr int kSixteens = kTile / 16;
constexpr int kPartTiles = kPartKeys / kTile, kPartSteps = kPartTiles * kSteps;

QUIRE_INLINE U32x16 zip_low(U32x16 even, U32x16 odd) { return {_mm512_unpacklo_epi16(even.v, odd.v)}; }
QUIRE_INLINE U32x16 zip_high(U32x16 even, U32x16 odd) { return {_mm512_unpackhi_epi16(even.v, odd.v)}; }
QUIRE_INLINE U32x16 max_u16(U32x16 a, U32x16 b) { return {_mm512_max_epu16(a.v, b.v)}; }
QUIRE_INLINE bool any_above_u16(U32x16 a, uint16_t most) { return _mm512_cmpgt_epu16_mask(a.v, _mm512_set1_epi16(short(most))) != 0; }

// A part's keys, 16 of them in rows of `k_steps` lines from keys[i] on, and its values as [v_tiles][kPartSteps][16 d][16 pairs of keys].
struct Operands {
  const char* keys[kPartKeys / 16];
  const uint32_t* values;
  int k_steps, v_tiles;  // v_tiles is even
};

// Scores of two groups and one tile's keys, [2][kTile][kLanes], for those who have something else to do meanwhile: a multiplication at a time, the
// D-th of four. With some forty operations on vectors between two of them both go on, with hundreds between four each waits for the other; which
// one it is must be known when it is compiled. Sums are stored behind multiplications that do not wait for them, two of them behind the next sums'
// first ones: until finish() nobody else may use tiles.
struct PairScores {
  int k_steps;
  const char* const* keys;
  Span span;  // what is left of it
  const char* queries;
  float* scores;
  int s = 0;              // of k_steps
  float* last = nullptr;  // where two sums are still to be stored

  bool over() const { return span.first >= span.end; }
  template <int D>
  __attribute__((always_inline)) void dot() {
    const int64_t row_bytes = int64_t(k_steps) * 64;
    const char* const q = queries + s * kTileBytes;
    float* const to = scores + 2 * span.first * kTileFloats;
    if constexpr (D == 0) {
      if (s == 0) {
        if (last) tile_store<2>(last + kTileFloats, 64);
        tile_zero<0>();
      }
      tile_load_once<4>(keys[2 * span.first] + s * 64, row_bytes);
      tile_load<6>(q, 64);
      tile_dot<0, 4, 6>();
    } else if constexpr (D == 1) {
      if (s == 0) {
        if (last) tile_store<3>(last + kScores + kTileFloats, 64);
        last = nullptr;
        tile_zero<1>();
        tile_zero<2>();
        tile_zero<3>();
      }
      tile_load<7>(q + k_steps * kTileBytes, 64);
      tile_dot<1, 4, 7>();
    } else if constexpr (D == 2) {
      tile_load_once<5>(keys[2 * span.first + 1] + s * 64, row_bytes);
      tile_dot<2, 5, 6>();
      if (s == k_steps - 1) tile_store<0>(to, 64);
    } else {
      tile_dot<3, 5, 7>();
      if (++s < k_steps) return;
      s = 0;
      ++span.first;
      tile_store<1>(to + kScores, 64);
      last = to;
    }
  }
  void finish() {
    while (!over()) {
      dot<0>();
      dot<1>();
      dot<2>();
      dot<3>();
    }
    if (!last) return;
    tile_store<2>(last + kTileFloats, 64);
    tile_store<3>(last + kScores + kTileFloats, 64);
    last = nullptr;
  }
};

// Scores of one group and N times 16 keys, [16 N][kLanes]: as many sums at once as there are, since each waits for its last product. Calls ask()
// with each load of keys, for lines to come.
template <int N, class Ask>
QUIRE_INLINE void score_keys(int k_steps, const char* const* keys, const char* queries, float* scores, const Ask& ask) {
  const int64_t row_bytes = int64_t(k_steps) * 64;
  tile_zero<0>();
  tile_zero<1>();
  if constexpr (N == 4) tile_zero<2>();
  if constexpr (N == 4) tile_zero<3>();
  for (int s = 0; s < k_steps; ++s, queries += kTileBytes) {
    ask();
    tile_load<6>(queries, 64);
    tile_load<4>(keys[0] + s * 64, row_bytes);
    tile_dot<0, 4, 6>();
    ask();
    tile_load<5>(keys[1] + s * 64, row_bytes);
    tile_dot<1, 5, 6>();
    if constexpr (N == 4) {
      ask();
      tile_load<4>(keys[2] + s * 64, row_bytes);
      tile_dot<2, 4, 6>();
      ask();
      tile_load<5>(keys[3] + s * 64, row_bytes);
      tile_dot<3, 5, 6>();
    }
  }
  tile_store<0>(scores, 64);
  tile_store<1>(scores + kTileFloats, 64);
  if constexpr (N == 4) tile_store<2>(scores + 2 * kTileFloats, 64);
  if constexpr (N == 4) tile_store<3>(scores + 3 * kTileFloats, 64);
}

// Scores of one group and one tile's keys, [kTile][kLanes].
template <class Ask>
QUIRE_INLINE void score_one(int k_steps, const char* const* keys, Span span, const char* queries, float* scores, const Ask& ask) {
  if (span.end - span.first == kSteps)
    score_keys<4>(k_steps, keys, queries, scores, ask);
  else
    score_keys<2>(k_steps, keys + 2 * span.first, queries, scores + 2 * span.first * kTileFloats, ask);
}

// The D-th of four multiplications, for lambdas.
template <int D>
using Dot = std::integral_constant<int, D>;

// A group's probabilities of a tile's keys in pairs of bf16, [kTile / 2][kLanes]; `sums` [16][kLanes] are those of `before` and these, of keys 16
// apart together. Calls meanwhile(Dot<D>), D from 0 to 3, sixteen times. Returns the rows with sums of kMuch.
template <class Meanwhile>
QUIRE_INLINE Mask16 probabilities(Span span, const float* scores, F32x16 factor, F32x16 minus_base, uint32_t* pairs, const float* before,
                                  float* sums, const Meanwhile& meanwhile) {
  uint32_t large = 0;
  const auto two_sums = [&](int i, auto whole, auto first, auto second) __attribute__((always_inline)) {
    F32x16 even_sum = load(before + 2 * i * kLanes), odd_sum = load(before + (2 * i + 1) * kLanes);
    const auto pair = [&](int at) __attribute__((always_inline)) {
      const F32x16 even = exp2_of<true>(load(scores + 2 * at * kLanes), factor, minus_base);
      const F32x16 odd = exp2_of<true>(load(scores + (2 * at + 1) * kLanes), factor, minus_base);
      store_u32(pairs + at * kLanes, or_(shr<16>(bits(even)), bits(odd)));
      even_sum = add(even_sum, even);
      odd_sum = add(odd_sum, odd);
    };
    meanwhile(first);
    if (whole || span.first == 0) {
      pair(i);
      pair(i + 8);
    }
    meanwhile(second);
    if (whole || span.first == 1) {
      pair(i + 16);
      pair(i + 24);
    }
    large |= mask_bits(not_below(even_sum, kMuch)) | mask_bits(not_below(odd_sum, kMuch));
    store(sums + 2 * i * kLanes, even_sum);
    store(sums + (2 * i + 1) * kLanes, odd_sum);
  };
  const auto all = [&](auto whole) __attribute__((always_inline)) {
    for (int i = 0; i < 8; i += 2) {
      two_sums(i, whole, Dot<0>{}, Dot<1>{});
      two_sums(i + 1, whole, Dot<2>{}, Dot<3>{});
    }
  };
  if (span.end - span.first == kSteps)
    all(std::true_type{});
  else
    all(std::false_type{});
  return lanes_of(large);
}

// Adds the values of some steps of a part to the outputs [v_tiles][16 d][kLanes] of G groups, or sets them.
template <int G>
void output_groups(const Operands& x, Span span, const uint32_t* pairs, float* const* outs, bool fresh) {
  for (int tile = 0; tile < x.v_tiles; tile += 2) {
    float *const first = outs[0] + tile * kTileFloats, *const second = outs[G - 1] + tile * kTileFloats;
    if (fresh) {
      tile_zero<0>();
      tile_zero<2>();
      if constexpr (G == 2) tile_zero<1>();
      if constexpr (G == 2) tile_zero<3>();
    } else {
      tile_load<0>(first, 64);
      tile_load<2>(first + kTileFloats, 64);
      if constexpr (G == 2) tile_load<1>(second, 64);
      if constexpr (G == 2) tile_load<3>(second + kTileFloats, 64);
    }
    const uint32_t *low = x.values + (tile * kPartSteps + span.first) * kTileFloats, *p = pairs + span.first * kTileFloats;
    for (int step = span.first; step < span.end; ++step, low += kTileFloats, p += kTileFloats) {
      tile_load_once<4>(low, 64);
      tile_load<6>(p, 64);
      tile_dot<0, 4, 6>();
      if constexpr (G == 2) tile_load<7>(p + kPartTiles * kPairs, 64);
      if constexpr (G == 2) tile_dot<1, 4, 7>();
      tile_load_once<5>(low + kPartSteps * kTileFloats, 64);
      tile_dot<2, 5, 6>();
      if constexpr (G == 2) tile_dot<3, 5, 7>();
    }
    tile_store<0>(first, 64);
    tile_store<2>(first + kTileFloats, 64);
    if constexpr (G == 2) tile_store<1>(second, 64);
    if constexpr (G == 2) tile_store<3>(second + kTileFloats, 64);
  }
}

}  // namespace tiles
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
