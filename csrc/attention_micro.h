// The two products of attention on one tile of keys, blocked in registers: scores = q . K and output += p . V.
// Every lane of every accumulator meets its terms one by one in the same order (over the head dimension for scores, over
// the keys for the output), however many rows or vectors share the loop: that is what keeps a row's bits its own.
#pragma once
#include "simd.h"

namespace quire {
namespace QUIRE_ISA {
namespace {

constexpr int kTile = 64;  // keys; tiles start at absolute positions that are multiples of this

// With many query rows, keys and values are copied to scratch once, and kMaxRows rows x kPanel vectors of them meet in
// registers; a panel stays in the first cache while all rows pass it. With up to kDirectRows rows (decode), values are
// used where they lie, and more vectors share the loop instead, to have enough independent sums.
#if defined(QUIRE_AVX512)
constexpr int kMaxRows = 12, kPanel = 2, kDirectRows = 6, kWideVecs = 8, kWideRows = 2;
#elif defined(QUIRE_AVX2)
constexpr int kMaxRows = 6, kPanel = 1, kDirectRows = 3, kWideVecs = 4, kWideRows = 1;
#else
constexpr int kMaxRows = 2, kPanel = 1, kDirectRows = 1, kWideVecs = 2, kWideRows = 1;
#endif
constexpr int kPanelLanes = 16 * kPanel;
constexpr int wide_vecs(int rows) { return rows <= kWideRows ? kWideVecs : kWideVecs / 2; }

// Asks for the next tile's rows, little by little, while this tile is computed: pages lie anywhere, so the CPU cannot guess
// them, and asking for all of them in one phase would leave the memory idle in the others.
struct Fetcher {
  const void* const* rows;  // keys, then values, kTile of each; those outside lo..hi-1 do not exist
  int lo, hi, k_bytes, v_bytes;
  int per_patch, per_step, per_value;  // rows asked for by a 16-key patch, 16 steps of scores, one value; in 1/256
  int done = 0, due = 0;
};
QUIRE_INLINE void fetch(Fetcher& f, int amount) {
  f.due += amount;
  for (const int end = f.due < 512 * kTile ? f.due / 256 : 2 * kTile; f.done < end; ++f.done) {
    const int key = f.done % kTile;
    if (key < f.lo || key >= f.hi) continue;
    const char* from = (const char*)f.rows[f.done];
    for (int i = 0, n = f.done < kTile ? f.k_bytes : f.v_bytes; i < n; i += 64) prefetch(from + i);
  }
}

// How a tile of keys lies in scratch, transposed, in panels [kTile / kPanelLanes][Dk][kPanelLanes] of fp32, or of 32-bit pairs
// of bf16 [..][ceil(Dk / 2)][..], which are widened in the loop or fed to the CPU's own bf16 dot product.
enum class Keys { kFloat, kWidenPairs, kDotPairs };

struct KeyPanels {
  const float* at;
  int64_t stride;  // from panel to panel
};

// scores[r][16 * first + j] = sum over d of q[d][r] * key[first * 16 + j][d], for R rows and N groups of 16 keys from group
// `first` on; N is at most kPanel or a multiple of it. Queries lie in panels too, [Dk][kMaxRows], so that one pointer serves
// all rows.
template <Keys F, int R, int N>
void score_block(const float* q, const KeyPanels& keys, int first, int k_dim, float* scores, Fetcher* fetcher) {
  F32x16 acc[R][N];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < N; ++j) acc[r][j] = zero();
  const float* k = keys.at + first / kPanel * keys.stride + first % kPanel * 16;
  constexpr int kStep = F == Keys::kFloat ? 1 : 2;
  for (int d = 0; d < k_dim; d += kStep, k += kPanelLanes, q += F == Keys::kWidenPairs ? 2 * kMaxRows : kMaxRows) {
    if (fetcher && d % 16 == 0) fetch(*fetcher, fetcher->per_step);
    F32x16 x[N];
    for (int j = 0; j < N; ++j) x[j] = load(k + j / kPanel * keys.stride + j % kPanel * 16);
    if constexpr (F == Keys::kDotPairs) {
      for (int r = 0; r < R; ++r) {
        const U32x16 a = bits(set1(q[r]));
        for (int j = 0; j < N; ++j) acc[r][j] = dot_pair(acc[r][j], a, bits(x[j]));
      }
    } else {
      for (int r = 0; r < R; ++r) {
        const F32x16 a = set1(q[r]);
        for (int j = 0; j < N; ++j) acc[r][j] = fma(a, F == Keys::kFloat ? x[j] : pair_low(bits(x[j])), acc[r][j]);
      }
      for (int r = 0; r < R && F == Keys::kWidenPairs; ++r) {
        const F32x16 a = set1(q[kMaxRows + r]);
        for (int j = 0; j < N; ++j) acc[r][j] = fma(a, pair_high(bits(x[j])), acc[r][j]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < N; ++j) store(scores + r * kTile + 16 * (first + j), acc[r][j]);
}

// One panel for up to kMaxRows rows; `groups` of its groups of 16 keys are wanted.
template <Keys F, int R = kMaxRows>
void score_panel(int rows, const float* q, const KeyPanels& keys, int first, int groups, int k_dim, float* scores) {
  if constexpr (R > 1)
    if (rows < R) return score_panel<F, R - 1>(rows, q, keys, first, groups, k_dim, scores);
  if (groups >= kPanel) return score_block<F, R, kPanel>(q, keys, first, k_dim, scores, nullptr);
  for (int j = 0; j < groups; ++j) score_block<F, R, 1>(q, keys, first + j, k_dim, scores, nullptr);
}

// `groups` groups of 16 keys of a tile for up to kDirectRows rows.
template <Keys F, int R = kDirectRows>
void score_few(int rows, const float* q, const KeyPanels& keys, int groups, int k_dim, float* scores, Fetcher& fetcher) {
  if constexpr (R > 1)
    if (rows < R) return score_few<F, R - 1>(rows, q, keys, groups, k_dim, scores, fetcher);
  constexpr int kVecs = kWideVecs / 2;
  int j = 0;
  for (; j + kVecs <= groups; j += kVecs) score_block<F, R, kVecs>(q, keys, j, k_dim, scores, &fetcher);
  if constexpr (kVecs > kPanel)
    for (; j + kPanel <= groups; j += kPanel) score_block<F, R, kPanel>(q, keys, j, k_dim, scores, &fetcher);
  for (; j < groups; ++j) score_block<F, R, 1>(q, keys, j, k_dim, scores, &fetcher);
}

// Where a tile's values come from: copied to scratch in panels [ceil(Dv / kPanelLanes)][kTile][kPanelLanes], or straight from
// pages and staged rows. Panels are fp32, or bf16 pairs where a panel is wide enough for both vectors of a pair.
template <class D>
struct PanelValues {
  static constexpr bool kPacked = D::kPairs && kPanel >= 2;
  static constexpr bool kDirect = false;
  static constexpr int kVecs = kPacked ? 2 : 1, kWidth = kPacked ? kPanelLanes / 2 : kPanelLanes;
  using Element = float;
  const float* v;
  QUIRE_INLINE const float* row(const PanelValues& s, int key, int d) { return s.v + (d / kPanelLanes * kTile + key) * kWidth + d % kPanelLanes * kWidth / kPanelLanes; }
  QUIRE_INLINE void read(const float* p, int j, F32x16* x) {
    if constexpr (kPacked)
      D::split(bits(load(p + 8 * j)), x);
    else
      x[0] = load(p + 16 * j);
  }
  QUIRE_INLINE void read_n(const float*, F32x16*, int) {}
};
template <class D>
struct DirectValues {
  using Element = typename D::Element;
  static constexpr bool kDirect = true;
  static constexpr int kVecs = D::kVecs;
  const Element* const* rows;
  QUIRE_INLINE const Element* row(const DirectValues& s, int key, int d) { return s.rows[key] + d; }
  QUIRE_INLINE void read(const Element* p, int j, F32x16* x) { D::read(p + 16 * j, x); }
  QUIRE_INLINE void read_n(const Element* p, F32x16* x, int n) { D::read_n(p, x, n); }
};

// out[r][d..] = out[r][d..] * alpha[r] + sum over keys lo <= key < hi of p[r][key] * v[key][d..], for 16 * N values, N a
// multiple of V::kVecs. With kEnd there is just one unit of values, of which only `tail` exist.
template <class V, bool kEnd, int R, int N>
void output_block(const float* p, const V& v, int lo, int hi, int d, int tail, const float* alpha, float* out, int64_t out_stride, Fetcher* fetcher) {
  static_assert(N % V::kVecs == 0 && (!kEnd || N == V::kVecs), "values come in whole units");
  F32x16 acc[R][N];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < N; ++j) acc[r][j] = mul(load(out + r * out_stride + d + 16 * j), set1(alpha[r]));
  for (int key = lo; key < hi; ++key) {
    const typename V::Element* from = V::row(v, key, d);
    if constexpr (V::kDirect) fetch(*fetcher, fetcher->per_value);
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
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < N; ++j) store(out + r * out_stride + d + 16 * j, acc[r][j]);
}

// One panel of values for up to kMaxRows rows.
template <class D, int R = kMaxRows>
void output_panel(int rows, const float* p, const PanelValues<D>& v, int lo, int hi, int d, int vecs, const float* alpha, float* out,
                  int64_t out_stride) {
  if constexpr (R > 1)
    if (rows < R) return output_panel<D, R - 1>(rows, p, v, lo, hi, d, vecs, alpha, out, out_stride);
  using V = PanelValues<D>;
  if (vecs >= kPanel) return output_block<V, false, R, kPanel>(p, v, lo, hi, d, 0, alpha, out, out_stride, nullptr);
  for (int j = 0; j < vecs; j += V::kVecs) output_block<V, false, R, V::kVecs>(p, v, lo, hi, d + 16 * j, 0, alpha, out, out_stride, nullptr);
}

// All Dv values for up to kDirectRows rows.
template <class D, int R = kDirectRows>
void output_few(int rows, const float* p, const DirectValues<D>& v, int lo, int hi, int v_dim, const float* alpha, float* out, int64_t out_stride,
                Fetcher& fetcher) {
  if constexpr (R > 1)
    if (rows < R) return output_few<D, R - 1>(rows, p, v, lo, hi, v_dim, alpha, out, out_stride, fetcher);
  using V = DirectValues<D>;
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
