// The two products of attention on one tile of keys, blocked in registers: scores = q . K and output += p . V.
// Every lane of every accumulator meets its terms one by one in the same order (over the head dimension for scores, over
// the keys for the output), however many rows or vectors share the loop: that is what keeps a row's bits its own.
#pragma once
#include "attention_rows.h"
#include "elements.h"
#include "simd.h"

namespace quire {
namespace QUIRE_ISA {
namespace {

// With many query rows, keys and values are copied to scratch once, and kMaxRows rows x kPanel vectors of them meet in
// registers: these rows meet all keys that lie there before others do. With up to kDirectRows rows (decode), values are
// used where they lie, and more vectors share the loop instead, to have enough independent sums; of more than kSumRows rows registers do not hold these.
#if defined(QUIRE_AVX512)
constexpr int kMaxRows = 12, kPanel = 2, kDirectRows = 6, kSumRows = 6, kWideVecs = 8, kWideRows = 2;
#elif defined(QUIRE_AVX2)
constexpr int kMaxRows = 6, kPanel = 1, kDirectRows = 6, kSumRows = 3, kWideVecs = 4, kWideRows = 1;
#else
constexpr int kMaxRows = 2, kPanel = 1, kDirectRows = 1, kSumRows = 1, kWideVecs = 2, kWideRows = 1;
#endif
constexpr int kPanelLanes = 16 * kPanel;
constexpr int wide_vecs(int rows) { return rows <= kWideRows ? kWideVecs : kWideVecs / 2; }

// How a tile of keys lies in scratch for many rows: transposed, in panels [kTile / kPanelLanes][Dk][kPanelLanes] of fp32, or of
// 32-bit pairs of bf16 [..][ceil(Dk / 2)][..], which are widened in the loop or fed to the CPU's own bf16 dot product.
enum class Keys { kFloat, kWidenPairs, kDotPairs };

struct KeyPanels {
  const float* at;
  int64_t stride;  // from panel to panel
};

// scores[r][16 * first + j] = sum over d of q[d][r] * key[first * 16 + j][d], for R rows and N <= kPanel groups of 16 keys from
// group `first` on. Queries lie in panels too, [Dk][kMaxRows], so that one pointer serves all rows.
template <Keys F, int R, int N>
void score_block(const float* q, const KeyPanels& keys, int first, int k_dim, float* scores) {
  F32x16 acc[R][N];
  QUIRE_UNROLL for (int r = 0; r < R; ++r)
    QUIRE_UNROLL for (int j = 0; j < N; ++j) acc[r][j] = zero();
  const float* k = keys.at + first / kPanel * keys.stride + first % kPanel * 16;
  constexpr int kStep = F == Keys::kFloat ? 1 : 2;
  for (int d = 0; d < k_dim; d += kStep, k += kPanelLanes, q += F == Keys::kWidenPairs ? 2 * kMaxRows : kMaxRows) {
    F32x16 x[N];
    QUIRE_UNROLL for (int j = 0; j < N; ++j) x[j] = load(k + 16 * j);
    if constexpr (F == Keys::kDotPairs) {
      QUIRE_UNROLL for (int r = 0; r < R; ++r) {
        const U32x16 a = bits(set1(q[r]));
        QUIRE_UNROLL for (int j = 0; j < N; ++j) acc[r][j] = dot_pair(acc[r][j], a, bits(x[j]));
      }
    } else {
      QUIRE_UNROLL for (int r = 0; r < R; ++r) {
        const F32x16 a = set1(q[r]);
        QUIRE_UNROLL for (int j = 0; j < N; ++j) acc[r][j] = fma(a, F == Keys::kFloat ? x[j] : pair_low(bits(x[j])), acc[r][j]);
      }
      for (int r = 0; r < R && F == Keys::kWidenPairs; ++r) {
        const F32x16 a = set1(q[kMaxRows + r]);
        QUIRE_UNROLL for (int j = 0; j < N; ++j) acc[r][j] = fma(a, pair_high(bits(x[j])), acc[r][j]);
      }
    }
  }
  QUIRE_UNROLL for (int r = 0; r < R; ++r)
    QUIRE_UNROLL for (int j = 0; j < N; ++j) store(scores + r * kTile + 16 * (first + j), acc[r][j]);
}

// One panel for up to kMaxRows rows; `groups` of its groups of 16 keys are wanted.
template <Keys F, int R = kMaxRows>
void score_panel(int rows, const float* q, const KeyPanels& keys, int first, int groups, int k_dim, float* scores) {
  if constexpr (R > 1)
    if (rows < R) return score_panel<F, R - 1>(rows, q, keys, first, groups, k_dim, scores);
  if (groups >= kPanel) return score_block<F, R, kPanel>(q, keys, first, k_dim, scores);
  for (int j = 0; j < groups; ++j) score_block<F, R, 1>(q, keys, first + j, k_dim, scores);
}

// For few rows: E::kSpan head dimensions of a tile's keys as up to 16 columns [16][kTile] of 32-bit lanes, and their scales
// [16 / E::kScaleColumns][kTile]. So little at a time that it is read from the first cache again, whatever `fetch` brings in.
struct Columns {
  float *at, *scales;
};
constexpr int kColumnFloats = 16 * kTile, kScaleFloats = 4 * kTile;

// What steps ask for. Sixteen keys, transposed, take a line of each: they ask for half of that, and the columns, multiplied, for the other half.
constexpr int kPatchLines = 8;
template <int N>
QUIRE_INLINE void ask_by_column(Lines& lines, int column) {
  if (column % 4 == 0) ask_together<2 * N>(lines);
}
// `n` values of a key, `line` of which are a line (of fp16 half a one, which only asks sooner).
template <int n, int line>
QUIRE_INLINE void ask_by_value(Fetcher& fetcher, int key) {
  if (n >= line || key % (line / n) == 0) ask_together<(n > line ? n / line : 1)>(fetcher);
}

// Adds `n` head dimensions to the scores of R rows and N groups of 16 keys from group `first` on.
template <class E, bool kDot, int R, int N>
void score_columns(const float* q, const Columns& keys, int first, int n, bool fresh, float* scores, Lines& lines) {
  F32x16 acc[R][N];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < N; ++j) acc[r][j] = fresh ? zero() : load(scores + r * kTile + 16 * (first + j));
  typename E::Scale scale[N];
  const float* k = keys.at + 16 * first;
  for (int i = 0; i * E::kPer < n; ++i, k += kTile) {
    ask_by_column<N>(lines, i);
    if constexpr (E::kScaleColumns > 0)
      if (i % E::kScaleColumns == 0)
        for (int j = 0; j < N; ++j) scale[j] = E::spread(load(keys.scales + i / E::kScaleColumns * kTile + 16 * (first + j)));
    for (int p = 0; p < (kDot ? 1 : E::kPer); ++p, q += kMaxRows) {
      F32x16 x[N];
      for (int j = 0; j < N; ++j) x[j] = kDot ? load(k + 16 * j) : E::pick(load(k + 16 * j), scale[j], p);
      for (int r = 0; r < R; ++r) {
        const F32x16 a = set1(q[r]);
        for (int j = 0; j < N; ++j) acc[r][j] = kDot ? dot_pair(acc[r][j], bits(a), bits(x[j])) : fma(a, x[j], acc[r][j]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < N; ++j) store(scores + r * kTile + 16 * (first + j), acc[r][j]);
}

// `groups` groups of 16 keys for up to kDirectRows rows.
template <class E, bool kDot, int R = kDirectRows>
void add_scores(int rows, const float* q, const Columns& keys, int groups, int n, bool fresh, float* scores, Lines& lines) {
  if constexpr (R > 1)
    if (rows < R) return add_scores<E, kDot, R - 1>(rows, q, keys, groups, n, fresh, scores, lines);
  constexpr int kVecs = R <= kSumRows ? kWideVecs / 2 : kWideVecs / 4;
  int j = 0;
  for (; j + kVecs <= groups; j += kVecs) score_columns<E, kDot, R, kVecs>(q, keys, j, n, fresh, scores, lines);
  for (; j < groups; ++j) score_columns<E, kDot, R, 1>(q, keys, j, n, fresh, scores, lines);
}

// A tile's values copied to scratch, in panels [ceil(Dv / kPanelLanes)][kTile][kPanelLanes] of fp32, or of bf16 pairs where a
// panel is wide enough for both vectors of a pair.
template <bool kPairs>
struct PanelValues {
  static constexpr bool kDirect = false;
  static constexpr int kVecs = kPairs ? 2 : 1, kWidth = kPairs ? kPanelLanes / 2 : kPanelLanes;
  const float* v;
  struct Row {
    const float* at;
  };
  QUIRE_INLINE int64_t place(int key, int d) {
    return int64_t(d / kPanelLanes * kTile + key) * kWidth + d % kPanelLanes * kWidth / kPanelLanes;
  }
  QUIRE_INLINE Row row(const PanelValues& s, int key, int d) { return {s.v + place(key, d)}; }
  QUIRE_INLINE void read(const Row& r, int j, F32x16* x) {
    if constexpr (kPairs)
      Brain::split(bits(load(r.at + 8 * j)), x);
    else
      x[0] = load(r.at + 16 * j);
  }
  QUIRE_INLINE void read_n(const Row&, F32x16*, int) {}
};

// Values where they lie, in pages and staged tensors.
template <class E>
struct DirectValues {
  static constexpr bool kDirect = true;
  static constexpr int kVecs = E::kVecs, kLine = E::kSpan;
  using Row = typename E::Row;
  const char* const* rows;
  int dim;
  QUIRE_INLINE Row row(const DirectValues& s, int key, int d) { return E::row(s.rows[key], s.dim, d); }
  QUIRE_INLINE void read(const Row& r, int j, F32x16* x) { E::read(r, j, x); }
  QUIRE_INLINE void read_n(const Row& r, F32x16* x, int n) { E::read_n(r, x, n); }
};

// R rows of outputs in registers, and shrunk as their bases grew, which few do in a tile.
template <int R, int N>
QUIRE_INLINE void load_sums(F32x16 (&acc)[R][N], const float* out, int64_t out_stride) {
  QUIRE_UNROLL for (int r = 0; r < R; ++r)
    QUIRE_UNROLL for (int j = 0; j < N; ++j) acc[r][j] = load(out + r * out_stride + 16 * j);
}
template <int R, int N>
QUIRE_INLINE void store_sums(const F32x16 (&acc)[R][N], float* out, int64_t out_stride) {
  QUIRE_UNROLL for (int r = 0; r < R; ++r)
    QUIRE_UNROLL for (int j = 0; j < N; ++j) store(out + r * out_stride + 16 * j, acc[r][j]);
}
template <int R, int N>
QUIRE_INLINE void shrink(F32x16 (&acc)[R][N], const float* alpha) {
  const F32x16 one = set1(1.0f), all = select(lanes_between(0, R), load_n(alpha, R), one);
  if (mask_bits(eq(all, one)) == 0xffff) return;
  QUIRE_UNROLL for (int r = 0; r < R; ++r)
    QUIRE_UNROLL for (int j = 0; j < N; ++j) acc[r][j] = mul(acc[r][j], set1(alpha[r]));
}

// What a tile adds to outputs of rows: their weights of the keys lo..hi-1, [row][kTile], and these keys' values as panels. First the sums shrink by alpha[row].
struct Terms {
  const float *weights, *values, *alpha;
  int lo, hi;
};

// Adds, over keys lo <= key < hi, p[r][key] * v[key][d..], for 16 * N values, N a multiple of V::kVecs. With kEnd there is just one unit of values, of
// which only `tail` exist.
template <class V, bool kEnd, int R, int N>
QUIRE_INLINE void add_values(F32x16 (&acc)[R][N], const float* p, const V& v, int lo, int hi, int d, int tail, Fetcher* fetcher) {
  static_assert(N % V::kVecs == 0 && (!kEnd || N == V::kVecs), "values come in whole units");
  for (int key = lo; key < hi; ++key) {
    const typename V::Row from = V::row(v, key, d);
    if constexpr (V::kDirect) ask_by_value<16 * N, V::kLine>(*fetcher, key);
    F32x16 x[N];
    if constexpr (kEnd) {
      V::read_n(from, x, tail);
    } else {
      for (int j = 0; j < N; j += V::kVecs) V::read(from, j, x + j);
    }
    for (int r = 0; r < R; ++r) {
      const F32x16 a = set1(p[r * kTile + key]);
      for (int j = 0; j < N; ++j) acc[r][j] = fma(a, x[j], acc[r][j]);
    }
  }
}

// out[r][d..] = out[r][d..] * alpha[r] + these.
template <class V, bool kEnd, int R, int N>
void output_block(const float* p, const V& v, int lo, int hi, int d, int tail, const float* alpha, float* out, int64_t out_stride, Fetcher* fetcher) {
  F32x16 acc[R][N];
  load_sums(acc, out + d, out_stride);
  shrink(acc, alpha);
  add_values<V, kEnd, R, N>(acc, p, v, lo, hi, d, tail, fetcher);
  store_sums(acc, out + d, out_stride);
}

template <class V, int R, int N>
void output_terms(const Terms* terms, int count, int d, float* out, int64_t out_stride) {
  F32x16 acc[R][N];
  load_sums(acc, out + d, out_stride);
  for (const Terms* t = terms; t < terms + count; ++t) {
    shrink(acc, t->alpha);
    add_values<V, false, R, N>(acc, t->weights, {t->values}, t->lo, t->hi, d, 0, nullptr);
  }
  store_sums(acc, out + d, out_stride);
}

// One panel of values for up to kMaxRows rows.
template <bool kPairs, int R = kMaxRows>
void output_panel(int rows, const Terms* terms, int count, int d, int vecs, float* out, int64_t out_stride) {
  if constexpr (R > 1)
    if (rows < R) return output_panel<kPairs, R - 1>(rows, terms, count, d, vecs, out, out_stride);
  using V = PanelValues<kPairs>;
  if (vecs >= kPanel) return output_terms<V, R, kPanel>(terms, count, d, out, out_stride);
  for (int j = 0; j < vecs; j += V::kVecs) output_terms<V, R, V::kVecs>(terms, count, d + 16 * j, out, out_stride);
}

// All Dv values for up to kDirectRows rows.
template <class E, int R = kDirectRows>
void output_few(int rows, const float* p, const char* const* values, int lo, int hi, int v_dim, const float* alpha, float* out, int64_t out_stride,
                Fetcher& fetcher) {
  if constexpr (R > 1)
    if (rows < R) return output_few<E, R - 1>(rows, p, values, lo, hi, v_dim, alpha, out, out_stride, fetcher);
  if constexpr (R > kSumRows) {  // values are read twice, the second time from the first cache
    constexpr int kFirst = R / 2;
    output_few<E, kFirst>(kFirst, p, values, lo, hi, v_dim, alpha, out, out_stride, fetcher);
    return output_few<E, R - kFirst>(R - kFirst, p + kFirst * kTile, values, lo, hi, v_dim, alpha + kFirst, out + kFirst * out_stride, out_stride, fetcher);
  }
  using V = DirectValues<E>;
  const V v{values, v_dim};
  constexpr int kUnit = V::kVecs, kMost = wide_vecs(R) > kUnit ? wide_vecs(R) : kUnit, kHalf = kMost / 2 > kUnit ? kMost / 2 : kUnit;
  int d = 0;
  for (; d + 16 * kMost <= v_dim; d += 16 * kMost) output_block<V, false, R, kMost>(p, v, lo, hi, d, 0, alpha, out, out_stride, &fetcher);
  for (; d + 16 * kHalf <= v_dim; d += 16 * kHalf) output_block<V, false, R, kHalf>(p, v, lo, hi, d, 0, alpha, out, out_stride, &fetcher);
  for (; d + 16 * kUnit <= v_dim; d += 16 * kUnit) output_block<V, false, R, kUnit>(p, v, lo, hi, d, 0, alpha, out, out_stride, &fetcher);
  if (d < v_dim) output_block<V, true, R, kUnit>(p, v, lo, hi, d, v_dim - d, alpha, out, out_stride, &fetcher);
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
