// bf16 elements as integers of two bytes, for instructions that multiply bytes (TDPBSSD of AMX, VPDPBUSD of AVX512-VNNI).
//
//   x is q * 2^(e - 13): e the exponent of the largest magnitude (at least -100), q = x / 2^(e - 13) rounded to an integer, half to even. So
//   |q| < 2^14, and whatever is no less than a 64th of the largest is exact; where not all are finite the scale is NaN. q = 256 high + low.
#pragma once
#include "simd.h"

#if defined(QUIRE_BF16_DOT)
namespace quire {
namespace QUIRE_ISA {
namespace {

constexpr int kCodeK = 64;  // of k, or of keys, that one multiplication of bytes takes

// Integers of k elements: `high` and `low` are where those of the first 64 go, the next ones `next` bytes further on, and zeros up to whole 64s.
// Returns their scale.
inline float two_bytes(const uint16_t* x, int k, char* high, char* low, int64_t next) {
  U32x16 most = set1_u32(0);
  for (int i = 0; i < k; i += 32)
    most = {_mm512_max_epu16(most.v, and_(load_pairs_n(x + i, k - i < 32 ? k - i : 32), set1_u32(0x7fff7fffu)).v)};
  uint16_t all[32];
  _mm512_storeu_si512(all, most.v);
  uint16_t largest = 0;
  for (const uint16_t one : all) largest = one > largest ? one : largest;
  const bool finite = largest < 0x7f80;
  const uint32_t exponent = !finite ? 254 : largest >> 7 < 27 ? 27 : largest >> 7;  // and 127
  const __m512 up = _mm512_castsi512_ps(_mm512_set1_epi32(int((2 * 127 + 13 - exponent) << 23)));
  for (int i = 0; i < k; i += kCodeK, high += next, low += next) {
    for (int j = 0; j < kCodeK; j += 16) {
      const int left = k - i - j;
      const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(left > 0 ? load_bf16_n(x + i + j, left < 16 ? left : 16).v : _mm512_setzero_ps(), up));
      const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
      _mm_storeu_si128((__m128i*)(high + j), _mm512_cvtepi32_epi8(upper));
      _mm_storeu_si128((__m128i*)(low + j), _mm512_cvtepi32_epi8(_mm512_sub_epi32(q, _mm512_slli_epi32(upper, 8))));
    }
  }
  const uint32_t scale = finite ? (exponent - 13) << 23 : 0x7fc00000u;
  float value;
  memcpy(&value, &scale, 4);
  return value;
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
