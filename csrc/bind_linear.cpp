// Python bindings of the linear kernels.
#include <nanobind/nanobind.h>

#include <memory>
#include <new>
#include <stdexcept>

#include "bind.h"

namespace nb = nanobind;

namespace quire {
namespace {

constexpr std::align_val_t kLine{64};
struct Freed {
  void operator()(float* p) const { operator delete(p, kLine); }
};

// Each calling thread keeps its scratch: 8 MiB of x and 0.3 MiB for every thread of the team at the most.
float* scratch_of_this_thread(int64_t num_floats) {
  thread_local std::unique_ptr<float, Freed> scratch;
  thread_local int64_t held = 0;
  if (num_floats > held) {
    scratch.reset();
    held = 0;
    scratch.reset(static_cast<float*>(operator new(size_t(num_floats) * sizeof(float), kLine)));
    held = num_floats;
  }
  return scratch.get();
}

void product(bool is_matmul, uintptr_t x, uintptr_t w, uintptr_t bias, uintptr_t y, int64_t m, int64_t n, int64_t k, int64_t x_stride,
             int64_t w_stride, int32_t dtype, int32_t num_threads) {
  if (m < 0 || n < 0 || k < 0 || dtype < kF32 || dtype > kF16 || num_threads < 1) throw std::invalid_argument("sizes, dtype or num_threads out of range");
  if (m == 0 || n == 0) return;  // the kernels want something to do
  const LinearKernels& kernels = active_kernels().linear;
  LinearArgs args{pointer<void>(x), pointer<void>(w), pointer<void>(bias), pointer<void>(y), m, n, k, x_stride, w_stride, dtype, num_threads, nullptr};
  args.scratch = scratch_of_this_thread((is_matmul ? kernels.matmul_scratch_floats : kernels.linear_scratch_floats)(&args));
  const auto multiply = is_matmul ? kernels.matmul : kernels.linear;
  if (double(m) * double(n) * double(k) < 2e5) return multiply(&args);  // microseconds: not worth another thread's turn
  nb::gil_scoped_release release;
  multiply(&args);
}

}  // namespace

void bind_linear(nb::module_& m) {
  m.def("product", &product);
}

}  // namespace quire
