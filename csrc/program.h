// Layer programs: rows of small operators and products with weights, one after the other, and the layers of a step that are such programs.
#pragma once
#include <variant>
#include <vector>

#include "step.h"

namespace quire {

// Packed by program.py, in this order. `arena` < 0: the address is given at each call; otherwise the buffer's first byte in
// the arena, for each token of the call.
struct BufferForm {
  int64_t row_bytes, dtype, arena;
};

// `product` 0: `count` instructions from `first` on. Else 1 + the WeightFormat of x W, where these mean nothing: the
// numbers of buffers stand for x, weight, bias (-1: none) and y; m rows to a token, x from element `x_at` of its row on.
struct PlannedStep {
  int64_t product, first, count, x, x_at, weight, bias, y, m, n, k, x_stride, weight_stride;
};

// What one kind of layer does to the rows of any number of tokens, wherever its buffers are at a call.
class Program {
 public:
  // Throws std::invalid_argument where something is out of range.
  Program(std::vector<RowInstruction> instructions, std::vector<BufferForm> buffers, std::vector<PlannedStep> steps, int64_t scratch_floats,
          int64_t arena_bytes);

  int64_t num_steps() const { return int64_t(steps_.size()); }
  int64_t num_given() const { return num_given_; }
  int64_t num_buffers() const { return int64_t(buffers_.size()); }
  int64_t row_bytes(int64_t buffer) const { return buffers_[size_t(buffer)].row_bytes; }

  // Where its buffers are: the calling thread's own, until its next call. addresses: of those that have none of their own, in order. What one call
  // leaves in the others is there for the next one of the same thread and number of rows.
  std::vector<RowBuffer>& bound(const std::vector<Address>& addresses, int64_t num_rows) const;

  // Steps first .. end - 1 for `num_rows` tokens.
  void run(int64_t first, int64_t end, int64_t num_rows, const std::vector<RowBuffer>& buffers, int32_t num_threads) const;

 private:
  std::vector<RowInstruction> instructions_;
  std::vector<BufferForm> buffers_;
  std::vector<PlannedStep> steps_;
  int64_t scratch_floats_, arena_bytes_, num_given_ = 0;
};

// How tokens of a layer mix.
using MixForm = std::variant<AttendForm, ConvolveForm>;

// Layers of a model that follow one another, attention included: each but the first takes the one before's result where the first takes an input.
//
//   inputs ── hidden ──> layer ──> layer ── ... ──> output
//          └─ others, the same ──────┘
class Layers {
 public:
  // Steps [0, middle) of its program come before tokens mix. Its given buffers: weights, inputs, q, k, v and what attention gives, or x and what the
  // convolution gives, outputs. The program must outlive this. Throws std::invalid_argument where something is out of range.
  void add(const Program& program, int64_t middle, int64_t num_weights, int64_t num_inputs, const MixForm& form, int32_t layer_idx);
  void set_weights(int64_t index, std::vector<Address> addresses);
  int64_t size() const { return int64_t(layers_.size()); }
  // Of the first one, which all others have too.
  int64_t num_inputs() const { return layers_.front().num_inputs; }
  int64_t input_bytes(int64_t input) const { return layers_.front().program->row_bytes(layers_.front().num_weights + input); }
  // Of the last one, -1 where that has several outputs.
  int64_t output_bytes() const;

  // All of them for `num_rows` tokens, which are the step's. inputs[hidden_at]: the hidden states of the first;
  // layers before the last have one output, which goes there.
  void run(Step& step, int64_t num_rows, std::vector<Address> inputs, int64_t hidden_at, const std::vector<Address>& outputs,
           int32_t num_threads) const;

 private:
  struct Layer {
    const Program* program;
    int64_t middle, num_weights, num_inputs;
    MixForm form;
    int32_t layer_idx;
    std::vector<Address> weights;
    int64_t first_output() const { return num_weights + num_inputs + (std::holds_alternative<AttendForm>(form) ? 4 : 2); }
  };
  void run_one(const Layer& layer, Step& step, int64_t num_rows, const std::vector<Address>& inputs, const std::vector<Address>& outputs,
               int32_t num_threads) const;

  std::vector<Layer> layers_;
};

}  // namespace quire
