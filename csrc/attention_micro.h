// The two products of attention on one tile of keys, blocked in registers: scores = q . K and output += p . V.
// Every lane of every accumulator meets its terms one by one in the same order (over the head dimension for scores, over
// the keys for the output), however many rows or vectors share the loop: that is what keeps a row's bits its own.
#pragma once
#include "simd.h"

namespace quire {
namespace QUIRE_ISA {
namespace {

constexpr int kTile = 64;  // keys; tiles start at absolute positions that are multiples of this

// Rows x vectors held in registers: accumulators, one row of the other operand and a broadcast must fit. Up to kDirectRows
// query rows, keys and values are widened as they are used; beyond, once for all rows.
#if defined(QUIRE_AVX512)
constexpr int kMaxRows = 6, kMaxVecs = 4, kLoneVecs = 8, kDirectRows = 6;
#elif defined(QUIRE_AVX2)
constexpr int kMaxRows = 6, kMaxVecs = 1, kLoneVecs = 4, kDirectRows = 3;
#else
constexpr int kMaxRows = 2, kMaxVecs = 1, kLoneVecs = 2, kDirectRows = 1;
#endif

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

// How a tile of keys lies in scratch, transposed: fp32 [Dk][kTile], or bf16 pairs [ceil(Dk/2)][kTile] of 32 bits, which
// are widened in the loop (few rows: less to store) or fed to the CPU's own bf16 dot product.
enum class Keys { kFloat, kWidenPairs, kDotPairs };

// scores[r][j] = sum over d of q[r][d] * kt[d][j], for R rows and 16 * N keys.
template <Keys F, int R, int N>
void score_block(const float* q, int64_t q_stride, const float* kt, int k_dim, float* scores, Fetcher& fetcher) {
  F32x16 acc[R][N];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < N; ++j) acc[r][j] = zero();
  if constexpr (F == Keys::kFloat) {
    for (int d = 0; d < k_dim; ++d, kt += kTile) {
      F32x16 k[N];
      for (int j = 0; j < N; ++j) k[j] = load(kt + 16 * j);
      for (int r = 0; r < R; ++r) {
        const F32x16 a = set1(q[r * q_stride + d]);
        for (int j = 0; j < N; ++j) acc[r][j] = fma(a, k[j], acc[r][j]);
      }
    }
  } else if constexpr (F == Keys::kWidenPairs) {
    for (int d = 0; d < k_dim; d += 2, kt += kTile) {
      if (d % 16 == 0) fetch(fetcher, fetcher.per_step);
      U32x16 k[N];
      for (int j = 0; j < N; ++j) k[j] = bits(load(kt + 16 * j));
      for (int r = 0; r < R; ++r) {
        const F32x16 a = set1(q[r * q_stride + d]);
        for (int j = 0; j < N; ++j) acc[r][j] = fma(a, pair_low(k[j]), acc[r][j]);
      }
      for (int r = 0; r < R; ++r) {
        const F32x16 a = set1(q[r * q_stride + d + 1]);
        for (int j = 0; j < N; ++j) acc[r][j] = fma(a, pair_high(k[j]), acc[r][j]);
      }
    }
  } else {
    for (int d = 0; d < k_dim; d += 2, kt += kTile) {
      U32x16 k[N];
      for (int j = 0; j < N; ++j) k[j] = bits(load(kt + 16 * j));
      for (int r = 0; r < R; ++r) {
        const U32x16 a = bits(set1(q[r * q_stride + d / 2]));
        for (int j = 0; j < N; ++j) acc[r][j] = dot_pair(acc[r][j], a, k[j]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < N; ++j) store(scores + r * kTile + 16 * j, acc[r][j]);
}

// `num_vecs` groups of 16 keys, at most kMaxVecs at a time.
template <Keys F, int R>
void score_rows(const float* q, int64_t q_stride, const float* kt, int k_dim, int num_vecs, float* scores, Fetcher& fetcher) {
  int j = 0;
  for (; j + kMaxVecs <= num_vecs; j += kMaxVecs) score_block<F, R, kMaxVecs>(q, q_stride, kt + 16 * j, k_dim, scores + 16 * j, fetcher);
  if constexpr (kMaxVecs > 1) {
    switch (num_vecs - j) {
      case 1: score_block<F, R, 1>(q, q_stride, kt + 16 * j, k_dim, scores + 16 * j, fetcher); break;
      case 2: score_block<F, R, 2>(q, q_stride, kt + 16 * j, k_dim, scores + 16 * j, fetcher); break;
      case 3: score_block<F, R, 3>(q, q_stride, kt + 16 * j, k_dim, scores + 16 * j, fetcher); break;
      default: break;
    }
  }
}

template <Keys F>
void score(int rows, const float* q, int64_t q_stride, const float* kt, int k_dim, int num_vecs, float* scores, Fetcher& fetcher) {
  switch (rows) {
    case 1: return score_rows<F, 1>(q, q_stride, kt, k_dim, num_vecs, scores, fetcher);
    case 2: return score_rows<F, 2>(q, q_stride, kt, k_dim, num_vecs, scores, fetcher);
#if !defined(QUIRE_PLAIN)
    case 3: return score_rows<F, 3>(q, q_stride, kt, k_dim, num_vecs, scores, fetcher);
    case 4: return score_rows<F, 4>(q, q_stride, kt, k_dim, num_vecs, scores, fetcher);
    case 5: return score_rows<F, 5>(q, q_stride, kt, k_dim, num_vecs, scores, fetcher);
    case 6: return score_rows<F, 6>(q, q_stride, kt, k_dim, num_vecs, scores, fetcher);
#endif
    default: __builtin_unreachable();
  }
}

// Where a tile's values come from: widened in scratch [kTile][v_stride], or straight from pages and staged rows.
struct WidenedValues {
  using Element = float;
  static constexpr bool kDirect = false;
  static constexpr int kVecs = 1;
  const float* v;
  int64_t v_stride;
  QUIRE_INLINE const float* row(const WidenedValues& s, int key) { return s.v + key * s.v_stride; }
  QUIRE_INLINE void read(const float* p, F32x16* x) { x[0] = load(p); }
  QUIRE_INLINE void read_n(const float* p, F32x16* x, int) { x[0] = load(p); }
};
template <class D>
struct DirectValues {
  using Element = typename D::Element;
  static constexpr bool kDirect = true;
  static constexpr int kVecs = D::kVecs;
  const Element* const* rows;
  QUIRE_INLINE const Element* row(const DirectValues& s, int key) { return s.rows[key]; }
  QUIRE_INLINE void read(const Element* p, F32x16* x) { D::read(p, x); }
  QUIRE_INLINE void read_n(const Element* p, F32x16* x, int n) { D::read_n(p, x, n); }
};

// out[r][d..] = out[r][d..] * alpha[r] + sum over keys lo <= key < hi of p[r][key] * v[key][d..], for 16 * N values, N a
// multiple of V::kVecs. With kEnd there is just one unit of values, of which only `tail` exist.
template <class V, bool kEnd, int R, int N>
void output_block(const float* p, const V& v, int lo, int hi, int d, int tail, const float* alpha, float* out, int64_t out_stride, Fetcher& fetcher) {
  static_assert(N % V::kVecs == 0 && (!kEnd || N == V::kVecs), "values come in whole units");
  F32x16 acc[R][N];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < N; ++j) acc[r][j] = mul(load(out + r * out_stride + d + 16 * j), set1(alpha[r]));
  for (int key = lo; key < hi; ++key) {
    const typename V::Element* from = V::row(v, key) + d;
    if constexpr (V::kDirect) fetch(fetcher, fetcher.per_value);
    F32x16 x[N];
    if constexpr (kEnd) {
      V::read_n(from, x, tail);
    } else {
      for (int j = 0; j < N; j += V::kVecs) V::read(from + 16 * j, x + j);
    }
    for (int r = 0; r < R; ++r) {
      const F32x16 a = set1(p[r * kTile + key]);
      for (int j = 0; j < N; ++j) acc[r][j] = fma(a, x[j], acc[r][j]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < N; ++j) store(out + r * out_stride + d + 16 * j, acc[r][j]);
}

template <class V, int R>
void output_rows(const float* p, const V& v, int lo, int hi, int v_dim, const float* alpha, float* out, int64_t out_stride, Fetcher& fetcher) {
  constexpr int kUnit = V::kVecs, kMost = kMaxVecs > kUnit ? kMaxVecs : kUnit;
  constexpr int kVecs = R * kLoneVecs <= kMaxRows * kMaxVecs ? kLoneVecs : kMost;
  int d = 0;
  for (; d + 16 * kVecs <= v_dim; d += 16 * kVecs) output_block<V, false, R, kVecs>(p, v, lo, hi, d, 0, alpha, out, out_stride, fetcher);
  if constexpr (kVecs > 4)
    for (; d + 64 <= v_dim; d += 64) output_block<V, false, R, 4>(p, v, lo, hi, d, 0, alpha, out, out_stride, fetcher);
  for (; d + 16 * kUnit <= v_dim; d += 16 * kUnit) output_block<V, false, R, kUnit>(p, v, lo, hi, d, 0, alpha, out, out_stride, fetcher);
  if (d < v_dim) output_block<V, true, R, kUnit>(p, v, lo, hi, d, v_dim - d, alpha, out, out_stride, fetcher);
}

template <class V>
void output(int rows, const float* p, const V& v, int lo, int hi, int v_dim, const float* alpha, float* out, int64_t out_stride, Fetcher& fetcher) {
  switch (rows) {
    case 1: return output_rows<V, 1>(p, v, lo, hi, v_dim, alpha, out, out_stride, fetcher);
    case 2: return output_rows<V, 2>(p, v, lo, hi, v_dim, alpha, out, out_stride, fetcher);
#if !defined(QUIRE_PLAIN)
    case 3: return output_rows<V, 3>(p, v, lo, hi, v_dim, alpha, out, out_stride, fetcher);
    case 4: return output_rows<V, 4>(p, v, lo, hi, v_dim, alpha, out, out_stride, fetcher);
    case 5: return output_rows<V, 5>(p, v, lo, hi, v_dim, alpha, out, out_stride, fetcher);
    case 6: return output_rows<V, 6>(p, v, lo, hi, v_dim, alpha, out, out_stride, fetcher);
#endif
    default: __builtin_unreachable();
  }
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
