// More than sixteen query rows against int8 keys and values. A row's integers are two bytes, so a group is two tiles of queries and two of weights,
// which share what is loaded of keys and of values.
//
//   scores [key, row]  =  K [16 keys, 64 d]  x  Q [16 fours of d, 16 rows]      K where it lies
//   out    [d, row]   +=  V [16 d, 64 keys]  x  M [16 fours of keys, 16 rows]   V transposed once, for all groups of a block
//
//                 high   low
//                  B 6   B 7
//   16 keys  A 4 | C 0   C 1
//   16 keys  A 5 | C 2   C 3      and 16 d likewise
#pragma once
#include "attention_amx_bytes.h"

#if defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace tiles {

// Queries as [groups][high, low][k_steps][16 fours of d][16 rows].
inline void load_query_bytes(Block& b) {
  const Item& item = b.item;
  const int rows = item.rows(), bytes = b.x.k_steps * kCodeK;
  char *const high = (char*)b.s.pairs, *const low = high + kLanes * bytes, *to = (char*)b.s.queries;
  for (int first = 0; first < rows; first += kLanes, to += 2 * kLanes * bytes) {
    memset(high, 0, size_t(2 * kLanes * bytes));
    for (int r = 0; r < kLanes; ++r) {
      if (first + 2 * kLanes + r < rows)  // rows lie anywhere: the next groups' are asked for in time
        for (int i = 0; i < 2 * bytes; i += kLine) prefetch(item.query(first + 2 * kLanes + r) + i);
      b.s.query_scales[first + r] = 0.0f;
      if (first + r >= rows) continue;
      const auto* const q = (const uint16_t*)item.query(first + r);
      b.s.query_scales[first + r] = two_bytes(q, b.args().layout.k.dim, high + r * bytes, low + r * bytes, kCodeK);
    }
    columns_of_bytes(high, b.x.k_steps, to);
    columns_of_bytes(low, b.x.k_steps, to + kLanes * bytes);
  }
}

// A tile's values d..d+63 as [64 d][64 keys].
inline void transpose_bytes(const char* const* from, int d, int v_dim, char* to) {
  const int n = v_dim - d < kCodeK ? v_dim - d : kCodeK;
  F32x16 x[4][16];  // of dimensions 16 q + 4 m + l: x[m][four keys], lane 4 q + l
  for (int i = 0; i < 16; ++i) {
    __m512i key[4];
    for (int j = 0; j < 4; ++j) key[j] = (n == kCodeK ? load_bytes(from[4 * i + j] + d) : load_bytes_n(from[4 * i + j] + d, n)).v;
    const __m512i low = _mm512_unpacklo_epi8(key[0], key[1]), high = _mm512_unpackhi_epi8(key[0], key[1]);
    const __m512i low2 = _mm512_unpacklo_epi8(key[2], key[3]), high2 = _mm512_unpackhi_epi8(key[2], key[3]);
    x[0][i] = floats({_mm512_unpacklo_epi16(low, low2)});
    x[1][i] = floats({_mm512_unpackhi_epi16(low, low2)});
    x[2][i] = floats({_mm512_unpacklo_epi16(high, high2)});
    x[3][i] = floats({_mm512_unpackhi_epi16(high, high2)});
  }
  for (int m = 0; m < 4; ++m) {
    transpose16(x[m]);
    for (int i = 0; i < 16; ++i) store((float*)(to + (i / 4 * 16 + 4 * m + i % 4) * kTile), x[m][i]);
  }
}

// A tile's keys where they may be loaded from, its values as [part's tiles][v_tiles][16 d][64 keys], and both their scales.
inline void place_bytes(Block& b, Rows& rows, int tile) {
  const PageLayout& at = b.args().layout;
  fill_up(rows, (const char*)b.s.zeros);
  for (int i = 0; i < kSixteens; ++i) {
    const int sixteen = tile * kSixteens + i;
    b.x.keys[sixteen] = place_codes(rows.k + 16 * i, at.k, (char*)b.s.keys + 16 * sixteen * codes_apart(at.k));
    place_scales(rows.k + 16 * i, at.k.dim, b.s.key_scales + 16 * sixteen);
    place_scales(rows.v + 16 * i, at.v.dim, b.s.value_scales + 16 * sixteen);
  }
  for (int d = 0; d < at.v.dim; d += kCodeK) transpose_bytes(rows.v, d, at.v.dim, (char*)b.s.values + tile * b.x.v_tiles * kTileBytes + d * kTile);
}

