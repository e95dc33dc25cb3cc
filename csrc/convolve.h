// Short causal convolutions over pages, along each sequence (src/quire/tensors/attention/convolve.py, which has the same bits):
//
//   y[t, c] = rounded(((x[t - W + 1, c] * w[c, 0] + x[t - W + 2, c] * w[c, 1]) + ...) + bias[c])
//
// each product and each sum rounded, in fp32. Rows before a sequence's first are zero; those of earlier steps are in pages, keys of one head.
#pragma once
#include "elements.h"
#include "parallel.h"

namespace quire {
namespace QUIRE_ISA {
namespace {

// Elements of a dtype as rows of floats: of tap j of each channel, 16 to a multiple, from `to` + j * lane on.
void spread_taps(int32_t dtype, const void* from, int64_t count, int64_t width, int64_t lane, float* to) {
  for (int64_t i = 0; i < count; i += 16) {
    float few[16];
    const int n = int(count - i < 16 ? count - i : 16);
    store(few, load_elements_n(dtype, (const char*)from + i * element_bytes(dtype), n));
    for (int e = 0; e < n; ++e) to[(i + e) % width * lane + (i + e) / width] = few[e];
  }
}

// One row of results out of W rows, the oldest first. `taps`: [W][lane], and behind them what is added, if anything is.
void convolve_row(const ConvolveArgs& g, const char* const* rows, const float* taps, int64_t lane, char* out) {
  const int64_t element = element_bytes(g.dtype), channels = g.layout.k.dim;
  for (int64_t c = 0; c < channels; c += 16) {
    const int n = int(channels - c < 16 ? channels - c : 16);
    F32x16 sum = mul(load_elements_n(g.dtype, rows[0] + c * element, n), load(taps + c));
    for (int j = 1; j < g.width; ++j) sum = add(sum, mul(load_elements_n(g.dtype, rows[j] + c * element, n), load(taps + j * lane + c)));
    if (g.bias) sum = add(sum, load(taps + g.width * lane + c));
    store_elements_n(g.dtype, out + c * element, sum, n);
  }
}

void convolve(const ConvolveArgs* args) {
  const ConvolveArgs& g = *args;
  const PageLayout& at = g.layout;
  const int64_t channels = at.k.dim, row_bytes = channels * element_bytes(g.dtype), lane = (channels + 15) / 16 * 16;
  memset(g.scratch, 0, size_t(convolve_scratch_floats(channels, g.width)) * sizeof(float));
  spread_taps(g.dtype, g.weight, channels * g.width, g.width, lane, g.scratch);
  if (g.bias) spread_taps(g.dtype, g.bias, channels, 1, lane, g.scratch + g.width * lane);
  const char* const none = (const char*)(g.scratch + (g.width + 1) * lane);
  const auto row_at = [&](int32_t s, int64_t token, int64_t position) {
    if (position < 0) return none;
    if (token >= g.query_start[s]) return (const char*)g.staged.k + token * g.staged.k_token_stride;
    const int64_t page = g.page_ids[g.page_start[s] + position / at.page_size];
    return (const char*)at.pages + page * at.page_bytes + at.k.offset + position % at.page_size * row_bytes;
  };
  const int threads = g.num_tokens * channels * g.width < 65536 ? 1 : g.num_threads;
  parallel(threads, [&](const Member& me) {
    const int64_t end = int64_t(g.num_tokens) * (me.id + 1) / me.count;
    int32_t s = 0;
    for (int64_t t = int64_t(g.num_tokens) * me.id / me.count; t < end; ++t) {
      while (s < g.num_seqs && t >= g.query_start[s + 1]) ++s;
      char* const out = (char*)g.out + t * row_bytes;
      if (s == g.num_seqs) {
        memset(out, 0, size_t(row_bytes));
        continue;
      }
      const char* rows[kMostTaps];
      for (int j = 0; j < g.width; ++j) {
        const int64_t back = g.width - 1 - j;
        rows[j] = row_at(s, t - back, g.num_committed[s] + t - g.query_start[s] - back);
      }
      convolve_row(g, rows, g.scratch, lane, out);
    }
  });
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
