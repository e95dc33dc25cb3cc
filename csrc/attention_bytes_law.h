// Attention of bf16 queries over int8 keys and values, in integers. The law of a row, for any number of rows:
//
//   q      of a whole head is n * 2^(e - 13), n integers of two bytes (two_bytes.h)
//   score  the sum of n * the key's codes, exact, as fp32, times the key's scale * 2^(e - 13)
//   p      2^(score - base), the base as for bf16 (attention_pairs.h, attention_amx.h), not rounded; summed up as there
//   w      p * the value's scale, 0 for a key that the row does not see, is m * 2^(f - 13): f the exponent of the largest of the tile's 64 keys, at
//          least -113, m = w / 2^(f - 13) rounded to an integer, half to even; if one of them is not finite, all count as NaN
//   out    of a part: fma(the sum of m * the values' codes of a tile, exact, as fp32, 2^(f - 13), out), tile after tile
//
// Codes are finite whatever a row decodes to, so a key that is not seen adds 0 and no values need to be hidden; what is not finite is in scales.
#pragma once
#include "attention_softmax.h"
#include "two_bytes.h"

#if defined(QUIRE_BF16_DOT)
namespace quire {
namespace QUIRE_ISA {
namespace {

constexpr int kMostKeyDim = 1024;  // 2^14 * 2^7 * this many products still fit 32 bits

QUIRE_INLINE U32x16 sum_of_bytes(U32x16 high, U32x16 low) { return add(shl<8>(high), low); }
QUIRE_INLINE F32x16 score_of(U32x16 high, U32x16 low, F32x16 key_scale, F32x16 query_scale) {
  return mul(to_f32(sum_of_bytes(high, low)), mul(key_scale, query_scale));
}
QUIRE_INLINE F32x16 weight_of(F32x16 score, F32x16 p, F32x16 value_scale) {
  return {_mm512_maskz_mul_ps(_mm512_cmp_ps_mask(score.v, set1(-__builtin_inff()).v, _CMP_NEQ_UQ), p.v, value_scale.v)};
}
// The largest of magnitudes as bits: what is not finite is the largest of all.
QUIRE_INLINE U32x16 largest(U32x16 most, F32x16 x) { return {_mm512_max_epu32(most.v, and_(bits(x), set1_u32(0x7fffffffu)).v)}; }

// By what sixteen rows' weights become integers, and by what sums of these are multiplied.
struct Grid {
  F32x16 up, down;
};
QUIRE_INLINE Grid grid_of(U32x16 most) {
  const __m512i e = _mm512_max_epu32(shr<23>(most).v, _mm512_set1_epi32(14)), up = _mm512_sub_epi32(_mm512_set1_epi32(2 * 127 + 13), e);
  const U32x16 down = shl<23>({_mm512_sub_epi32(e, _mm512_set1_epi32(13))});
  const __mmask16 broken = _mm512_cmpge_epu32_mask(most.v, _mm512_set1_epi32(0x7f800000));
  return {floats(shl<23>({up})), floats({_mm512_mask_blend_epi32(broken, down.v, _mm512_set1_epi32(0x7fc00000))})};
}
// An integer and its upper byte; its lower one, signed, is what its lowest eight bits are.
struct Weight {
  U32x16 whole, high;
};
QUIRE_INLINE Weight integer_weight(F32x16 w, F32x16 up) {
  const __m512i m = _mm512_cvtps_epi32(mul(w, up).v);
  return {{m}, {_mm512_srai_epi32(_mm512_add_epi32(m, _mm512_set1_epi32(128)), 8)}};
}

constexpr int kLeastDim = 3;  // with less before it a scale could not be the last of four bytes
// Sixteen rows' scales: each is the last byte of its row.
inline void place_scales(const char* const* rows, int dim, float* to) {
  U32x16 ends;
  for (int i = 0; i < 16; i += 8) {
    const __m512i at = _mm512_add_epi64(_mm512_loadu_si512(rows + i), _mm512_set1_epi64(dim - kLeastDim));
    const __m256i eight = _mm512_i64gather_epi32(at, nullptr, 1);
    ends = {i == 0 ? _mm512_castsi256_si512(eight) : _mm512_inserti64x4(ends.v, eight, 1)};
  }
  store(to, scales_of_bytes(shr<24>(ends)));
}

inline bool are_bytes(const AttendArgs& args) {
  const RowLayout &k = args.layout.k, &v = args.layout.v;
  return args.dtype == kBF16 && k.format == kInt8 && v.format == kInt8 && k.dim >= kLeastDim && v.dim >= kLeastDim && k.dim <= kMostKeyDim;
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
