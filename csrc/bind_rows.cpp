// Python bindings of layer programs: rows of small operators and products with weights, one after the other in one call.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>
#include <string.h>

#include <vector>

#include "bind.h"
#include "kept.h"
#include "step.h"

namespace nb = nanobind;

namespace quire {
namespace {

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

template <class T>
std::vector<T> unpacked(const nb::bytes& packed, const char* what) {
  require(packed.size() % sizeof(T) == 0, what);
  std::vector<T> items(packed.size() / sizeof(T));
  if (!items.empty()) memcpy(items.data(), packed.c_str(), packed.size());
  return items;
}

class Program {
 public:
  Program(nb::bytes instructions, nb::bytes buffers, nb::bytes steps, int64_t scratch_floats, int64_t arena_bytes)
      : instructions_(unpacked<RowInstruction>(instructions, "instructions must be whole RowInstruction structs")),
        buffers_(unpacked<BufferForm>(buffers, "buffers must be whole BufferForm structs")),
        steps_(unpacked<PlannedStep>(steps, "steps must be whole PlannedStep structs")),
        scratch_floats_((scratch_floats + 15) / 16 * 16),
        arena_bytes_(arena_bytes) {
    const int64_t num_buffers = int64_t(buffers_.size()), num_instructions = int64_t(instructions_.size());
    const auto known = [&](int64_t buffer) { return buffer >= 0 && buffer < num_buffers; };
    for (const BufferForm& form : buffers_) {
      require(form.row_bytes >= 0 && is_dtype(form.dtype) && form.arena < arena_bytes_, "a buffer is out of range");
      num_given_ += form.arena < 0;
    }
    for (const RowInstruction& g : instructions_) {
      require(g.op >= 0 && g.op < kNumRowOps && is_dtype(g.dtype), "an instruction is not known");
      require(g.op > kRowStore || known(g.buffer), "an instruction's buffer is out of range");
      for (const RowOperand* o : {&g.out, &g.a, &g.b, &g.c}) {
        int64_t last = o->at;
        for (int i = 0; i < 3; ++i) last += int64_t(g.n[i] - 1) * o->step[i];
        require(o->at >= 0 && last < scratch_floats_, "an operand is outside of scratch");
      }
    }
    for (const PlannedStep& s : steps_) {
      if (s.product)
        require(s.product > 0 && s.product <= kNumWeightFormats && known(s.x) && known(s.weight) && known(s.y) && s.bias >= -1 && s.bias < num_buffers, "a product's buffer is out of range");
      else
        require(s.first >= 0 && s.count >= 0 && s.first + s.count <= num_instructions, "a step's instructions are out of range");
    }
  }

  // Steps first .. end - 1 for `num_rows` tokens. addresses: of the buffers that have none of their own, in order. What one
  // call leaves in the arena is there for the next one of the same thread and number of rows.
  void run(int64_t first, int64_t end, int64_t num_rows, const std::vector<uintptr_t>& addresses, int32_t num_threads) const {
    require(first >= 0 && first <= end && end <= int64_t(steps_.size()), "steps are out of range");
    require(num_rows >= 0 && num_threads > 0, "num_rows must not be negative and num_threads must be positive");
    nb::gil_scoped_release release;
    std::vector<RowBuffer>& buffers = bound(addresses, num_rows);
    carry_out(first, end, num_rows, buffers, num_threads);
  }

