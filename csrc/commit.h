// Copies a step's staged keys and values into pages.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace quire {
namespace QUIRE_ISA {
namespace {

int commit(const CommitArgs* args) {
  const PageLayout& at = args->layout;
  const Staged& from = args->staged;
  const int64_t bytes = at.dtype == kF32 ? 4 : 2, heads = at.num_kv_heads, page_size = at.page_size;
  const int64_t k_row = at.k_dim * bytes, v_row = at.v_dim * bytes;
  const int threads = args->num_tokens * heads * (k_row + v_row) < 131072 ? 1 : args->num_threads;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int32_t t = 0; t < args->num_tokens; ++t) {
    const int64_t slot = args->slots[t];
    if (slot < 0) continue;
    const int64_t page = slot / page_size, place = slot % page_size;
    char* const base = (char*)at.pages + page * at.page_elems * bytes;
    for (int64_t h = 0; h < heads; ++h) {
      memcpy(base + (at.k_offset + (h * page_size + place) * at.k_dim) * bytes,
             (const char*)from.k + (t * from.k_token_stride + h * from.k_head_stride) * bytes, size_t(k_row));
      memcpy(base + (at.v_offset + (h * page_size + place) * at.v_dim) * bytes,
             (const char*)from.v + (t * from.v_token_stride + h * from.v_head_stride) * bytes, size_t(v_row));
    }
  }
  return 0;
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
