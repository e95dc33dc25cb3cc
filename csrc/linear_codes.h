// Products of bf16 rows with weights of codes, in integers: rows of x become codes of one byte. The law, for any number of rows, over spans of 256 of k
// (int8 weights, whichever instructions multiply the bytes: linear_amx_int8.h, linear_dots.h) or of 32 (int4 weights: linear_nibbles.h):
//
//   x      is q * t: top = the span's largest magnitude, at least 2^-100; t = top / 127; q = x * (127 / top) rounded to an integer, half to even;
//          fp32, each operation rounded once. A span that is not finite has a t of NaN
//   s      = the sum of q * code, exact
//   y[m]   = rounded(fma(float(s_0), u_0, 0), fma(float(s_1), u_1, .), ... + bias),  u = the weight's scale * t, fp32, rounded once
#pragma once
#include "simd.h"

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
  const uint32_t largest = max_lanes(max_halves(shl<16>(most), and_(most, set1_u32(0xffff0000u))));
  const bool finite = largest < 0x7f800000u;
  const uint32_t least = (127u - 100u) << 23, at_least = largest < least ? least : largest;
  float top, none;
  memcpy(&top, &at_least, 4);
  const uint32_t nan = 0x7fc00000u;
  memcpy(&none, &nan, 4);
  return {set1(127.0f / top), finite ? top / 127.0f : none};
}

// 32 codes, as words.
QUIRE_INLINE U32x16 code_words(U32x16 pairs, F32x16 up) {
  const U32x16 even = to_i32(mul(pair_low(pairs), up)), odd = to_i32(mul(pair_high(pairs), up));
  return or_(and_(even, set1_u32(0xffffu)), shl<16>(odd));
}

QUIRE_INLINE U32x16 load_pairs_upto(const uint16_t* x, int n) { return n >= 32 ? load_pairs(x) : n > 0 ? load_pairs_n(x, n) : set1_u32(0); }

// Calls put(i, words) with the codes of k elements, 32 from the i-th on, with zeros up to whole 64s. Returns their scale t.
template <class Put>
QUIRE_INLINE float one_byte(const uint16_t* x, int k, const Put& put) {
  U32x16 most = set1_u32(0);
  for (int i = 0; i < k; i += 32) most = max_halves(most, magnitudes(load_pairs_upto(x + i, k - i)));
  const OneByte one = one_byte_by(most);
  for (int i = 0; i < k; i += 64)
    for (int j = i; j < i + 64; j += 32) put(j, code_words(load_pairs_upto(x + j, k - j), one.up));
  return one.t;
}

}  // namespace product
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
