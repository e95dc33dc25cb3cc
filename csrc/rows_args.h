// Arguments and function table of the row operators (see kernels.h: declarations and PODs only).
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace quire {

// What one instruction does with a token's row. src/quire/tensors/models/program.py knows them by these numbers.
enum RowOp : int32_t {
  kRowLoad, kRowStore,  // between a buffer and scratch: `buffer`, all n[2] elements from its row
  kRowCopy, kRowAdd, kRowSub, kRowMul, kRowDiv,
  kRowAddScalar, kRowMulScalar, kRowDivScalar,
  kRowRsqrt, kRowTanh, kRowSigmoid, kRowSilu, kRowGelu, kRowGeluTanh, kRowRelu, kRowExp, kRowSoftplus,
  kRowMean,       // over the last dimension
  kRowLayerNorm,  // over the last dimension: a normalised, times b, plus c, epsilon in `scalar`
  kNumRowOps
};

// Elements of a row in scratch: from float `at` on, `step` floats from one to the next in each of three dimensions.
struct RowOperand {
  int32_t at, step[3];
};

// out = op(a, b, c, scalar) for n[0] x n[1] x n[2] elements, computed in fp32 and rounded to `dtype`. program.py packs these
// 92 bytes field by field, in this order.
struct RowInstruction {
  int32_t op, dtype, n[3], buffer;
  float scalar;
  RowOperand out, a, b, c;
};

// Rows of one dtype that lie one after the other; row_bytes 0: the same row for every token, as of a weight.
struct RowBuffer {
  char* rows;
  int64_t row_bytes;
  int32_t dtype;
};

struct RowsArgs {
  const RowInstruction* instructions;
  int64_t num_instructions;
  const RowBuffer* buffers;
  int64_t num_rows;
  float* scratch;  // scratch_floats for every thread, aligned to 64 bytes
  int64_t scratch_floats;
  int32_t num_threads;
};

}  // namespace quire
