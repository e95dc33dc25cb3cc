// Shared by the bindings. Pointers come from Python as integers (Tensor.data_ptr()): converting a torch tensor through
// DLPack costs microseconds, several times per layer.
#pragma once
#include <nanobind/nanobind.h>

#include "kernels.h"

namespace quire {

void bind_attention(nanobind::module_& m);
void bind_linear(nanobind::module_& m);
void bind_rows(nanobind::module_& m);
void bind_sampling(nanobind::module_& m);

// x W through the kernels in use; `args.scratch` is filled in here. The caller may have let go of the interpreter.
void multiply(LinearArgs args);

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace quire
