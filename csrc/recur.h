// Recurrences (src/quire/tensors/attention/carried.py), a token at a time: of the state S [Dk, Dv] of a head
//
//   S *= decay;  S += k (beta (v - k S)), or without a correction k (beta v);  out = scale (q S)
//
// in fp32, sums over Dk ascending. A head of a sequence is computed by one thread, some columns of S after the other, each of which is a sum of its own:
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

constexpr int kStateVectors = 4;  // of sixteen columns at once: sums enough to hide a multiply-add's latency

struct RecurToken {
  float q[kMostStateRows], k[kMostStateRows];
  F32x16 decay, beta;
};

// The state that a thread comes to next, whose lines it asks for meanwhile: states lie in pages, and each is some 64 KB that nobody has read since the step
// before.
struct NextState {
  const char *at, *end;
};

// Columns of a state, which goes from `from` to `to`, maybe the same; `n` of the last vector.
template <int N>
QUIRE_INLINE void recur_columns(const RecurArgs& g, const RecurToken& token, const char* v, const float* from, float* to, char* out, int n, NextState& next) {
  const int64_t element = element_bytes(g.dtype);
  const auto state_at = [&](int64_t i, int j) {
    const float* const at = from + i * g.v_dim + 16 * j;
    return mul(N > 1 || n == 16 ? load(at) : load_n(at, n), token.decay);
  };
  F32x16 added[N], sums[N];
  QUIRE_UNROLL for (int j = 0; j < N; ++j) {
    added[j] = load_elements_n(g.dtype, v + 16 * j * element, n);
    sums[j] = zero();
  }
  if (g.corrects) {
    for (int64_t i = 0; i < g.k_dim; ++i) {
      const F32x16 k = set1(token.k[i]);
      QUIRE_UNROLL for (int j = 0; j < N; ++j) sums[j] = fma(k, state_at(i, j), sums[j]);
    }
  }
  QUIRE_UNROLL for (int j = 0; j < N; ++j) {
    added[j] = mul(g.corrects ? sub(added[j], sums[j]) : added[j], token.beta);
    sums[j] = zero();
  }
  for (int64_t i = 0; i < g.k_dim; ++i) {
    const F32x16 k = set1(token.k[i]), q = set1(token.q[i]);
    for (int j = 0; j < N && next.at < next.end; ++j, next.at += 64) prefetch_l2(next.at);
    QUIRE_UNROLL for (int j = 0; j < N; ++j) {
      float* const at = to + i * g.v_dim + 16 * j;
      const F32x16 s = fma(k, added[j], state_at(i, j));
      N > 1 || n == 16 ? store(at, s) : store_n(at, s, n);
      sums[j] = fma(q, s, sums[j]);
    }
  }
  QUIRE_UNROLL for (int j = 0; j < N; ++j) store_elements_n(g.dtype, out + 16 * j * element, sums[j], n);
}

void recur_token(const RecurArgs& g, int64_t t, int64_t head, const float* from, float* to, NextState& next) {
  RecurToken token;
  const int64_t element = element_bytes(g.dtype), key_head = t * g.num_k_heads + head / (g.num_v_heads / g.num_k_heads), row = t * g.num_v_heads + head;
  recur_row(g, g.q, key_head, g.scale, token.q);
  recur_row(g, g.k, key_head, 1.0f, token.k);
  token.decay = set1(g.decay[row]);
  token.beta = set1(g.beta[row]);
  const char* const v = (const char*)g.v + row * g.v_dim * element;
  char* const out = (char*)g.out + row * g.v_dim * element;
  int64_t c = 0;
  for (; c + 16 * kStateVectors <= g.v_dim; c += 16 * kStateVectors)
    recur_columns<kStateVectors>(g, token, v + c * element, from + c, to + c, out + c * element, 16, next);
  for (; c < g.v_dim; c += 16) recur_columns<1>(g, token, v + c * element, from + c, to + c, out + c * element, int(g.v_dim - c < 16 ? g.v_dim - c : 16), next);
}

// A head of a sequence, segment after segment.
void recur_head(const RecurArgs& g, int64_t s, int64_t head, float* scratch, NextState& next) {
  const int64_t size = g.k_dim * g.v_dim;
  const float* from = g.before[s] ? g.before[s] + head * size : nullptr;
  for (int64_t n = g.of[s]; n < g.of[s + 1]; ++n) {
    float* const to = g.after[n] ? g.after[n] + head * size : scratch;
    if (!from) from = (const float*)memset(to, 0, size_t(size) * sizeof(float));
    for (int64_t t = g.starts[n]; t < g.starts[n + 1]; ++t, from = to) recur_token(g, t, head, from, to, next);
  }
}

void recur(const RecurArgs* args) {
  const RecurArgs& g = *args;
  const int64_t size = g.k_dim * g.v_dim;
  Next items{g.num_seqs * g.num_v_heads};
  parallel(g.num_threads, [&](const Member& me) {
    int64_t item, coming;
    for (bool some = items.take(item); some; item = coming) {
      some = items.take(coming);
      const float* const then = some ? g.before[coming / g.num_v_heads] : nullptr;
      const char* const at = then ? (const char*)(then + coming % g.num_v_heads * size) : nullptr;
      NextState next{at, at ? at + size * int64_t(sizeof(float)) : nullptr};
      recur_head(g, item / g.num_v_heads, item % g.num_v_heads, g.scratch + me.id * size, next);
    }
  });
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