// G groups that pass a part together.
template <int G>
struct PassingBytes {
  Block& b;
  int group;
  TilesAhead& ahead;
  alignas(64) float base[G][kLanes] = {};
  alignas(64) float down[G][kLanes] = {};
  int turn = 0;  // of two places for sums
  struct {
    int g, tile, step;
  } waiting = {};  // values still to be added, while lanes are busy with another group

  float* out(int g) { return b.s.out + g * b.out_floats(); }
  float* sums(int g, int at) { return b.s.sums + (at * G + g) * kLanes * kLanes; }
  float* scores(int g) { return b.s.scores + g * kScores; }
  float* integers(int g) { return b.s.integers + g * 2 * kScores; }                // [high, low][kTile][kLanes]
  float* value_sums(int t) { return b.s.integers + 4 * kScores + t / 2 % 2 * 4 * kTileFloats; }
  uint32_t* weights(int g) { return (uint32_t*)b.s.pairs + g * 2 * kTileFloats; }  // [high, low][16 fours of keys][kLanes]

  void multiply_keys(int g, const char* const* keys, int lines) {
    const int64_t apart = codes_apart(b.args().layout.k), half = int64_t(b.x.k_steps) * kTileBytes;
    for (int i = 0; i < kSixteens; i += 2) {
      const char* q = (const char*)b.s.queries + (group + g) * 2 * half;
      zero_sums();
      for (int s = 0; s < b.x.k_steps; ++s, q += kTileBytes) {
        if (g == 0) fetch<true>(ahead.fetcher, lines);
        tile_load<4>(keys[i] + s * kCodeK, apart);
        tile_load<6>(q, 64);
        tile_dot_bytes<0, 4, 6>();
        tile_load<7>(q + half, 64);
        tile_dot_bytes<1, 4, 7>();
        tile_load<5>(keys[i + 1] + s * kCodeK, apart);
        tile_dot_bytes<2, 5, 6>();
        tile_dot_bytes<3, 5, 7>();
      }
      float* const to = integers(g) + i * kTileFloats;
      tile_store<0>(to, 64);
      tile_store<1>(to + kScores, 64);
      tile_store<2>(to + kTileFloats, 64);
      tile_store<3>(to + kScores + kTileFloats, 64);
    }
  }

  // A tile's scores from the sums of its products.
  struct FromSums {
    const float *sums, *key_scales;
    F32x16 query_scale;
    F32x16 operator()(int key) const {
      const float* const from = sums + key * kLanes;
      return score_of(bits(load(from)), bits(load(from + kScores)), set1(key_scales[key]), query_scale);
    }
  };

  // Sums to scores, to weights, to integers in tiles. Where a base has to follow the scores, what its row has so far shrinks; weights by what it was
  // show whether it may have to.
  void settle(int g, int tile, int64_t at) {
    const float* const value_scales = b.s.value_scales + tile * kTile;
    const FromSums score{integers(g), b.s.key_scales + tile * kTile, load(b.s.query_scales + (group + g) * kLanes)};
    const F32x16 factor = set1(b.factor == 0.0f ? 1.0f : b.factor);
    const bool waits = may_wait(b, group + g, base[g], {0, kSteps}, at);
    if (!waits || mask_bits(weigh(g, value_scales, factor, sub(zero(), load(base[g])), score)) != 0) {
      float* const x = scores(g);
      for (int key = 0; key < kTile; ++key) store(x + key * kLanes, score(key));
      if (G == 1) add_steps(value_steps());
      const Follow now = follow(largest_scores(b, group + g, {0, kSteps}, at, x), factor, load(base[g]));
      if (mask_bits(now.grown) != 0) {
        store(base[g], now.base);
        for (float *to = sums(g, turn), *const end = to + kLanes * kLanes; to < end; to += kLanes) store(to, mul(load(to), now.shrink));
        for (float *to = out(g), *const end = to + b.out_floats(); to < end; to += kLanes) store(to, mul(load(to), now.shrink));
      }
      const auto again = [&](int key) { return load(x + key * kLanes); };
      if (!waits || mask_bits(now.grown) != 0) weigh(g, value_scales, factor, sub(zero(), now.finite), again);
    }
    waiting = {g, tile, 0};
  }

