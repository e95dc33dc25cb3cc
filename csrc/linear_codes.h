// Products of bf16 rows with weights of codes, in integers: rows of x become codes of one byte. The law, for any number of rows, over spans of 256 of k
// (int8 weights, whichever instructions multiply the bytes: linear_amx_int8.h, linear_dots.h) or of 32 (int4 weights: linear_nibbles.h):
//
//   x      is q * t: top = the span's largest magnitude, at least 2^-100; t = top / 127; q = x * (127 / top) rounded to an integer, half to even;
//          fp32, each operation rounded once. A span that is not finite has a t of NaN
//   s      = the sum of q * code, exact
//   y[m]   = rounded(fma(float(s_0), u_0, 0), fma(float(s_1), u_1, .), ... + bias),  u = the weight's scale * t, fp32, rounded once
#pragma once
#include "simd.h"

#if defined(QUIRE_BF16_DOT)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace product {

// How a span becomes codes: x * up, rounded, is one, and q * t is x again.
struct OneByte {
  F32x16 up;
  float t;
};

QUIRE_INLINE U32x16 magnitudes(U32x16 pairs) { return and_(pairs, set1_u32(0x7fff7fffu)); }

// `most`: magnitudes, in pairs, whose largest is that of the span.
QUIRE_INLINE OneByte one_byte_by(U32x16 most) {
  const uint32_t largest = _mm512_reduce_max_epu32(_mm512_max_epu32(shl<16>(most).v, and_(most, set1_u32(0xffff0000u)).v));
  const bool finite = largest < 0x7f800000u;
  const uint32_t least = (127u - 100u) << 23, at_least = largest < least ? least : largest;
  float top, none;
  memcpy(&top, &at_least, 4);
  const uint32_t nan = 0x7fc00000u;
  memcpy(&none, &nan, 4);
  return {set1(127.0f / top), finite ? top / 127.0f : none};
}

// 32 codes, as words.
QUIRE_INLINE __m512i code_words(U32x16 pairs, F32x16 up) {
  const __m512i even = _mm512_cvtps_epi32(mul(pair_low(pairs), up).v), odd = _mm512_cvtps_epi32(mul(pair_high(pairs), up).v);
  return _mm512_mask_blend_epi16(0xaaaaaaaau, even, _mm512_slli_epi32(odd, 16));
}

QUIRE_INLINE U32x16 load_pairs_upto(const uint16_t* x, int n) { return n >= 32 ? load_pairs(x) : n > 0 ? load_pairs_n(x, n) : set1_u32(0); }

// k elements as codes, 64 at a time `next` bytes apart, with zeros up to whole 64s. Returns their scale t.
QUIRE_INLINE float one_byte(const uint16_t* x, int k, char* to, int64_t next) {
  U32x16 most = set1_u32(0);
  for (int i = 0; i < k; i += 32) most = {_mm512_max_epu16(most.v, magnitudes(load_pairs_upto(x + i, k - i)).v)};
  const OneByte one = one_byte_by(most);
  const auto codes = [&](int i) { return code_words(load_pairs_upto(x + i, k - i), one.up); };
  for (int i = 0; i < k; i += 64, to += next) {
    const __m512i mixed = _mm512_packs_epi16(codes(i), codes(i + 32));  // eight of the first, eight of the second, ...
    _mm512_storeu_si512(to, _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), mixed));
  }
  return one.t;
}

}  // namespace product
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
