// Recurrences (src/quire/tensors/attention/carried.py), a token at a time: of the state S [Dk, Dv] of a head
//
//   S *= decay;  S += k (beta (v - k S)), or without a correction k (beta v);  out = scale (q S)
//
// in fp32, sums over Dk ascending. A head of a sequence is computed by one thread, sixteen columns of S after the other, which stay in the first cache:
// so what a token gets depends on nothing but its own sequence.
#pragma once
#include <math.h>

#include "elements.h"
#include "parallel.h"

namespace quire {
namespace QUIRE_ISA {
namespace {

// A row of floats, of length one, nearly, where that is wanted, times `factor`.
void recur_row(const RecurArgs& g, const void* rows, int64_t row, float factor, float* to) {
  const char* const from = (const char*)rows + row * g.k_dim * element_bytes(g.dtype);
  for (int64_t i = 0; i < g.k_dim; i += 16) {
    const int n = int(g.k_dim - i < 16 ? g.k_dim - i : 16);
    store_n(to + i, load_elements_n(g.dtype, from + i * element_bytes(g.dtype), n), n);
  }
  if (g.normalized) {
    float squares = 0.0f;
    for (int64_t i = 0; i < g.k_dim; ++i) squares += to[i] * to[i];
    factor *= 1.0f / sqrtf(squares + 1e-6f);
  }
  for (int64_t i = 0; i < g.k_dim; ++i) to[i] *= factor;
}

void recur_token(const RecurArgs& g, int64_t t, int64_t head, float* state) {
  float q[kMostStateRows], k[kMostStateRows];
  const int64_t element = element_bytes(g.dtype), key_head = t * g.num_k_heads + head / (g.num_v_heads / g.num_k_heads), row = t * g.num_v_heads + head;
  recur_row(g, g.q, key_head, g.scale, q);
  recur_row(g, g.k, key_head, 1.0f, k);
  const F32x16 decay = set1(g.decay[row]), beta = set1(g.beta[row]);
  for (int64_t c = 0; c < g.v_dim; c += 16) {
    const int n = int(g.v_dim - c < 16 ? g.v_dim - c : 16);
    float* const column = state + c;
    F32x16 known = zero(), out = zero();
    for (int64_t i = 0; i < g.k_dim; ++i) {
      const F32x16 s = mul(load_n(column + i * g.v_dim, n), decay);
      store_n(column + i * g.v_dim, s, n);
      known = fma(set1(k[i]), s, known);
    }
    const F32x16 v = load_elements_n(g.dtype, (const char*)g.v + (row * g.v_dim + c) * element, n), added = mul(g.corrects ? sub(v, known) : v, beta);
    for (int64_t i = 0; i < g.k_dim; ++i) {
      const F32x16 s = fma(set1(k[i]), added, load_n(column + i * g.v_dim, n));
      store_n(column + i * g.v_dim, s, n);
      out = fma(set1(q[i]), s, out);
    }
    store_elements_n(g.dtype, (char*)g.out + (row * g.v_dim + c) * element, out, n);
  }
}

void recur(const RecurArgs* args) {
  const RecurArgs& g = *args;
  const int64_t size = g.k_dim * g.v_dim;
  Next next{g.num_seqs * g.num_v_heads};
  parallel(g.num_threads, [&](const Member&) {
    for (int64_t item; next.take(item);) {
      const int64_t s = item / g.num_v_heads, head = item % g.num_v_heads;
      const float* from = g.before[s] ? g.before[s] + head * size : nullptr;
      for (int64_t n = g.of[s]; n < g.of[s + 1]; ++n) {
        float* const state = g.after + n * g.after_stride + head * size;
        from ? memcpy(state, from, size_t(size) * sizeof(float)) : memset(state, 0, size_t(size) * sizeof(float));
        for (int64_t t = g.starts[n]; t < g.starts[n + 1]; ++t) recur_token(g, t, head, state);
        from = state;
      }
    }
  });
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
