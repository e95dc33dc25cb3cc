// Arguments and function table of the linear kernels (see kernels.h: declarations and PODs only).
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace quire {

// How a weight lies in memory: as it is, [N, K] or [K, N], or packed (packed_formats.h), of elements or of codes.
enum WeightFormat : int32_t { kRowsNK = 0, kRowsKN = 1, kPackedF32 = 2, kPackedBF16 = 3, kPackedF16 = 4, kPackedInt8 = 5, kPackedInt4 = 6, kNumWeightFormats = 7 };

// y[M, N] = x[M, K] W + bias[N]. M and N at least 1. x, bias and y have one dtype; a weight that is not packed has it too.
struct LinearArgs {
  const void *x, *w, *bias;  // the last dimension contiguous; bias may be null
  void* y;                   // contiguous
  int64_t m, n, k, x_stride, w_stride;  // strides of rows, in elements; a packed weight has none
  int32_t dtype, format, num_threads;
  float* scratch;  // scratch_floats of them, aligned to 64 bytes
};

// Rows of a weight [total, K] of a dtype, n of them from the first, which begins a panel, `stride` elements apart, to the bytes of a packed format. All
// before them have been packed.
struct PackArgs {
  const void* w;
  void* packed;  // of the whole weight
  int64_t total, first, n, k, stride;
  int32_t dtype, format, num_threads;
};

// Rows ids[i] of a packed weight [N, K] to out[i, K], contiguous, of a dtype.
struct UnpackArgs {
  const void* packed;
  const int64_t* ids;
  void* out;
  int64_t count, n, k;
  int32_t format, dtype, num_threads;
};

struct LinearKernels {
  int64_t (*scratch_floats)(const LinearArgs*);
  // Products of one x with weights of one form: x, m, k, x_stride, dtype, format, num_threads and scratch, as much as one of them wants at the most,
  // are the same of all.
  void (*multiply)(const LinearArgs* products, int64_t count);
  int64_t (*pack)(const PackArgs*);  // how many bytes the weight takes up to the last of these rows
  void (*rows)(const UnpackArgs*);
  int64_t (*packed_bytes)(int32_t format, int64_t n, int64_t k);  // at the most
};

}  // namespace quire