  // Of scores that score(key) gives. Returns the rows with sums of kMuch.
  template <class Score>
  Mask16 weigh(int g, const float* value_scales, F32x16 factor, F32x16 minus_base, const Score& score) {
    float *const x = scores(g), *const before = sums(g, turn), *const after = sums(g, turn ^ 1);
    U32x16 most = set1_u32(0);
    uint32_t large = 0;
    for (int i = 0; i < kLanes; ++i) {
      add_steps(value_steps() * (i + 1) / kLanes);
      F32x16 sum = load(before + i * kLanes);
      for (int key = i; key < kTile; key += 16) {
        const F32x16 from = score(key), p = exp2_of<false>(from, factor, minus_base), w = weight_of(from, p, set1(value_scales[key]));
        sum = add(sum, p);
        most = largest(most, w);
        store(x + key * kLanes, w);
      }
      store(after + i * kLanes, sum);
      large |= mask_bits(not_below(sum, kMuch));
    }
    const Grid grid = grid_of(most);
    store(down[g], grid.down);
    const U32x16 byte = set1_u32(0xff);
    uint32_t* to = weights(g);
    for (int key = 0; key < kTile; key += 4, to += 16) {
      Weight m[4];
      for (int i = 0; i < 4; ++i) m[i] = integer_weight(load(x + (key + i) * kLanes), grid.up);
      const auto four = [&](U32x16 w0, U32x16 w1, U32x16 w2, U32x16 w3) {
        return or_(or_(and_(w0, byte), shl<8>(and_(w1, byte))), or_(shl<16>(and_(w2, byte)), shl<24>(w3)));
      };
      store_u32(to, four(m[0].high, m[1].high, m[2].high, m[3].high));
      store_u32(to + kTileFloats, four(m[0].whole, m[1].whole, m[2].whole, m[3].whole));
    }
    return lanes_of(large);
  }

  // One step of adding a tile's values to a group's outputs: 32 dimensions are multiplied, and sums of those before are added.
  void add_step() {
    const int g = waiting.g, t = 2 * waiting.step++;
    const char* const values = (const char*)b.s.values + (waiting.tile * b.x.v_tiles + t) * kTileBytes;
    if (t == 0) {
      tile_load<6>(weights(g), 64);
      tile_load<7>(weights(g) + kTileFloats, 64);
    }
    if (t < b.x.v_tiles) {
      float* const to = value_sums(t);
      zero_sums();
      tile_load<4>(values, 64);
      tile_dot_bytes<0, 4, 6>();
      tile_dot_bytes<1, 4, 7>();
      tile_load<5>(values + kTileBytes, 64);
      tile_dot_bytes<2, 5, 6>();
      tile_dot_bytes<3, 5, 7>();
      tile_store<0>(to, 64);
      tile_store<1>(to + 2 * kTileFloats, 64);
      tile_store<2>(to + kTileFloats, 64);
      tile_store<3>(to + 3 * kTileFloats, 64);
    }
    if (t == 0) return;
    const F32x16 scale = load(down[g]);
    const float* const from = value_sums(t - 2);
    float* const to = out(g) + (t - 2) * kTileFloats;
    for (int i = 0; i < 2 * kTileFloats; i += kLanes)
      store(to + i, fma(to_f32(sum_of_bytes(bits(load(from + i)), bits(load(from + 2 * kTileFloats + i)))), scale, load(to + i)));
  }
  void add_steps(int end) {
    while (waiting.step < end) add_step();
  }
  int value_steps() const { return b.x.v_tiles / 2 + 1; }

  void pass(const Placed& part, int lines) {
    bool fresh = true;
    for (int g = 0; g < G; ++g) {
      store(base[g], set1(-__builtin_inff()));
      memset(sums(g, 0), 0, kLanes * kLanes * 4);
      memset(out(g), 0, size_t(b.out_floats()) * 4);
    }
    waiting.step = value_steps();
    for (int tile = 0; tile < part.tiles; ++tile) {
      const int64_t at = part.base + tile * kTile;
      const Span span = span_of(b, group, group + G - 1, at);
      if (span.first >= span.end) continue;
      go_on(ahead);
      fresh = false;
      for (int g = 0; g < G; ++g) multiply_keys(g, b.x.keys + tile * kSixteens, lines);
      for (int g = 0; g < G; ++g) settle(g, tile, at);
      turn ^= 1;
    }
    add_steps(value_steps());
    for (int g = 0; g < G && !fresh; ++g) end_group(b, group + g, base[g], sums(g, turn), out(g));
  }
};

}  // namespace tiles
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
