// Python bindings of the linear kernels.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <vector>

#include "bind.h"
#include "kept.h"

namespace nb = nanobind;

namespace quire {
namespace {

void require_fit(bool fine) { quire::require(fine, "sizes, dtype, format or num_threads out of range"); }
bool is_packed(int32_t format) { return format >= kPackedF32 && format < kNumWeightFormats; }

void product(int32_t format, uintptr_t x, uintptr_t w, uintptr_t bias, uintptr_t y, int64_t m, int64_t n, int64_t k, int64_t x_stride,
             int64_t w_stride, int32_t dtype, int32_t num_threads) {
  require_fit(m >= 0 && n >= 0 && k >= 0 && is_dtype(dtype) && format >= 0 && format < kNumWeightFormats && num_threads >= 1);
  require_fit(!is_packed(format) || k > 0);
  const LinearArgs args{pointer<void>(x), pointer<void>(w), pointer<void>(bias), pointer<void>(y), m, n, k, x_stride, w_stride, dtype, format, num_threads, nullptr};
  if (double(m) * double(n) * double(k) < 2e5) return multiply(args);  // microseconds: not worth another thread's turn
  nb::gil_scoped_release release;
  multiply(args);
}

int64_t pack(int32_t format, uintptr_t w, uintptr_t packed, int64_t total, int64_t first, int64_t n, int64_t k, int64_t stride, int32_t dtype,
             int32_t num_threads) {
  require_fit(n > 0 && first >= 0 && n <= total - first && k > 0 && is_dtype(dtype) && is_packed(format) && num_threads >= 1);
  require_fit(format > kPackedF16 || format == kPackedF32 + dtype);  // elements keep their dtype
  const PackArgs args{pointer<void>(w), pointer<void>(packed), total, first, n, k, stride, dtype, format, num_threads};
  nb::gil_scoped_release release;
  return active_kernels().linear.pack(&args);
}

void packed_rows(int32_t format, uintptr_t packed, uintptr_t ids, uintptr_t out, int64_t count, int64_t n, int64_t k, int32_t dtype, int32_t num_threads) {
  require_fit(count >= 0 && n > 0 && k > 0 && is_dtype(dtype) && is_packed(format) && num_threads >= 1);
  const auto* id = pointer<int64_t>(ids);
  for (int64_t i = 0; i < count; ++i)
    if (id[i] < 0 || id[i] >= n) throw nb::index_error("a row's id is out of range");
  const UnpackArgs args{pointer<void>(packed), id, pointer<void>(out), count, n, k, format, dtype, num_threads};
  nb::gil_scoped_release release;
  active_kernels().linear.rows(&args);
}

int64_t packed_bytes(int32_t format, int64_t n, int64_t k) {
  require_fit(n > 0 && k > 0 && is_packed(format));
  return active_kernels().linear.packed_bytes(format, n, k);
}

}  // namespace

void multiply(LinearArgs args) {
  std::vector<LinearArgs> one{args};
  multiply(one);
}

void multiply(std::vector<LinearArgs>& products) {
  const LinearKernels& kernels = active_kernels().linear;
  static thread_local Kept scratch;  // of x 8 MiB or 1.5 MiB a thread, and 0.6 MiB for every thread of the team at the most
  // The kernels want something to do.
  products.erase(std::remove_if(products.begin(), products.end(), [](const LinearArgs& g) { return g.m == 0 || g.n == 0; }), products.end());
  if (products.empty()) return;
  int64_t floats = 0;
  for (const LinearArgs& g : products) floats = std::max(floats, kernels.scratch_floats(&g));
  auto* const memory = reinterpret_cast<float*>(scratch.bytes(floats * int64_t(sizeof(float))));
  for (LinearArgs& g : products) g.scratch = memory;
  kernels.multiply(products.data(), int64_t(products.size()));
}

void bind_linear(nb::module_& m) {
  m.def("product", &product);
  m.def("pack", &pack);
  m.def("packed_rows", &packed_rows);
  m.def("packed_bytes", &packed_bytes);
}

}  // namespace quire
