// simd.h for AVX-512 F, BW, VL, DQ.
#pragma once
#include "isa.h"

#if defined(QUIRE_AVX512)
namespace quire {
namespace QUIRE_ISA {
namespace {

struct F32x16 {
  __m512 v;
};
struct U32x16 {
  __m512i v;
};
struct Mask16 {
  __mmask16 m;
};

QUIRE_INLINE __mmask16 first_lanes(int n) { return __mmask16((1u << n) - 1u); }

QUIRE_INLINE F32x16 zero() { return {_mm512_setzero_ps()}; }
QUIRE_INLINE F32x16 set1(float x) { return {_mm512_set1_ps(x)}; }
QUIRE_INLINE F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
QUIRE_INLINE F32x16 load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
QUIRE_INLINE void store(float* p, F32x16 x) { _mm512_storeu_ps(p, x.v); }
QUIRE_INLINE void store_n(float* p, F32x16 x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x.v); }
QUIRE_INLINE F32x16 add(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
QUIRE_INLINE F32x16 sub(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
QUIRE_INLINE F32x16 mul(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
QUIRE_INLINE F32x16 div(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
QUIRE_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
QUIRE_INLINE F32x16 fnma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
QUIRE_INLINE F32x16 max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
QUIRE_INLINE F32x16 min(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
QUIRE_INLINE F32x16 round_nearest(F32x16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// x * 2^n for an integral n in [-126, 128].
QUIRE_INLINE F32x16 scale_pow2(F32x16 x, F32x16 n) { return {_mm512_scalef_ps(x.v, n.v)}; }

QUIRE_INLINE U32x16 load_u32(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
QUIRE_INLINE void store_u32(uint32_t* p, U32x16 x) { _mm512_storeu_si512(p, x.v); }
QUIRE_INLINE U32x16 set1_u32(uint32_t x) { return {_mm512_set1_epi32(int(x))}; }
QUIRE_INLINE U32x16 add(U32x16 a, U32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
QUIRE_INLINE U32x16 mul(U32x16 a, U32x16 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
QUIRE_INLINE U32x16 xor_(U32x16 a, U32x16 b) { return {_mm512_xor_si512(a.v, b.v)}; }
QUIRE_INLINE U32x16 and_(U32x16 a, U32x16 b) { return {_mm512_and_si512(a.v, b.v)}; }
QUIRE_INLINE U32x16 or_(U32x16 a, U32x16 b) { return {_mm512_or_si512(a.v, b.v)}; }
QUIRE_INLINE U32x16 load_cell(const void* p) {
  int x;
  memcpy(&x, p, sizeof(x));
  return {_mm512_set1_epi32(x)};
}
template <int N>
QUIRE_INLINE U32x16 shl(U32x16 a) { return {_mm512_slli_epi32(a.v, N)}; }
template <int N>
QUIRE_INLINE U32x16 shr(U32x16 a) { return {_mm512_srli_epi32(a.v, N)}; }
// The lanes as signed integers.
QUIRE_INLINE F32x16 to_f32(U32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
QUIRE_INLINE U32x16 to_i32(F32x16 a) { return {_mm512_cvtps_epi32(a.v)}; }
QUIRE_INLINE U32x16 bits(F32x16 a) { return {_mm512_castps_si512(a.v)}; }
QUIRE_INLINE F32x16 floats(U32x16 a) { return {_mm512_castsi512_ps(a.v)}; }

QUIRE_INLINE Mask16 lt(F32x16 a, F32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
QUIRE_INLINE Mask16 gt(F32x16 a, F32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
QUIRE_INLINE Mask16 eq(F32x16 a, F32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
// Lanes lo <= i < hi; 0 <= lo, hi <= 16.
QUIRE_INLINE Mask16 lanes_between(int lo, int hi) { return {__mmask16(first_lanes(hi) & ~first_lanes(lo))}; }
QUIRE_INLINE Mask16 lanes_of(uint32_t bits) { return {__mmask16(bits)}; }
QUIRE_INLINE F32x16 select(Mask16 m, F32x16 yes, F32x16 no) { return {_mm512_mask_blend_ps(m.m, no.v, yes.v)}; }
QUIRE_INLINE uint32_t mask_bits(Mask16 m) { return m.m; }

// Always in the order ((i, i+8), i+4, i+2, i+1).
QUIRE_INLINE float sum_lanes(F32x16 a) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
QUIRE_INLINE float max_lanes(F32x16 a) {
  const __m256 h = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}

// The largest lane of each of sixteen vectors.
QUIRE_INLINE F32x16 max_of_each(F32x16 (&x)[16]) {
  const auto larger = [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); };
  const auto pairs = [](__m512 a, __m512 b) { return _mm512_castps_pd(_mm512_max_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b))); };
  __m512 fours[4];
  QUIRE_UNROLL for (int i = 0; i < 4; ++i) {
    const __m512d a = pairs(x[4 * i].v, x[4 * i + 1].v), b = pairs(x[4 * i + 2].v, x[4 * i + 3].v);
    fours[i] = larger(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const auto halves = [&](__m512 a, __m512 b) { return larger(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); };
  return {halves(halves(fours[0], fours[1]), halves(fours[2], fours[3]))};
}

QUIRE_INLINE F32x16 widen_bf16(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }
// fp32 rounded to bf16 in the upper half of each lane; the lower half is rubbish.
QUIRE_INLINE U32x16 round_bf16(F32x16 x) {
  const __m512i u = _mm512_castps_si512(x.v);
  const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000)), nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i half = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), up = _mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1));
  return {_mm512_mask_or_epi32(up, nan, u, _mm512_set1_epi32(0x400000))};
}
QUIRE_INLINE __m256i upper_halves(U32x16 u) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(u.v, 16)); }
QUIRE_INLINE __m256i narrow_bf16(F32x16 x) { return upper_halves(round_bf16(x)); }
QUIRE_INLINE F32x16 load_bf16(const uint16_t* p) { return widen_bf16(_mm256_loadu_si256((const __m256i*)p)); }
QUIRE_INLINE F32x16 load_bf16_n(const uint16_t* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
QUIRE_INLINE void store_bf16(uint16_t* p, F32x16 x) { _mm256_storeu_si256((__m256i*)p, narrow_bf16(x)); }
// The upper half of each lane.
QUIRE_INLINE void store_upper(uint16_t* p, U32x16 u) { _mm256_storeu_si256((__m256i*)p, upper_halves(u)); }
// Of one vector and then of the next one.
QUIRE_INLINE void store_upper(uint16_t* p, U32x16 u, U32x16 then) {
  const __m512i odd = _mm512_setr_epi32(0x00030001, 0x00070005, 0x000b0009, 0x000f000d, 0x00130011, 0x00170015, 0x001b0019, 0x001f001d,
                                        0x00230021, 0x00270025, 0x002b0029, 0x002f002d, 0x00330031, 0x00370035, 0x003b0039, 0x003f003d);
  _mm512_storeu_si512(p, _mm512_permutex2var_epi16(u.v, odd, then.v));
}
QUIRE_INLINE void store_bf16_n(uint16_t* p, F32x16 x, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_bf16(x)); }
QUIRE_INLINE F32x16 load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
QUIRE_INLINE F32x16 load_f16_n(const uint16_t* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p))}; }
QUIRE_INLINE void store_f16(uint16_t* p, F32x16 x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
QUIRE_INLINE void store_f16_n(uint16_t* p, F32x16 x, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// n <= 32 elements of 16 bits as 16 pairs; elements past n are zero.
QUIRE_INLINE U32x16 load_pairs_n(const uint16_t* p, int n) {
  return {_mm512_maskz_loadu_epi16(n >= 32 ? ~__mmask32(0) : (__mmask32(1) << n) - 1u, p)};
}

QUIRE_INLINE U32x16 load_pairs(const uint16_t* p) { return {_mm512_loadu_si512(p)}; }
QUIRE_INLINE void store_pairs_n(uint16_t* p, U32x16 x, int n) {
  _mm512_mask_storeu_epi16(p, n >= 32 ? ~__mmask32(0) : (__mmask32(1) << n) - 1u, x.v);
}

QUIRE_INLINE U32x16 load_bytes(const char* p) { return {_mm512_loadu_si512(p)}; }
QUIRE_INLINE U32x16 load_bytes_n(const char* p, int n) { return {_mm512_maskz_loadu_epi8(n >= 64 ? ~__mmask64(0) : (__mmask64(1) << n) - 1u, p)}; }
QUIRE_INLINE U32x16 load_u8(const char* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
QUIRE_INLINE U32x16 load_u8_n(const char* p, int n) { return {_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p))}; }
QUIRE_INLINE F32x16 load_int8(const char* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))}; }
QUIRE_INLINE F32x16 load_int8_n(const char* p, int n) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p)))}; }

