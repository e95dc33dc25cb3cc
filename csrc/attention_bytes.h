// Attention of bf16 queries over int8 keys and values by dot products of bytes (VPDPBUSD), four to a lane. The law is attention_bytes_law.h's.
//
//   query panel    [four of d][upper, lower bytes][row], then what sums begin with, [row], and scales, [row]
//   key panel      [four of d][32 keys], then scales [32]; for few rows columns [four of d][64] and scales [64]
//   row of scores  [16 fours of keys: upper bytes of m] [the same: lower bytes] [what sums are multiplied by] [what they begin with]
//   value panel    of 32 dims [four of keys][32 dims]
//
// Codes are multiplied as unsigned bytes, 128 added to them; a sum of lower bytes begins with what that is too much for both halves. Sums may wrap:
// what they are in the end fits.
#pragma once
#include "attention_bytes_law.h"
#include "attention_keys.h"
#include "attention_values.h"

#if defined(QUIRE_VECTOR_DOTS)
namespace quire {
namespace QUIRE_ISA {
namespace {

constexpr uint32_t kRaised = 0x80808080u;
constexpr int kFour = 4, kFours = kTile / kFour;  // dims or keys of a lane; of a tile's keys

QUIRE_INLINE int fours(int n) { return (n + kFour - 1) / kFour; }

// Up to kMaxRows queries, null behind the last, as a panel.
inline void place_query_bytes(const char* const* from, int k_dim, float* panel) {
  alignas(64) char high[kMostKeyDim], low[kMostKeyDim];
  auto* const to = (uint32_t*)panel;
  const int count = fours(k_dim);
  const __m512i ones = _mm512_set1_epi8(1);
  for (int r = 0; r < kMaxRows && from[r]; ++r) {
    panel[(2 * count + 1) * kMaxRows + r] = two_bytes((const uint16_t*)from[r], k_dim, high, low, kCodeK);
    __m512i highs = _mm512_setzero_si512(), lows = highs;
    for (int d = 0; d < k_dim; d += kCodeK) {
      highs = _mm512_dpbusd_epi32(highs, ones, _mm512_load_si512(high + d));
      lows = _mm512_dpbusd_epi32(lows, ones, _mm512_load_si512(low + d));
    }
    to[2 * count * kMaxRows + r] = -128u * (256u * uint32_t(_mm512_reduce_add_epi32(highs)) + uint32_t(_mm512_reduce_add_epi32(lows)));
    for (int i = 0; i < count; ++i) {
      memcpy(to + 2 * i * kMaxRows + r, high + kFour * i, kFour);
      memcpy(to + (2 * i + 1) * kMaxRows + r, low + kFour * i, kFour);
    }
  }
}

// Products of the two bytes of each of R rows with N vectors of raised codes, four to a lane.
template <int R, int N>
struct ByteSums {
  U32x16 high[R][N], low[R][N];
};
template <int R, int N>
QUIRE_INLINE void begin_sums(ByteSums<R, N>& s) {
  QUIRE_UNROLL for (int r = 0; r < R; ++r)
    QUIRE_UNROLL for (int j = 0; j < N; ++j) s.high[r][j] = s.low[r][j] = set1_u32(0);
}
// Upper bytes of rows are `row` floats apart, lower ones `lower` behind them.
template <int R, int N>
QUIRE_INLINE void add_fours(ByteSums<R, N>& s, const float* bytes, int row, int lower, const U32x16 (&x)[N]) {
  QUIRE_UNROLL for (int r = 0; r < R; ++r)
    QUIRE_UNROLL for (int j = 0; j < N; ++j) {
      s.high[r][j] = dot_bytes(s.high[r][j], x[j], bytes + r * row);
      s.low[r][j] = dot_bytes(s.low[r][j], x[j], bytes + r * row + lower);
    }
}

// A row's sums of `count` fours, as a score.
QUIRE_INLINE F32x16 score_of_sums(U32x16 sums, const float* q, int count, int r, F32x16 key_scale) {
  const U32x16 all = add(sums, set1_u32(((const uint32_t*)q)[2 * count * kMaxRows + r]));
  return mul(to_f32(all), mul(key_scale, set1(q[(2 * count + 1) * kMaxRows + r])));
}

// Scores of R rows with N groups of 16 keys, for the fours of d from `at` to `end` of `count`, which are `apart` floats from each other in `keys`; up to
// the last four they are left as integers.
template <int R, int N>
void score_fours(const float* q, const float* keys, int apart, const float* scales, int at, int end, int count, float* scores, Lines* lines) {
  ByteSums<R, N> sums;
  begin_sums(sums);
  for (int i = at; i < end; ++i, keys += apart) {
    if (lines) ask_by_column<N>(*lines, i);
    U32x16 x[N];
    QUIRE_UNROLL for (int j = 0; j < N; ++j) x[j] = load_u32((const uint32_t*)keys + 16 * j);
    add_fours(sums, q + 2 * i * kMaxRows, 1, kMaxRows, x);
  }
  QUIRE_UNROLL for (int r = 0; r < R; ++r)
    QUIRE_UNROLL for (int j = 0; j < N; ++j) {
      float* const to = scores + r * kTile + 16 * j;
      U32x16 sum = sum_of_bytes(sums.high[r][j], sums.low[r][j]);
      if (at > 0) sum = add(sum, bits(load(to)));
      store(to, end < count ? floats(sum) : score_of_sums(sum, q, count, r, load(scales + 16 * j)));
    }
}

template <int R = kDirectRows>
void score_columns_of_bytes(const QueryRows& x, const Columns& keys, int at, int end, int count, Lines& lines) {
  if constexpr (R > 1)
    if (x.rows < R) return score_columns_of_bytes<R - 1>(x, keys, at, end, count, lines);
  constexpr int N = R <= 3 ? 4 : 2;
  int j = 0;
  for (; j + N <= x.groups; j += N) score_fours<R, N>(x.q, keys.at + 16 * j, kTile, keys.scales + 16 * j, at, end, count, x.scores + 16 * j, &lines);
  for (; j < x.groups; ++j) score_fours<R, 1>(x.q, keys.at + 16 * j, kTile, keys.scales + 16 * j, at, end, count, x.scores + 16 * j, &lines);
}

// As score_few.
inline void score_few_bytes(const Rows& tile, int k_dim, const QueryRows* queries, int num_queries, const Columns& to, Lines& lines) {
  const int count = fours(k_dim);
  for (int key = tile.lo & ~15; key < tile.hi; key += 16) place_scales(tile.k + key, k_dim, to.scales + key);
  for (int d = 0; d < k_dim; d += Int8::kSpan) {
    const int n = k_dim - d < Int8::kSpan ? k_dim - d : Int8::kSpan;
    for (int key = tile.lo & ~15; key < tile.hi; key += 16) {
      ask_together<kPatchLines>(lines);
      F32x16 columns[16];
      transpose_lanes<Int8>(tile.k + key, d, n, columns);
      for (int i = 0; i < 16; ++i) store(to.at + i * kTile + key, columns[i]);
    }
    for (int i = 0; i < num_queries; ++i) score_columns_of_bytes(queries[i], to, d / kFour, fours(d + n), count, lines);
  }
}

// As transpose_keys.
inline void transpose_bytes(const Rows& tile, int k_dim, float* panels, int64_t panel_stride) {
  for (int key = tile.lo & ~15; key < tile.hi; key += 16) {
    float* const panel = panels + key / kPanelLanes * panel_stride + key % kPanelLanes;
    for (int d = 0; d < k_dim; d += Int8::kSpan) {
      const int n = k_dim - d < Int8::kSpan ? k_dim - d : Int8::kSpan;
      F32x16 columns[16];
      transpose_lanes<Int8>(tile.k + key, d, n, columns);
      for (int i = 0; i < fours(n); ++i) store(panel + (d / kFour + i) * kPanelLanes, columns[i]);
    }
    place_scales(tile.k + key, k_dim, panel + fours(k_dim) * kPanelLanes);
  }
}

// As score_panel: a group of 16 keys at a time, since each row has two sums.
template <int R = kMaxRows>
void score_panel_bytes(int rows, const float* q, const KeyPanels& keys, int first, int groups, int k_dim, float* scores) {
  if constexpr (R > 1)
    if (rows < R) return score_panel_bytes<R - 1>(rows, q, keys, first, groups, k_dim, scores);
  const int count = fours(k_dim);
  for (int j = first; j < first + groups && j < first + kPanel; ++j) {
    const float* const panel = keys.at + j / kPanel * keys.stride + j % kPanel * 16;
    score_fours<R, 1>(q, panel, kPanelLanes, panel + count * kPanelLanes, 0, count, count, scores + 16 * j, nullptr);
  }
}

// As softmax_pairs, but that weights lie where scores lay.
inline void softmax_bytes(int rows, int groups, const int* lo, const int* hi, float scale, float softcap, const float* value_scales, float* scores,
                          float* max, float* sums, float* alpha) {
  const Settled settled = settle(rows, groups, lo, hi, scale, softcap, scores, max, alpha);
  alignas(64) uint32_t most[16] = {};
  for (int r = 0; r < rows; ++r) {
    float* const row = scores + r * kTile;
    F32x16 sum = zero();
    U32x16 top = set1_u32(0);
    for (int j = 0; j < groups; ++j) {
      const F32x16 score = load(row + 16 * j), p = exp2_of<false>(score, settled.factor, set1(settled.minus[r]));
      const F32x16 w = weight_of(score, p, load(value_scales + 16 * j));
      sum = add(sum, p);
      top = largest(top, w);
      store(row + 16 * j, w);
    }
    store(sums + 16 * r, fma(load(sums + 16 * r), set1(alpha[r]), sum));
    most[r] = _mm512_reduce_max_epu32(top.v);
  }
  const Grid grid = grid_of(load_u32(most));
  float up[16], down[16];
  store(up, grid.up);
  store(down, grid.down);
  for (int r = 0; r < rows; ++r) {
    float* const row = scores + r * kTile;
    alignas(64) char high[kTile] = {}, low[kTile] = {};
    U32x16 sum = set1_u32(0);
    for (int j = 0; j < groups; ++j) {
      const Weight m = integer_weight(load(row + 16 * j), set1(up[r]));
      sum = add(sum, m.whole);
      _mm_store_si128((__m128i*)(high + 16 * j), _mm512_cvtepi32_epi8(m.high.v));
      _mm_store_si128((__m128i*)(low + 16 * j), _mm512_cvtepi32_epi8(m.whole.v));
    }
    memcpy(row, high, sizeof(high));
    memcpy(row + kFours, low, sizeof(low));
    row[2 * kFours] = down[r];
    ((int32_t*)row)[2 * kFours + 1] = -128 * _mm512_reduce_add_epi32(sum.v);
  }
}

// Outputs of 16 dims of row r, to which the tile's sums are added.
QUIRE_INLINE void add_weighted(U32x16 high, U32x16 low, const float* row, float alpha, float* out) {
  const U32x16 all = add(sum_of_bytes(high, low), set1_u32(((const uint32_t*)row)[2 * kFours + 1]));
  store(out, fma(to_f32(all), set1(row[2 * kFours]), mul(load(out), set1(alpha))));
}

// Raised codes of four keys, 64 dims, as lanes of four keys, dims in order: vectors first..first+N-1 of 16 dims.
template <int N>
QUIRE_INLINE void zip_four(const char* const* rows, int d, int n, int first, U32x16 (&x)[N]) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i k[kFour], ab[N / 2], cd[N / 2];
  QUIRE_UNROLL for (int i = 0; i < kFour; ++i)
    k[i] = _mm512_permutexvar_epi32(order, n < 64 ? load_bytes_n(rows[i] + d, n).v : load_bytes(rows[i] + d).v);
  QUIRE_UNROLL for (int i = 0; i < N / 2; ++i) {
    const bool upper = N == 2 ? first > 0 : i > 0;
    ab[i] = upper ? _mm512_unpackhi_epi8(k[0], k[1]) : _mm512_unpacklo_epi8(k[0], k[1]);
    cd[i] = upper ? _mm512_unpackhi_epi8(k[2], k[3]) : _mm512_unpacklo_epi8(k[2], k[3]);
  }
  QUIRE_UNROLL for (int i = 0; i < N; ++i) {
    const __m512i both = i % 2 ? _mm512_unpackhi_epi16(ab[i / 2], cd[i / 2]) : _mm512_unpacklo_epi16(ab[i / 2], cd[i / 2]);
    x[i] = xor_({both}, set1_u32(kRaised));
  }
}

// Vectors first..first+N-1 of the 64 dims from d on, of which n exist.
template <int R, int N>
void output_fours(const float* weights, const char* const* values, int lo, int hi, int d, int n, int first, const float* alpha, float* out,
                  int64_t out_stride, Fetcher& fetcher) {
  ByteSums<R, N> sums;
  begin_sums(sums);
  for (int four = lo / kFour; four < fours(hi); ++four) {
    ask_together<N>(fetcher);
    U32x16 x[N];
    zip_four<N>(values + kFour * four, d, n, first, x);
    add_fours(sums, weights + four, kTile, kFours, x);
  }
  QUIRE_UNROLL for (int r = 0; r < R; ++r)
    QUIRE_UNROLL for (int j = 0; j < N; ++j) {
      float* const to = out + r * out_stride + d + 16 * (first + j);
      if (16 * (first + j) < n) add_weighted(sums.high[r][j], sums.low[r][j], weights + r * kTile, alpha[r], to);
    }
}

// As output_few; rows may be given keys that they do not see.
template <int R = kDirectRows>
void output_few_bytes(int rows, const float* weights, const char* const* values, int lo, int hi, int v_dim, const float* alpha, float* out,
                      int64_t out_stride, Fetcher& fetcher) {
  if constexpr (R > 1)
    if (rows < R) return output_few_bytes<R - 1>(rows, weights, values, lo, hi, v_dim, alpha, out, out_stride, fetcher);
  constexpr int N = R <= 3 ? 4 : 2;
  for (int d = 0; d < v_dim; d += 64) {
    const int n = v_dim - d < 64 ? v_dim - d : 64;
    for (int first = 0; first < 4 && 16 * first < n; first += N) output_fours<R, N>(weights, values, lo, hi, d, n, first, alpha, out, out_stride, fetcher);
  }
}

// A tile's values as panels. They are codes, so all are finite.
inline bool copy_bytes(const Rows& rows, int v_dim, float* panels) {
  for (int d = 0; d < v_dim; d += 64) {
    const int n = v_dim - d < 64 ? v_dim - d : 64;
    for (int four = rows.lo / kFour; four < fours(rows.hi); ++four) {
      U32x16 x[4];
      zip_four<4>(rows.v + kFour * four, d, n, 0, x);
      for (int j = 0; j < 4 && 16 * j < n; ++j) {
        const int at = d + 16 * j;
        store_u32((uint32_t*)panels + (at / kPanelLanes * kFours + four) * kPanelLanes + at % kPanelLanes, x[j]);
      }
    }
  }
  return true;
}

// As output_panel.
template <int R = kMaxRows>
void output_panel_bytes(int rows, const Terms* terms, int count, int d, int vecs, float* out, int64_t out_stride) {
  if constexpr (R > 1)
    if (rows < R) return output_panel_bytes<R - 1>(rows, terms, count, d, vecs, out, out_stride);
  for (const Terms* t = terms; t < terms + count; ++t)
    for (int j = 0; j < vecs && j < kPanel; ++j) {
      ByteSums<R, 1> sums;
      begin_sums(sums);
      const auto* from = (const uint32_t*)t->values + (d / kPanelLanes * kFours + t->lo / kFour) * kPanelLanes + 16 * j;
      for (int four = t->lo / kFour; four < fours(t->hi); ++four, from += kPanelLanes) {
        const U32x16 x[1] = {load_u32(from)};
        add_fours(sums, t->weights + four, kTile, kFours, x);
      }
      QUIRE_UNROLL for (int r = 0; r < R; ++r)
        add_weighted(sums.high[r][0], sums.low[r][0], t->weights + r * kTile, t->alpha[r], out + r * out_stride + d + 16 * j);
    }
}

inline void value_scales_of_bytes(const Rows& rows, int v_dim, float* to) {
  for (int key = rows.lo & ~15; key < rows.hi; key += 16) place_scales(rows.v + key, v_dim, to + key);
}

constexpr KeyFormat kByteKeys = {&score_few_bytes, &transpose_bytes, &score_panel_bytes<kMaxRows>, Queries::kBytes};
constexpr ValueFormat kByteValues = {
    &softmax_bytes, &copy_bytes, &output_few_bytes<kDirectRows>, &output_panel_bytes<kMaxRows>, 1, kFour, &value_scales_of_bytes, true};

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
