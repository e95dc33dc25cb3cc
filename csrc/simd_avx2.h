// simd.h for AVX2, FMA and F16C: two registers of eight lanes.
#pragma once
#include "isa.h"

#if defined(QUIRE_AVX2)
namespace quire {
namespace QUIRE_ISA {
namespace {

struct F32x16 {
  __m256 a, b;
};
struct U32x16 {
  __m256i a, b;
};
struct Mask16 {
  __m256 a, b;
};

// All bits set in lanes first + i < n.
QUIRE_INLINE __m256i first_lanes(int n, int first) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n - first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

QUIRE_INLINE F32x16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
QUIRE_INLINE F32x16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
QUIRE_INLINE F32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
QUIRE_INLINE F32x16 load_n(const float* p, int n) {
  return {_mm256_maskload_ps(p, first_lanes(n, 0)), _mm256_maskload_ps(p + 8, first_lanes(n, 8))};
}
QUIRE_INLINE void store(float* p, F32x16 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
QUIRE_INLINE void store_n(float* p, F32x16 x, int n) {
  _mm256_maskstore_ps(p, first_lanes(n, 0), x.a);
  _mm256_maskstore_ps(p + 8, first_lanes(n, 8), x.b);
}

#define QUIRE_BINARY(name, type, op) \
  QUIRE_INLINE type name(type x, type y) { return {op(x.a, y.a), op(x.b, y.b)}; }
QUIRE_BINARY(add, F32x16, _mm256_add_ps)
QUIRE_BINARY(sub, F32x16, _mm256_sub_ps)
QUIRE_BINARY(mul, F32x16, _mm256_mul_ps)
QUIRE_BINARY(div, F32x16, _mm256_div_ps)
QUIRE_BINARY(max, F32x16, _mm256_max_ps)
QUIRE_BINARY(min, F32x16, _mm256_min_ps)
QUIRE_BINARY(add, U32x16, _mm256_add_epi32)
QUIRE_BINARY(mul, U32x16, _mm256_mullo_epi32)
QUIRE_BINARY(xor_, U32x16, _mm256_xor_si256)
QUIRE_BINARY(and_, U32x16, _mm256_and_si256)
QUIRE_BINARY(or_, U32x16, _mm256_or_si256)
QUIRE_BINARY(max_halves, U32x16, _mm256_max_epu16)
QUIRE_BINARY(add_words, U32x16, _mm256_add_epi16)
QUIRE_BINARY(dot_words, U32x16, _mm256_madd_epi16)
QUIRE_BINARY(words_of_bytes, U32x16, _mm256_maddubs_epi16)
QUIRE_BINARY(shuffle16, U32x16, _mm256_shuffle_epi8)
QUIRE_BINARY(low_words, U32x16, _mm256_unpacklo_epi8)
QUIRE_BINARY(high_words, U32x16, _mm256_unpackhi_epi8)
QUIRE_BINARY(bytes_of_words, U32x16, _mm256_packus_epi16)
QUIRE_BINARY(sub_bytes, U32x16, _mm256_sub_epi8)
QUIRE_BINARY(min_bytes, U32x16, _mm256_min_epu8)
QUIRE_BINARY(max_bytes, U32x16, _mm256_max_epu8)
#undef QUIRE_BINARY

QUIRE_INLINE F32x16 fma(F32x16 x, F32x16 y, F32x16 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
QUIRE_INLINE F32x16 fnma(F32x16 x, F32x16 y, F32x16 z) { return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)}; }
QUIRE_INLINE F32x16 round_nearest(F32x16 x) {
  return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

QUIRE_INLINE U32x16 load_u32(const uint32_t* p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))}; }
QUIRE_INLINE void store_u32(uint32_t* p, U32x16 x) {
  _mm256_storeu_si256((__m256i*)p, x.a);
  _mm256_storeu_si256((__m256i*)(p + 8), x.b);
}
QUIRE_INLINE U32x16 set1_u32(uint32_t x) { return {_mm256_set1_epi32(int(x)), _mm256_set1_epi32(int(x))}; }
QUIRE_INLINE U32x16 load_cell(const void* p) {
  int x;
  memcpy(&x, p, sizeof(x));
  return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)};
}
template <int N>
QUIRE_INLINE U32x16 shl(U32x16 x) { return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)}; }
template <int N>
QUIRE_INLINE U32x16 shr(U32x16 x) { return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)}; }
// The lanes as signed integers.
QUIRE_INLINE F32x16 to_f32(U32x16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
QUIRE_INLINE U32x16 to_i32(F32x16 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
QUIRE_INLINE U32x16 bits(F32x16 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
QUIRE_INLINE F32x16 floats(U32x16 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }

// x * 2^n for an integral n in [-126, 128]: two factors, since 2^128 is no float.
QUIRE_INLINE __m256 power_of_two(__m256i n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23)); }
QUIRE_INLINE __m256 scale_pow2(__m256 x, __m256 n) {
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  return _mm256_mul_ps(_mm256_mul_ps(x, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
}
QUIRE_INLINE F32x16 scale_pow2(F32x16 x, F32x16 n) { return {scale_pow2(x.a, n.a), scale_pow2(x.b, n.b)}; }

QUIRE_INLINE Mask16 lt(F32x16 x, F32x16 y) { return {_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ)}; }
QUIRE_INLINE Mask16 gt(F32x16 x, F32x16 y) { return {_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ)}; }
QUIRE_INLINE Mask16 eq(F32x16 x, F32x16 y) { return {_mm256_cmp_ps(x.a, y.a, _CMP_EQ_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_EQ_OQ)}; }
// Lanes lo <= i < hi; 0 <= lo, hi <= 16.
QUIRE_INLINE Mask16 lanes_between(int lo, int hi) {
  return {_mm256_castsi256_ps(_mm256_andnot_si256(first_lanes(lo, 0), first_lanes(hi, 0))),
          _mm256_castsi256_ps(_mm256_andnot_si256(first_lanes(lo, 8), first_lanes(hi, 8)))};
}
QUIRE_INLINE Mask16 lanes_of(uint32_t bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), low = _mm256_set1_epi32(int(bits)), high = _mm256_set1_epi32(int(bits >> 8));
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(low, lane), lane)),
          _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(high, lane), lane))};
}
QUIRE_INLINE F32x16 select(Mask16 m, F32x16 yes, F32x16 no) { return {_mm256_blendv_ps(no.a, yes.a, m.a), _mm256_blendv_ps(no.b, yes.b, m.b)}; }
QUIRE_INLINE uint32_t mask_bits(Mask16 m) { return uint32_t(_mm256_movemask_ps(m.a)) | uint32_t(_mm256_movemask_ps(m.b)) << 8; }

