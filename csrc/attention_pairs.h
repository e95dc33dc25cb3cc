// bf16 values by the CPU's dot products of pairs (VDPBF16PS), which take twice as many numbers as multiply-adds of fp32. The law, beside that of
// attention_block.h for parts and tiles:
//
//   base     of a row follows the largest score of a tile only where that is more than 8 binary orders above it: outputs seldom shrink
//   p        = 2^(score - base) rounded to bf16; a row's sum is of these
//   output  += p[2i + 1] * v[2i + 1], then += p[2i] * v[2i], each rounded: so the instruction has it. Pairs at absolute even keys, in ascending order
//
// Of a key that a row does not see p is 0, and its value counts as 0, whatever it is.
//
//   p in scratch       [row][32 pairs of a tile]             v  [panel of 32 dims][32 pairs][even dims, odd dims] of 16 lanes,
//                                                               a lane: v[2i] in its low half, v[2i + 1] in its high half
#pragma once
#include "attention_micro.h"
#include "attention_softmax.h"

#if defined(QUIRE_VECTOR_DOTS)
namespace quire {
namespace QUIRE_ISA {
namespace {

// As softmax_rows, but that pairs of bf16 lie where scores lay, and `max` is a base.
inline void softmax_pairs(int rows, int groups, const int* lo, const int* hi, float scale, float softcap, const float*, float* scores, float* max, float* sums,
                          float* alpha) {
  const Settled settled = settle(rows, groups, lo, hi, scale, softcap, scores, max, alpha);
  for (int r = 0; r < rows; ++r) {
    float* row = scores + r * kTile;
    const auto weight = [&](int j) { return exp2_of<true>(load(row + 16 * j), settled.factor, set1(settled.minus[r])); };
    F32x16 sum = zero();
    int j = 0;
    for (; j + 2 <= groups; j += 2) {
      const F32x16 p = weight(j), then = weight(j + 1);
      store_upper((uint16_t*)row + 16 * j, bits(p), bits(then));
      sum = add(add(sum, p), then);
    }
    for (; j < groups; ++j) {
      const F32x16 p = weight(j);
      store_upper((uint16_t*)row + 16 * j, bits(p));
      sum = add(sum, p);
    }
    store(sums + 16 * r, fma(load(sums + 16 * r), set1(alpha[r]), sum));
  }
}

// Values of two keys, 32 dims, to lanes of both: of even dims, and of odd ones.
QUIRE_INLINE void zip(U32x16 even_key, U32x16 odd_key, U32x16* x) {
  x[0] = {_mm512_mask_blend_epi16(0xaaaaaaaau, even_key.v, _mm512_slli_epi32(odd_key.v, 16))};
  x[1] = {_mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(even_key.v, 16), odd_key.v)};
}

constexpr int kPairPanel = 32;  // dims

// A tile's values zipped in scratch.
struct PanelPairs {
  static constexpr bool kDirect = false;
  const float* v;
  QUIRE_INLINE int64_t place(int pair, int d) { return (int64_t(d / kPairPanel) * (kTile / 2) + pair) * kPairPanel; }
  QUIRE_INLINE void read(const PanelPairs& s, int pair, int d, int, U32x16* x) {
    for (int j = 0; j < 2; ++j) x[j] = load_u32((const uint32_t*)s.v + place(pair, d) + 16 * j);
  }
};

// Values where they lie.
struct DirectPairs {
  static constexpr bool kDirect = true;
  const char* const* rows;
  QUIRE_INLINE void read(const DirectPairs& s, int pair, int d, int n, U32x16* x) {
    const uint16_t *const even = (const uint16_t*)s.rows[2 * pair] + d, *const odd = (const uint16_t*)s.rows[2 * pair + 1] + d;
    n == kPairPanel ? zip(load_pairs(even), load_pairs(odd), x) : zip(load_pairs_n(even, n), load_pairs_n(odd, n), x);
  }
};

// Adds the pairs first..end-1 to U units of 32 dims, of the last of which `n` exist; of each pair the halves in `seen`.
template <class V, bool kMasked, int R, int U>
QUIRE_INLINE void add_pairs(F32x16 (&acc)[R][2 * U], const float* p, const V& v, int first, int end, uint32_t seen, int d, int n, Fetcher* fetcher) {
  for (int pair = first; pair < end; ++pair) {
    if constexpr (V::kDirect) ask_together<2 * U>(*fetcher);
    U32x16 x[2 * U];
    QUIRE_UNROLL for (int u = 0; u < U; ++u) V::read(v, pair, d + kPairPanel * u, u + 1 < U ? kPairPanel : n, x + 2 * u);
    for (int j = 0; j < 2 * U && kMasked; ++j) x[j] = and_(x[j], set1_u32(seen));
    QUIRE_UNROLL for (int r = 0; r < R; ++r) {
      const U32x16 a = bits(set1(p[r * kTile + pair]));
      QUIRE_UNROLL for (int j = 0; j < 2 * U; ++j) acc[r][j] = dot_pair(acc[r][j], a, x[j]);
    }
  }
}

// out[r][d..] = out[r][d..] * alpha[r] + these pairs.
template <class V, bool kMasked, int R, int U>
void pair_block(const float* p, const V& v, int first, int end, uint32_t seen, int d, int n, const float* alpha, float* out, int64_t out_stride, Fetcher* fetcher) {
  F32x16 acc[R][2 * U];
  load_sums(acc, out + d, out_stride);
  shrink(acc, alpha);
  add_pairs<V, kMasked, R, U>(acc, p, v, first, end, seen, d, n, fetcher);
  store_sums(acc, out + d, out_stride);
}

constexpr float kOnes[kMaxRows] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// The keys lo..hi-1 as pairs: meet(first pair, end, halves that count, alpha), alpha once. At most one lone key at either end.
template <class Meet>
QUIRE_INLINE void for_pairs(int lo, int hi, const float* alpha, const Meet& meet) {
  const int first = (lo + 1) / 2, end = hi / 2;
  if (lo % 2 && lo < hi) {
    meet(lo / 2, lo / 2 + 1, 0xffff0000u, alpha);
    alpha = kOnes;
  }
  if (first < end || alpha != kOnes) meet(first, end > first ? end : first, ~0u, alpha);
  if (hi % 2 && hi > lo && end >= first) meet(end, end + 1, 0x0000ffffu, kOnes);
}

// Of a panel of values, for up to kMaxRows rows.
template <int R = kMaxRows>
void output_pairs_panel(int rows, const Terms* terms, int count, int d, int, float* out, int64_t out_stride) {
  if constexpr (R > 1)
    if (rows < R) return output_pairs_panel<R - 1>(rows, terms, count, d, 0, out, out_stride);
  F32x16 acc[R][2];
  load_sums(acc, out + d, out_stride);
  for (const Terms* t = terms; t < terms + count; ++t) {
    const PanelPairs values{t->values};
    shrink(acc, t->alpha);
    const int first = (t->lo + 1) / 2, end = t->hi / 2;
    if (t->lo % 2 && t->lo < t->hi) add_pairs<PanelPairs, true, R, 1>(acc, t->weights, values, t->lo / 2, first, 0xffff0000u, d, kPairPanel, nullptr);
    add_pairs<PanelPairs, false, R, 1>(acc, t->weights, values, first, end, ~0u, d, kPairPanel, nullptr);
    if (t->hi % 2 && t->hi > t->lo && end >= first) add_pairs<PanelPairs, true, R, 1>(acc, t->weights, values, end, end + 1, 0x0000ffffu, d, kPairPanel, nullptr);
  }
  store_sums(acc, out + d, out_stride);
}

// All values for up to kDirectRows rows.
template <int R = kDirectRows>
void output_pairs_few(int rows, const float* p, const char* const* values, int lo, int hi, int v_dim, const float* alpha, float* out, int64_t out_stride,
                      Fetcher& fetcher) {
  if constexpr (R > 1)
    if (rows < R) return output_pairs_few<R - 1>(rows, p, values, lo, hi, v_dim, alpha, out, out_stride, fetcher);
  constexpr int kUnits = R <= 2 ? 4 : R <= 4 ? 2 : 1;
  for_pairs(lo, hi, alpha, [&](int first, int end, uint32_t seen, const float* shrink) {
    const auto wide = seen == ~0u ? &pair_block<DirectPairs, false, R, kUnits> : &pair_block<DirectPairs, true, R, kUnits>;
    const auto one = seen == ~0u ? &pair_block<DirectPairs, false, R, 1> : &pair_block<DirectPairs, true, R, 1>;
    int d = 0;
    for (; d + kUnits * kPairPanel <= v_dim; d += kUnits * kPairPanel) wide(p, {values}, first, end, seen, d, kPairPanel, shrink, out, out_stride, &fetcher);
    for (; d < v_dim; d += kPairPanel) one(p, {values}, first, end, seen, d, v_dim - d < kPairPanel ? v_dim - d : kPairPanel, shrink, out, out_stride, &fetcher);
  });
}

// A tile's values to zipped panels. False if one is not finite.
inline bool copy_pairs(const Rows& rows, int v_dim, float* panels) {
  __m512i most = _mm512_setzero_si512();
  for (int d = 0; d < v_dim; d += kPairPanel) {
    const int n = v_dim - d < kPairPanel ? v_dim - d : kPairPanel;
    for (int pair = rows.lo / 2; pair < (rows.hi + 1) / 2; ++pair) {
      U32x16 x[2];
      DirectPairs::read({rows.v}, pair, d, n, x);
      for (int j = 0; j < 2; ++j) {
        store_u32((uint32_t*)panels + PanelPairs::place(pair, d) + 16 * j, x[j]);
        most = _mm512_max_epu16(most, and_(x[j], set1_u32(0x7fff7fffu)).v);
      }
    }
  }
  return _mm512_cmpge_epu16_mask(most, _mm512_set1_epi16(0x7f80)) == 0;
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