QUIRE_INLINE U32x16 max_halves(U32x16 a, U32x16 b) { return {_mm512_max_epu16(a.v, b.v)}; }
QUIRE_INLINE uint32_t max_lanes(U32x16 a) { return _mm512_reduce_max_epu32(a.v); }
QUIRE_INLINE uint32_t sum_lanes(U32x16 a) { return uint32_t(_mm512_reduce_add_epi32(a.v)); }
template <int N>
QUIRE_INLINE U32x16 shr_words(U32x16 a) { return {_mm512_srli_epi16(a.v, N)}; }
QUIRE_INLINE U32x16 add_words(U32x16 a, U32x16 b) { return {_mm512_add_epi16(a.v, b.v)}; }
QUIRE_INLINE U32x16 settled(U32x16 a) {
  asm("" : "+v"(a.v));
  return a;
}
QUIRE_INLINE U32x16 dot_words(U32x16 a, U32x16 b) { return {_mm512_madd_epi16(a.v, b.v)}; }
QUIRE_INLINE U32x16 words_of_bytes(U32x16 bytes, U32x16 by) { return {_mm512_maddubs_epi16(bytes.v, by.v)}; }
QUIRE_INLINE U32x16 shuffle16(U32x16 a, const uint8_t (&order)[16]) {
  return {_mm512_shuffle_epi8(a.v, _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)order)))};
}
QUIRE_INLINE U32x16 shuffle16(U32x16 a, U32x16 order) { return {_mm512_shuffle_epi8(a.v, order.v)}; }
QUIRE_INLINE U32x16 load_16_for_all(const void* p) { return {_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p))}; }
QUIRE_INLINE U32x16 low_words(U32x16 low, U32x16 high) { return {_mm512_unpacklo_epi8(low.v, high.v)}; }
QUIRE_INLINE U32x16 high_words(U32x16 low, U32x16 high) { return {_mm512_unpackhi_epi8(low.v, high.v)}; }
QUIRE_INLINE U32x16 bytes_of_words(U32x16 a, U32x16 b) { return {_mm512_packus_epi16(a.v, b.v)}; }
QUIRE_INLINE U32x16 sub_bytes(U32x16 a, U32x16 b) { return {_mm512_sub_epi8(a.v, b.v)}; }
QUIRE_INLINE U32x16 min_bytes(U32x16 a, U32x16 b) { return {_mm512_min_epu8(a.v, b.v)}; }
QUIRE_INLINE U32x16 max_bytes(U32x16 a, U32x16 b) { return {_mm512_max_epu8(a.v, b.v)}; }
QUIRE_INLINE bool same(U32x16 a, U32x16 b) { return _mm512_cmpneq_epi32_mask(a.v, b.v) == 0; }
QUIRE_INLINE void store_bytes(char* p, U32x16 words) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi16_epi8(words.v)); }

