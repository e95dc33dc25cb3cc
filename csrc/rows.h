// Runs a list of instructions over rows, a token at a time, in fp32 scratch that stays in the first caches.
//
// Every result is rounded to its dtype and kept as fp32, so the numbers are those of one torch operator after the other. A row
// is computed by itself, each element by the same vector operations wherever it lies: rows, their number and the threads do
// not meet. The order of a sum over n elements is that of torch's CPU kernel (aten/src/ATen/native/cpu/SumKernel.cpp), for all
// instruction sets: 4 accumulators of 8 lanes in a cascade of 4 levels, their sum, the rest of n one by one, the lanes one by
// one. So norms of 8 elements and more agree with torch's bit for bit.
#pragma once
#include "elements.h"
#include "parallel.h"
#include "simd_math.h"

namespace quire {
namespace QUIRE_ISA {
namespace {
namespace rows {

QUIRE_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// n <= 16 elements.
QUIRE_INLINE F32x16 fetch(const float* p, int64_t step, int64_t n) {
  if (step == 1) return n == 16 ? load(p) : load_n(p, int(n));
  if (step == 0) return set1(*p);
  float lanes[16] = {0};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i * step];
  return load(lanes);
}

QUIRE_INLINE void put(float* p, F32x16 x, int64_t step, int64_t n) {
  if (step == 1) return n == 16 ? store(p, x) : store_n(p, x, int(n));
  float lanes[16];
  store(lanes, x);
  for (int64_t i = 0; i < n; ++i) p[i * step] = lanes[i];
}

QUIRE_INLINE F32x16 rounded(int32_t dtype, F32x16 x) {
  if (dtype == kF32) return x;
  if (dtype == kBF16) return floats(and_(round_bf16(x), set1_u32(0xffff0000u)));
  uint16_t lanes[16];
  store_f16(lanes, x);
  return load_f16(lanes);
}

QUIRE_INLINE F32x16 negated(F32x16 x) { return floats(xor_(bits(x), set1_u32(0x80000000u))); }
QUIRE_INLINE F32x16 sigmoid(F32x16 x) { return div(set1(1.0f), add(set1(1.0f), exp(negated(x)))); }
QUIRE_INLINE F32x16 silu(F32x16 x) { return div(x, add(set1(1.0f), exp(negated(x)))); }

// log(1 + e^x): beyond 0 what is more than x is log(1 + y) with y = e^-|x|, 2 atanh(y / (2 + y)), whose series is done in fp32 at the 13th power.
QUIRE_INLINE F32x16 softplus(F32x16 x) {
  const F32x16 y = exp(floats(or_(bits(x), set1_u32(0x80000000u)))), r = div(y, add(set1(2.0f), y)), z = mul(r, r);
  F32x16 p = set1(2.0f / 13);
  for (int i = 11; i > 0; i -= 2) p = fma(p, z, set1(2.0f / float(i)));
  return add(select(lt(x, zero()), zero(), x), mul(p, r));
}

QUIRE_INLINE F32x16 gelu_tanh(F32x16 x) {
  const F32x16 inner = mul(set1(0.7978845608f), add(x, mul(set1(0.044715f), mul(mul(x, x), x))));
  return mul(mul(set1(0.5f), x), add(set1(1.0f), tanh(inner)));
}

// The rational approximation of Eigen and XLA: x P(x^2) / Q(x^2) on [-4, 4], beyond which erf is 1 in fp32.
QUIRE_INLINE F32x16 erf(F32x16 x) {
  x = max(set1(-4.0f), min(set1(4.0f), x));
  const F32x16 z = mul(x, x);
  F32x16 p = set1(-2.72614225801306e-10f);
  p = fma(p, z, set1(2.77068142495902e-08f));
  p = fma(p, z, set1(-2.10102402082508e-06f));
  p = fma(p, z, set1(-5.69250639462346e-05f));
  p = fma(p, z, set1(-7.34990630326855e-04f));
  p = fma(p, z, set1(-2.95459980854025e-03f));
  p = fma(p, z, set1(-1.60960333262415e-02f));
  F32x16 q = set1(-1.45660718464996e-05f);
  q = fma(q, z, set1(-2.13374055278905e-04f));
  q = fma(q, z, set1(-1.68282697438203e-03f));
  q = fma(q, z, set1(-7.37332916720468e-03f));
  q = fma(q, z, set1(-1.42647390514189e-02f));
  return div(mul(x, p), q);
}

QUIRE_INLINE F32x16 gelu(F32x16 x) { return mul(mul(x, set1(0.5f)), add(set1(1.0f), erf(mul(x, set1(0.70710678118f))))); }

QUIRE_INLINE F32x16 rsqrt(F32x16 x) {
  float lanes[16];
  store(lanes, x);
  for (int i = 0; i < 16; ++i) lanes[i] = 1.0f / __builtin_sqrtf(lanes[i]);
  return load(lanes);
}

// One run along the last dimension. Whole vectors that lie together, or b the same for all, are what nearly all of it is.
template <bool kBrain, bool kOneB, class F>
QUIRE_INLINE void along(float* out, const float* a, const float* b, int64_t n, F f) {
  const F32x16 one = set1(*b);
  for (int64_t k = 0; k < n; k += 16) store(out + k, rounded(kBrain ? kBF16 : kF32, f(load(a + k), kOneB ? one : load(b + k))));
}

template <class F>
QUIRE_INLINE void each(const RowInstruction& g, float* s, F f) {
  const int64_t n = g.n[2], to = g.out.step[2], from_a = g.a.step[2], from_b = g.b.step[2];
  const bool together = to == 1 && from_a == 1 && from_b >= 0 && from_b <= 1 && n % 16 == 0 && g.dtype != kF16, brain = g.dtype == kBF16;
  for (int64_t i = 0; i < g.n[0]; ++i) {
    for (int64_t j = 0; j < g.n[1]; ++j) {
      const auto begin = [&](const RowOperand& o) { return s + o.at + i * o.step[0] + j * o.step[1]; };
      float* const out = begin(g.out);
      const float *const a = begin(g.a), *const b = begin(g.b);
      if (together && from_b == 1) {
        brain ? along<true, false>(out, a, b, n, f) : along<false, false>(out, a, b, n, f);
      } else if (together) {
        brain ? along<true, true>(out, a, b, n, f) : along<false, true>(out, a, b, n, f);
      } else {
        for (int64_t k = 0; k < n; k += 16) {
          const int64_t m = at_most(16, n - k);
          put(out + k * to, rounded(g.dtype, f(fetch(a + k * from_a, from_a, m), fetch(b + k * from_b, from_b, m))), to, m);
        }
      }
    }
  }
}

template <class F>
QUIRE_INLINE void each_of_one(const RowInstruction& g, float* s, F f) {
  RowInstruction h = g;
  h.b = {h.a.at, {0, 0, 0}};
  each(h, s, [&](F32x16 a, F32x16) { return f(a); });
}

// The sum of f(x[0]), f(x[1]), ... in the order given above. A vector holds two accumulators of 8 lanes, two vectors all 4.
template <class F>
QUIRE_INLINE float sum(const float* x, int64_t n, F f) {
  constexpr int kLevels = 4;
  const int64_t size = n / 32, eights = n / 8;
  int64_t power = 0;
  while ((int64_t(1) << power) < size) ++power;
  power = power / kLevels > 4 ? power / kLevels : 4;
  const int64_t step = int64_t(1) << power;
  F32x16 acc[kLevels][2];
  for (auto& level : acc) level[0] = level[1] = zero();
  const auto take = [&](int64_t i) {
    for (int k = 0; k < 2; ++k) acc[0][k] = add(acc[0][k], f(load(x + 32 * i + 16 * k)));
  };
  int64_t i = 0;
  while (i + step <= size) {
    for (int64_t j = 0; j < step; ++j, ++i) take(i);
    for (int j = 1; j < kLevels; ++j) {
      for (int k = 0; k < 2; ++k) {
        acc[j][k] = add(acc[j][k], acc[j - 1][k]);
        acc[j - 1][k] = zero();
      }
      if (i & ((step - 1) << (j * power))) break;
    }
  }
  for (; i < size; ++i) take(i);
  for (int j = 1; j < kLevels; ++j)
    for (int k = 0; k < 2; ++k) acc[0][k] = add(acc[0][k], acc[j][k]);
  float sums[4][8], rest[16], total = 0.0f;
  store(sums[0], acc[0][0]);
  store(sums[2], acc[0][1]);
  const auto more = [&](int64_t at, int64_t count) { store(rest, f(load_n(x + at, int(count)))); };
  for (int64_t v = 4 * size; v < eights; ++v) {
    more(8 * v, 8);
    for (int k = 0; k < 8; ++k) sums[0][k] += rest[k];
  }
  for (int j = 1; j < 4; ++j)
    for (int k = 0; k < 8; ++k) sums[0][k] += sums[j][k];
  more(8 * eights, n - 8 * eights);
  for (int64_t k = 0; k < n - 8 * eights; ++k) total += rest[k];
  for (const float lane : sums[0]) total += lane;
  return total;
}

template <class F>
QUIRE_INLINE void each_row(const RowInstruction& g, float* s, F f) {
  for (int64_t i = 0; i < g.n[0]; ++i) {
    for (int64_t j = 0; j < g.n[1]; ++j) {
      const auto begin = [&](const RowOperand& o) { return s + o.at + i * o.step[0] + j * o.step[1]; };
      f(begin(g.out), begin(g.a), begin(g.b), begin(g.c));
    }
  }
}

void mean(const RowInstruction& g, float* s) {
  each_row(g, s, [&](float* out, const float* a, const float*, const float*) {
    const F32x16 total = rounded(g.dtype, set1(sum(a, g.n[2], [](F32x16 x) { return x; })));
    store_n(out, rounded(g.dtype, div(total, set1(float(g.n[2])))), 1);
  });
}

void layer_norm(const RowInstruction& g, float* s) {
  each_row(g, s, [&](float* out, const float* a, const float* b, const float* c) {
    const int64_t n = g.n[2];
    const F32x16 middle = set1(sum(a, n, [](F32x16 x) { return x; }) / float(n));
    const float variance = sum(a, n, [&](F32x16 x) { return mul(sub(x, middle), sub(x, middle)); }) / float(n);
    const F32x16 scale = set1(1.0f / __builtin_sqrtf(variance + g.scalar));
    for (int64_t k = 0; k < n; k += 16) {
      const int64_t m = at_most(16, n - k);
      const F32x16 normal = mul(sub(fetch(a + k, 1, m), middle), scale);
      put(out + k, rounded(g.dtype, add(mul(normal, fetch(b + k, 1, m)), fetch(c + k, 1, m))), 1, m);
    }
  });
}

// While a row is read or written, the next one's place is asked for: its lines are mostly in another core's cache.
void load_row(const RowInstruction& g, const RowBuffer& from, int64_t row, float* s) {
  const char* const p = from.rows + row * from.row_bytes;
  const int64_t n = g.n[2], whole = n / 16 * 16;
  float* const out = s + g.out.at;
  if (from.dtype == kF32) {
    memcpy(out, p, size_t(n) * 4);
    return;
  }
  const uint16_t* const halves = (const uint16_t*)p;
  const char* const next = p + from.row_bytes;
  if (from.dtype == kBF16) {
    for (int64_t k = 0; k < whole; k += 16) {
      prefetch(next + 2 * k);
      store(out + k, load_bf16(halves + k));
    }
  } else {
    for (int64_t k = 0; k < whole; k += 16) store(out + k, load_f16(halves + k));
  }
  if (whole < n) store_n(out + whole, load_elements_n(from.dtype, p + 2 * whole, int(n - whole)), int(n - whole));
}

// A value's elements were rounded to its dtype when they were made.
void store_row(const RowInstruction& g, const RowBuffer& to, int64_t row, const float* s) {
  char* const p = to.rows + row * to.row_bytes;
  const int64_t n = g.n[2], whole = n / 16 * 16;
  const float* const a = s + g.a.at;
  if (to.dtype == kF32) {
    memcpy(p, a, size_t(n) * 4);
    return;
  }
  uint16_t* const halves = (uint16_t*)p;
  const char* const next = p + to.row_bytes;
  if (to.dtype == kBF16) {
    for (int64_t k = 0; k < whole; k += 16) {
      __builtin_prefetch(next + 2 * k, 1);
      store_upper(halves + k, bits(load(a + k)));
    }
  } else {
    for (int64_t k = 0; k < whole; k += 16) store_f16(halves + k, load(a + k));
  }
  if (whole < n) store_elements_n(to.dtype, p + 2 * whole, load_n(a + whole, int(n - whole)), int(n - whole));
}

void run_one(const RowInstruction& g, const RowBuffer* buffers, int64_t row, float* s) {
  const F32x16 scalar = set1(g.scalar);
  switch (g.op) {
    case kRowLoad: return load_row(g, buffers[g.buffer], row, s);
    case kRowStore: return store_row(g, buffers[g.buffer], row, s);
    case kRowCopy: return each_of_one(g, s, [](F32x16 a) { return a; });
    case kRowAdd: return each(g, s, [](F32x16 a, F32x16 b) { return add(a, b); });
    case kRowSub: return each(g, s, [](F32x16 a, F32x16 b) { return sub(a, b); });
    case kRowMul: return each(g, s, [](F32x16 a, F32x16 b) { return mul(a, b); });
    case kRowDiv: return each(g, s, [](F32x16 a, F32x16 b) { return div(a, b); });
    case kRowAddScalar: return each_of_one(g, s, [&](F32x16 a) { return add(a, scalar); });
    case kRowMulScalar: return each_of_one(g, s, [&](F32x16 a) { return mul(a, scalar); });
    case kRowDivScalar: return each_of_one(g, s, [&](F32x16 a) { return div(a, scalar); });
    case kRowRsqrt: return each_of_one(g, s, [](F32x16 a) { return rsqrt(a); });
    case kRowTanh: return each_of_one(g, s, [](F32x16 a) { return tanh(a); });
    case kRowSigmoid: return each_of_one(g, s, [](F32x16 a) { return sigmoid(a); });
    case kRowSilu: return each_of_one(g, s, [](F32x16 a) { return silu(a); });
    case kRowGelu: return each_of_one(g, s, [](F32x16 a) { return gelu(a); });
    case kRowGeluTanh: return each_of_one(g, s, [](F32x16 a) { return gelu_tanh(a); });
    case kRowExp: return each_of_one(g, s, [](F32x16 a) { return exp(a); });
    case kRowSoftplus: return each_of_one(g, s, [](F32x16 a) { return softplus(a); });
    case kRowRelu: return each_of_one(g, s, [](F32x16 a) { return select(lt(a, zero()), zero(), a); });
    case kRowMean: return mean(g, s);
    case kRowLayerNorm: return layer_norm(g, s);
  }
}

}  // namespace rows

void run_rows(const RowsArgs* args) {
  int64_t elements = 0;
  for (int64_t i = 0; i < args->num_instructions; ++i) {
    const int32_t* const n = args->instructions[i].n;
    elements += int64_t(n[0]) * n[1] * n[2];
  }
  // About a tenth of a nanosecond each; waking another thread costs a microsecond or more.
  const int threads = args->num_rows < 2 || elements * args->num_rows < 50000 ? 1 : args->num_threads;
  parallel_for(threads, args->num_rows, [&](int64_t row, int thread) {
    float* const scratch = args->scratch + int64_t(thread) * args->scratch_floats;
    for (int64_t i = 0; i < args->num_instructions; ++i) rows::run_one(args->instructions[i], args->buffers, row, scratch);
  });
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
