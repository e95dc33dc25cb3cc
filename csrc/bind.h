// Shared by the bindings. Pointers come from Python as integers (Tensor.data_ptr()): converting a torch tensor through
// DLPack costs microseconds, several times per layer.
#pragma once
#include <nanobind/nanobind.h>

#include <stdexcept>
#include <vector>

#include "kernels.h"

namespace quire {

void bind_attention(nanobind::module_& m);
void bind_linear(nanobind::module_& m);
void bind_rows(nanobind::module_& m);
void bind_sampling(nanobind::module_& m);

// x W through the kernels in use; `args.scratch` is filled in here. The caller may have let go of the interpreter.
void multiply(LinearArgs args);
// Products as kernels.linear.multiply has them, but for their scratch.
void multiply(std::vector<LinearArgs>& products);

// One layer's place in pages, from what Python knows of it. Throws std::invalid_argument naming what does not fit.
PageLayout layout_of(uintptr_t pages, int64_t num_pages, int64_t page_bytes, int32_t page_size, int32_t num_kv_heads, int64_t k_offset, int32_t k_dim,
                     int32_t k_format, int32_t k_bytes, int64_t v_offset, int32_t v_dim, int32_t v_format, int32_t v_bytes);

inline void require(bool fine, const char* what) {
  if (!fine) throw std::invalid_argument(what);
}
inline bool is_dtype(int64_t code) { return code >= kF32 && code <= kF16; }

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace quire