// Adds the products of four unsigned bytes of a lane with four signed ones: for CPUs with AVX512-VNNI. Written out, since it is compiled for others, too,
// and GCC 12 keeps sums of its intrinsic in memory between steps.
QUIRE_INLINE U32x16 dot_bytes(U32x16 sum, U32x16 bytes, U32x16 by) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(bytes.v), "v"(by.v));
  return sum;
}
// The same four for all lanes, at `cell`: an operand in memory, so that sums may fill the registers.
QUIRE_INLINE U32x16 dot_bytes(U32x16 sum, U32x16 bytes, const void* cell) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum.v) : "v"(bytes.v), "m"(*(const uint32_t*)cell));
  return sum;
}
#if defined(QUIRE_BF16_DOT)
QUIRE_INLINE F32x16 dot_pair(F32x16 acc, U32x16 a, U32x16 b) {
  return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)};
}
// fp32 rounded to pairs of bf16, by the CPU's own instruction.
QUIRE_INLINE U32x16 brain_pairs(F32x16 low, F32x16 high) {
  alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                             8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return {_mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v))};
}
#endif

// r[i] lane j <-> r[j] lane i.
QUIRE_INLINE void transpose16(F32x16 r[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  __m512 u[16];
  for (int i = 0; i < 16; i += 4) {
    for (int k = 0; k < 2; ++k) {
      const __m512d lo = _mm512_castps_pd(t[i + k]), hi = _mm512_castps_pd(t[i + 2 + k]);
      u[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
      u[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
    }
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88), b = _mm512_shuffle_f32x4(u[i], u[i + 4], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0x88), d = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0xdd);
    r[i].v = _mm512_shuffle_f32x4(a, c, 0x88);
    r[i + 8].v = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[i + 4].v = _mm512_shuffle_f32x4(b, d, 0x88);
    r[i + 12].v = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
