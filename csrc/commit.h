// Copies a step's staged rows of keys and values into pages, as they are.
#pragma once
#include "kernels.h"
#include "parallel.h"

namespace quire {
namespace QUIRE_ISA {
namespace {

int commit(const CommitArgs* args) {
  const PageLayout& at = args->layout;
  const Staged& from = args->staged;
  const int64_t heads = at.num_kv_heads, page_size = at.page_size, k_bytes = at.k.bytes, v_bytes = at.v.bytes;
  const int threads = args->num_tokens * heads * (k_bytes + v_bytes) < 131072 ? 1 : args->num_threads;
  parallel_for(threads, args->num_tokens, [&](int64_t t, int) {
    const int64_t slot = args->slots[t];
    if (slot < 0) return;
    const int64_t place = slot % page_size;
    char* const page = (char*)at.pages + slot / page_size * at.page_bytes;
    const char *k = (const char*)from.k + t * from.k_token_stride, *v = (const char*)from.v + t * from.v_token_stride;
    for (int64_t h = 0; h < heads; ++h) {
      memcpy(page + at.k.offset + (h * page_size + place) * k_bytes, k + h * from.k_head_stride, size_t(k_bytes));
      memcpy(page + at.v.offset + (h * page_size + place) * v_bytes, v + h * from.v_head_stride, size_t(v_bytes));
    }
  });
  return 0;
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