// Always in the order ((i, i+8), i+4, i+2, i+1).
QUIRE_INLINE float sum_lanes(F32x16 x) {
  const __m256 h = _mm256_add_ps(x.a, x.b);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
QUIRE_INLINE float max_lanes(F32x16 x) {
  const __m256 h = _mm256_max_ps(x.a, x.b);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}

QUIRE_INLINE __m256 widen_bf16(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
QUIRE_INLINE __m128i upper_halves(__m256i u) {
  u = _mm256_srli_epi32(u, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
}
QUIRE_INLINE __m128i narrow_bf16(__m256 x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return upper_halves(_mm256_blendv_epi8(rounded, quiet, nan));
}
QUIRE_INLINE F32x16 load_bf16(const uint16_t* p) {
  return {widen_bf16(_mm_loadu_si128((const __m128i*)p)), widen_bf16(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
QUIRE_INLINE void store_bf16(uint16_t* p, F32x16 x) {
  _mm_storeu_si128((__m128i*)p, narrow_bf16(x.a));
  _mm_storeu_si128((__m128i*)(p + 8), narrow_bf16(x.b));
}
QUIRE_INLINE void store_upper(uint16_t* p, U32x16 u) {
  _mm_storeu_si128((__m128i*)p, upper_halves(u.a));
  _mm_storeu_si128((__m128i*)(p + 8), upper_halves(u.b));
}
QUIRE_INLINE F32x16 load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
QUIRE_INLINE void store_f16(uint16_t* p, F32x16 x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// AVX2 has no masked access to 16-bit lanes: the ends of rows go through a small buffer.
QUIRE_INLINE F32x16 load_bf16_n(const uint16_t* p, int n) {
  uint16_t buffer[16] = {};
  memcpy(buffer, p, size_t(n) * 2);
  return load_bf16(buffer);
}
QUIRE_INLINE void store_bf16_n(uint16_t* p, F32x16 x, int n) {
  uint16_t buffer[16];
  store_bf16(buffer, x);
  memcpy(p, buffer, size_t(n) * 2);
}
QUIRE_INLINE F32x16 load_f16_n(const uint16_t* p, int n) {
  uint16_t buffer[16] = {};
  memcpy(buffer, p, size_t(n) * 2);
  return load_f16(buffer);
}
QUIRE_INLINE void store_f16_n(uint16_t* p, F32x16 x, int n) {
  uint16_t buffer[16];
  store_f16(buffer, x);
  memcpy(p, buffer, size_t(n) * 2);
}
// n <= 32 elements of 16 bits as 16 pairs; elements past n are zero.
QUIRE_INLINE U32x16 load_pairs_n(const uint16_t* p, int n) {
  uint16_t buffer[32] = {};
  memcpy(buffer, p, size_t(n) * 2);
  return load_u32((const uint32_t*)buffer);
}
QUIRE_INLINE U32x16 load_pairs(const uint16_t* p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 16))}; }
QUIRE_INLINE void store_pairs_n(uint16_t* p, U32x16 x, int n) { memcpy(p, &x, size_t(n < 32 ? n : 32) * 2); }

QUIRE_INLINE U32x16 load_bytes(const char* p) { return load_u32((const uint32_t*)p); }
QUIRE_INLINE U32x16 load_bytes_n(const char* p, int n) {
  char buffer[64] = {};
  memcpy(buffer, p, size_t(n < 64 ? n : 64));
  return load_bytes(buffer);
}
QUIRE_INLINE U32x16 load_u8(const char* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)), _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}
QUIRE_INLINE F32x16 load_int8(const char* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}
QUIRE_INLINE U32x16 load_u8_n(const char* p, int n) {
  char buffer[16] = {};
  memcpy(buffer, p, size_t(n));
  return load_u8(buffer);
}
QUIRE_INLINE F32x16 load_int8_n(const char* p, int n) {
  char buffer[16] = {};
  memcpy(buffer, p, size_t(n));
  return load_int8(buffer);
}

template <int N>
QUIRE_INLINE U32x16 shr_words(U32x16 x) { return {_mm256_srli_epi16(x.a, N), _mm256_srli_epi16(x.b, N)}; }
#if defined(QUIRE_MAYBE_VNNI)
// Adds the products of four unsigned bytes of a lane with four signed ones: for CPUs with AVX-VNNI. Written out, since it is compiled for others, too.
QUIRE_INLINE U32x16 dot_bytes(U32x16 sum, U32x16 bytes, U32x16 by) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum.a) : "x"(bytes.a), "x"(by.a));
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum.b) : "x"(bytes.b), "x"(by.b));
  return sum;
}
QUIRE_INLINE U32x16 dot_bytes(U32x16 sum, U32x16 bytes, const void* cell) { return dot_bytes(sum, bytes, load_cell(cell)); }
#endif
QUIRE_INLINE U32x16 settled(U32x16 x) {
  asm("" : "+x"(x.a), "+x"(x.b));
  return x;
}
QUIRE_INLINE uint32_t max_lanes(U32x16 x) {
  const __m256i h = _mm256_max_epu32(x.a, x.b);
  __m128i q = _mm_max_epu32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
  q = _mm_max_epu32(q, _mm_shuffle_epi32(q, 0x4e));
  return uint32_t(_mm_cvtsi128_si32(_mm_max_epu32(q, _mm_shuffle_epi32(q, 0xb1))));
}
QUIRE_INLINE uint32_t sum_lanes(U32x16 x) {
  const __m256i h = _mm256_add_epi32(x.a, x.b);
  __m128i q = _mm_add_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
  q = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0x4e));
  return uint32_t(_mm_cvtsi128_si32(_mm_add_epi32(q, _mm_shuffle_epi32(q, 0xb1))));
}
QUIRE_INLINE U32x16 load_16_for_all(const void* p) {
  const __m256i x = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
  return {x, x};
}
QUIRE_INLINE U32x16 shuffle16(U32x16 x, const uint8_t (&order)[16]) { return shuffle16(x, load_16_for_all(order)); }
QUIRE_INLINE bool same(U32x16 x, U32x16 y) {
  const __m256i differ = _mm256_or_si256(_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b));
  return _mm256_testz_si256(differ, differ);
}
QUIRE_INLINE void store_bytes(char* p, U32x16 words) {
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(_mm256_packs_epi16(words.a, words.b), 0xd8));
}

QUIRE_INLINE void transpose8(__m256 r[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int k = 0; k < 2; ++k) {
      u[i + 2 * k] = _mm256_shuffle_ps(t[i + k], t[i + 2 + k], 0x44);
      u[i + 2 * k + 1] = _mm256_shuffle_ps(t[i + k], t[i + 2 + k], 0xee);
    }
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}

// r[i] lane j <-> r[j] lane i.
QUIRE_INLINE void transpose16(F32x16 r[16]) {
  __m256 q[8];
  for (int i = 0; i < 8; ++i) q[i] = r[i].a;
  transpose8(q);
  for (int i = 0; i < 8; ++i) r[i].a = q[i];
  for (int i = 0; i < 8; ++i) q[i] = r[i + 8].b;
  transpose8(q);
  for (int i = 0; i < 8; ++i) r[i + 8].b = q[i];
  __m256 s[8];
  for (int i = 0; i < 8; ++i) {
    q[i] = r[i].b;
    s[i] = r[i + 8].a;
  }
  transpose8(q);
  transpose8(s);
  for (int i = 0; i < 8; ++i) {
    r[i + 8].a = q[i];
    r[i].b = s[i];
  }
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