  // All steps, with the layer's attention after the first `middle` of them. The buffers of q, k, v and of what attention gives are
  // number `attended` and the next three; no addresses are asked of them, zeros stand there.
  void run_layer(int64_t middle, int64_t attended, const AttendForm& form, int32_t layer_idx, Step& step, int64_t num_rows,
                 const std::vector<uintptr_t>& addresses, int32_t num_threads) const {
    const LayerPlace& place = step.store().place(layer_idx);
    const PageLayout& at = place.layout;
    require(num_rows == step.num_tokens(), "a layer's rows must be the step's tokens");
    require(middle >= 0 && middle <= int64_t(steps_.size()) && num_threads > 0, "steps are out of range");
    require(attended >= 0 && attended + 4 <= int64_t(buffers_.size()), "a buffer of attention is out of range");
    require(form.num_heads > 0 && form.num_heads % at.num_kv_heads == 0, "num_heads must be a positive multiple of num_kv_heads");
    const int64_t element = form.dtype == kF32 ? 4 : 2, heads[] = {form.num_heads, at.num_kv_heads, at.num_kv_heads, form.num_heads};
    const int32_t dims[] = {at.k.dim, at.k.dim, at.v.dim, at.v.dim};
    nb::gil_scoped_release release;
    std::vector<RowBuffer>& buffers = bound(addresses, num_rows);
    static thread_local Kept kept;
    int64_t size = 0, from[4];
    for (int i = 0; i < 4; ++i) {
      require(buffers[size_t(attended + i)].row_bytes == heads[i] * dims[i] * element, "rows of q, k, v and out do not fit the layer's place");
      from[i] = size;
      size += (heads[i] * dims[i] * element * num_rows + kLine - 1) / kLine * kLine;
    }
    char* const memory = kept.bytes(size);
    for (int i = 0; i < 4; ++i) buffers[size_t(attended + i)].rows = memory + from[i];
    const Staged staged = step.rows_of(place);
    if (at.k.format < kInt8) buffers[size_t(attended + 1)].rows = (char*)staged.k;
    if (at.v.format < kInt8) buffers[size_t(attended + 2)].rows = (char*)staged.v;
    carry_out(0, middle, num_rows, buffers, num_threads);
    const RowBuffer* const qkv = buffers.data() + attended;
    step.attend(layer_idx, form, qkv[0].rows, qkv[1].rows, qkv[2].rows, qkv[3].rows, num_threads);
    carry_out(middle, int64_t(steps_.size()), num_rows, buffers, num_threads);
  }

 private:
  // The calling thread's own, until its next call.
  std::vector<RowBuffer>& bound(const std::vector<uintptr_t>& addresses, int64_t num_rows) const {
    require(int64_t(addresses.size()) == num_given_, "one address must be given for each buffer that has none");
    static thread_local Kept arena;
    static thread_local std::vector<RowBuffer> buffers;
    char* const own = arena.bytes(arena_bytes_ * num_rows);
    buffers.clear();
    size_t given = 0;
    for (const BufferForm& form : buffers_)
      buffers.push_back({form.arena < 0 ? pointer<char>(addresses[given++]) : own + form.arena * num_rows, form.row_bytes, int32_t(form.dtype)});
    return buffers;
  }

  void carry_out(int64_t first, int64_t end, int64_t num_rows, std::vector<RowBuffer>& buffers, int32_t num_threads) const {
    static thread_local Kept scratch;
    for (int64_t i = first; i < end; ++i) {
      const PlannedStep& s = steps_[size_t(i)];
      if (s.product) {
        const RowBuffer &x = buffers[size_t(s.x)], &y = buffers[size_t(s.y)];
        const int64_t element = x.dtype == kF32 ? 4 : 2;
        multiply({x.rows + s.x_at * element, buffers[size_t(s.weight)].rows, s.bias < 0 ? nullptr : buffers[size_t(s.bias)].rows, y.rows,
                  num_rows * s.m, s.n, s.k, s.x_stride, s.weight_stride, x.dtype, int32_t(s.product - 1), num_threads, nullptr});
      } else {
        auto* const floats = reinterpret_cast<float*>(scratch.bytes(scratch_floats_ * num_threads * int64_t(sizeof(float))));
        const RowsArgs args{instructions_.data() + s.first, s.count, buffers.data(), num_rows, floats, scratch_floats_, num_threads};
        active_kernels().run_rows(&args);
      }
    }
  }

  std::vector<RowInstruction> instructions_;
  std::vector<BufferForm> buffers_;
  std::vector<PlannedStep> steps_;
  int64_t scratch_floats_, arena_bytes_, num_given_ = 0;
};

}  // namespace

void bind_rows(nb::module_& m) {
  nb::class_<Program>(m, "Program")
      .def(nb::init<nb::bytes, nb::bytes, nb::bytes, int64_t, int64_t>())
      .def("run", &Program::run)
      .def("run_layer", &Program::run_layer);
  nb::class_<AttendForm>(m, "AttendForm").def("__init__", [](AttendForm* form, int32_t dtype, int32_t num_heads, int32_t window, int32_t chunk, float scale, float softcap) {
    require(is_dtype(dtype) && num_heads > 0 && window >= 0 && chunk >= 0 && softcap >= 0, "attention's dtype, heads or mask are out of range");
    new (form) AttendForm{dtype, num_heads, window, chunk, scale, softcap};
  });
}

}  // namespace quire
