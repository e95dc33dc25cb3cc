// exp and tanh on sixteen lanes: range reduction and minimax polynomials after Cephes (S. Moshier, expf/tanhf),
// so that results do not depend on which C library is installed.
#pragma once
#include "simd.h"

namespace quire {
namespace QUIRE_ISA {
namespace {

// e^r for |r| <= ln(2) / 2.
QUIRE_INLINE F32x16 exp_reduced(F32x16 r) {
  F32x16 p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  return add(fma(mul(p, r), r, r), set1(1.0f));
}

// Within 2 ulp; exactly 0 below the smallest normal result (and for -inf), inf above the largest, NaN stays NaN.
QUIRE_INLINE F32x16 exp(F32x16 x) {
  const F32x16 lowest = set1(-87.33654f), highest = set1(88.72283f);
  const F32x16 c = min(highest, max(lowest, x));
  const F32x16 n = round_nearest(mul(c, set1(1.44269504088896341f)));
  const F32x16 r = fnma(n, set1(-2.12194440e-4f), fnma(n, set1(0.693359375f), c));
  const F32x16 y = select(gt(x, highest), set1(__builtin_inff()), scale_pow2(exp_reduced(r), n));
  return select(lt(x, lowest), zero(), y);
}

// 2^x for x <= 0: what a softmax needs, with log2(e) folded into its scale. Exactly 1 at 0, exactly 0 below -126 (and for -inf).
QUIRE_INLINE F32x16 exp2_nonpositive(F32x16 x) {
  const F32x16 lowest = set1(-126.0f);
  const F32x16 c = max(lowest, x);
  const F32x16 n = round_nearest(c);
  const F32x16 f = sub(c, n);
  F32x16 p = set1(1.535336188319500e-4f);
  p = fma(p, f, set1(1.339887440266574e-3f));
  p = fma(p, f, set1(9.618437357674640e-3f));
  p = fma(p, f, set1(5.550332471162809e-2f));
  p = fma(p, f, set1(2.402264791363012e-1f));
  p = fma(p, f, set1(6.931472028550421e-1f));
  p = fma(p, f, set1(1.0f));
  return select(lt(x, lowest), zero(), scale_pow2(p, n));
}

QUIRE_INLINE F32x16 tanh(F32x16 x) {
  const F32x16 one = set1(1.0f), two = set1(2.0f);
  const F32x16 size = floats(and_(bits(x), set1_u32(0x7fffffffu)));
  const F32x16 z = mul(x, x);
  F32x16 p = set1(-5.70498872745e-3f);
  p = fma(p, z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  const F32x16 near = fma(mul(p, z), x, x);
  const F32x16 far = sub(one, div(two, add(exp(mul(two, size)), one)));
  const F32x16 signed_far = floats(or_(bits(far), and_(bits(x), set1_u32(0x80000000u))));
  return select(lt(size, set1(0.625f)), near, signed_far);
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
