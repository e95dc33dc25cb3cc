// Arguments and function table of the linear kernels (see kernels.h: declarations and PODs only).
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace quire {

// y[M, N] = x[M, K] W + bias[N], all of one dtype, W as it lies in memory: [N, K] for linear, [K, N] for matmul. M and N at least 1.
struct LinearArgs {
  const void *x, *w, *bias;  // the last dimension contiguous; bias may be null
  void* y;                   // contiguous
  int64_t m, n, k, x_stride, w_stride;  // strides of rows, in elements
  int32_t dtype, num_threads;
  float* scratch;  // scratch_floats of them, aligned to 64 bytes
};

struct LinearKernels {
  int64_t (*linear_scratch_floats)(const LinearArgs*);
  int64_t (*matmul_scratch_floats)(const LinearArgs*);
  void (*linear)(const LinearArgs*);
  void (*matmul)(const LinearArgs*);
};

}  // namespace quire
