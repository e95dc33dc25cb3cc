// Cuts (top-k, top-p) without a sort: quickselect (C. Hoare, "Find", 1961) by count or by probability mass, over values alone.
// What survives a cut is always the first few tokens in the order (logit descending, id ascending), so a value and how many of
// the tokens equal to it survive say it all.
#pragma once
#include "kernels.h"
#include "simd_math.h"

namespace quire {
namespace QUIRE_ISA {
namespace {

constexpr float kNone = -__builtin_inff();  // the logit of a token that cannot be drawn, and of padding

// Survivors: every token above `value`, and the first `equals` of those equal to it.
struct Cut {
  float value;
  int64_t equals;
};
constexpr Cut kNoCut = {kNone, 0};

// Sixteen sums in double.
typedef float f32x8 __attribute__((vector_size(32)));
typedef double f64x8 __attribute__((vector_size(64)));
struct Sum16 {
  f64x8 low, high;
};

QUIRE_INLINE void accumulate(Sum16& sum, F32x16 x) {
#if defined(QUIRE_AVX512)  // GCC makes twice as many instructions of the lines below
  sum.low += _mm512_cvtps_pd(_mm512_castps512_ps256(x.v));
  sum.high += _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1));
#else
  f32x8 half[2];
  memcpy(half, &x, 64);
  sum.low += __builtin_convertvector(half[0], f64x8);
  sum.high += __builtin_convertvector(half[1], f64x8);
#endif
}
QUIRE_INLINE void accumulate(F32x16& sum, F32x16 x) { sum = add(sum, x); }

QUIRE_INLINE double total(const Sum16& sum) {
  const f64x8 pairs = sum.low + sum.high;
  return ((pairs[0] + pairs[4]) + (pairs[2] + pairs[6])) + ((pairs[1] + pairs[5]) + (pairs[3] + pairs[7]));
}
QUIRE_INLINE double total(F32x16 sum) { return sum_lanes(sum); }

// What a cut measures: the number of tokens ...
struct Counts {
  typedef F32x16 Sum;  // exact for any vocabulary up to 2^24
  F32x16 operator()(F32x16) const { return set1(1.0f); }
};

// ... or their mass e^((logit - max) / temperature). It is rounded to a multiple of 2^-35, so that sums of up to 2^18 of them
// are exact in double: where a cut falls then depends on no order of summation, and the reference's cut is this one.
struct Masses {
  typedef Sum16 Sum;
  float max_logit, inv_temperature;
  F32x16 operator()(F32x16 x) const {
    const F32x16 mass = exp(mul(sub(x, set1(max_logit)), set1(inv_temperature)));
    const F32x16 small = set1(0x1p-12f);  // adding and taking it away leaves multiples of its last place, 2^-35
    return select(lt(mass, small), sub(add(mass, small), small), mass);
  }
};

struct Tally {
  double above;       // measure of the values above the pivot
  double num_equals;  // how many equal it
};

// values holds num values and is padded with kNone to a multiple of 16.
template <class Measure>
Tally tally(const float* values, int64_t num, float pivot, Measure measure) {
  const F32x16 p = set1(pivot), one = set1(1.0f);
  typename Measure::Sum above = {};
  F32x16 equals = zero();
  for (int64_t i = 0; i < num; i += 16) {
    const F32x16 x = load(values + i);
    const Mask16 greater = gt(x, p);
    equals = add(equals, select(eq(x, p), one, zero()));
    if (mask_bits(greater)) accumulate(above, select(greater, measure(x), zero()));
  }
  return {total(above), total(equals)};
}

QUIRE_INLINE void pad(float* values, int64_t num) {
  for (int64_t i = num; i % 16; ++i) values[i] = kNone;
}

// Copies the values in (low, high), in order; `to` has room for num + 16 and may be `from`. Returns their number.
int64_t keep_between(const float* from, int64_t num, float low, float high, float* to) {
  const F32x16 lo = set1(low), hi = set1(high);
  int64_t kept = 0;
  for (int64_t i = 0; i < num; i += 16) {
    const F32x16 x = load(from + i);
    kept += compress(to + kept, x, gt(select(lt(x, hi), x, lo), lo));
  }
  pad(to, kept);
  return kept;
}

// A value near the one where `part` of the measure lies above, judged by a sample: beyond it on the side that has more values, so
// that the smaller side holds the cut and stays (R. Floyd and R. Rivest, "Expected time bounds for selection", 1975).
template <class Measure>
float choose_pivot(const float* values, int64_t num, double part, Measure measure) {
  constexpr int kSamples = 64, kMargin = 4;
  float sorted[kSamples], each[kSamples];
  for (int s = 0; s < kSamples; ++s) {
    const float x = values[(2 * s + 1) * num / (2 * kSamples)];
    int at = s;
    for (; at > 0 && sorted[at - 1] < x; --at) sorted[at] = sorted[at - 1];
    sorted[at] = x;
  }
  double whole = 0, above = 0;
  for (int s = 0; s < kSamples; s += 16) store(each + s, measure(load(sorted + s)));
  for (int s = 0; s < kSamples; ++s) whole += each[s];
  int at = 0;
  while (at < kSamples - 1 && (above += each[at]) < part * whole) ++at;
  at += at < kSamples / 2 ? kMargin : -kMargin;
  return sorted[at];
}

// The smallest first part, in descending order, that measures at least `target`; everything where there is no such part.
// All the values measure `whole`. `work` has room for num + 16 floats and may be `values`.
template <class Measure>
Cut select_first(const float* values, int64_t num, float* work, double whole, double target, Measure measure) {
  while (num > 0) {
    const float pivot = choose_pivot(values, num, target / whole, measure);
    const Tally found = tally(values, num, pivot, measure);
    if (found.above >= target) {
      whole = found.above;
      num = keep_between(values, num, pivot, __builtin_inff(), work);
    } else {
      float each[16];
      store(each, measure(set1(pivot)));
      const double left = target - found.above, equals = found.num_equals * each[0];
      if (equals >= left) {
        double count = double(int64_t(left / each[0]));  // rounded either way
        count += count * each[0] < left;
        return {pivot, int64_t(count - (count > 1 && (count - 1) * each[0] >= left))};
      }
      target = left - equals;
      whole -= found.above + equals;
      num = keep_between(values, num, kNone, pivot, work);
    }
    values = work;
  }
  return kNoCut;
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
