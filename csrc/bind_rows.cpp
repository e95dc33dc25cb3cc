// Python bindings of layer programs: rows of small operators and products with weights, one after the other in one call.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>
#include <string.h>

#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "bind.h"

namespace nb = nanobind;

namespace quire {
namespace {

constexpr int64_t kLine = 64;

void require(bool fine, const char* what) {
  if (!fine) throw std::invalid_argument(what);
}

struct Freed {
  void operator()(char* p) const { operator delete(p, std::align_val_t{kLine}); }
};

// Memory that the calling thread keeps from call to call.
struct Kept {
  std::unique_ptr<char, Freed> memory;
  int64_t held = 0;

  char* bytes(int64_t count) {
    if (count > held) {
      memory.reset();
      held = 0;
      memory.reset(static_cast<char*>(operator new(size_t(count), std::align_val_t{kLine})));
      held = count;
    }
    return memory.get();
  }
};

// Packed by program.py, in this order. `arena` < 0: the address is given at each call; otherwise the buffer's first byte in
// the arena, for each token of the call.
struct BufferForm {
  int64_t row_bytes, dtype, arena;
};

// `product` 0: `count` instructions from `first` on. Else 1 + the WeightFormat of x W, where these mean nothing: the
// numbers of buffers stand for x, weight, bias (-1: none) and y; m rows to a token, x from element `x_at` of its row on.
struct Step {
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
        steps_(unpacked<Step>(steps, "steps must be whole Step structs")),
        scratch_floats_((scratch_floats + 15) / 16 * 16),
        arena_bytes_(arena_bytes) {
    const int64_t num_buffers = int64_t(buffers_.size()), num_instructions = int64_t(instructions_.size());
    const auto known = [&](int64_t buffer) { return buffer >= 0 && buffer < num_buffers; };
    for (const BufferForm& form : buffers_) {
      require(form.row_bytes >= 0 && form.dtype >= kF32 && form.dtype <= kF16 && form.arena < arena_bytes_, "a buffer is out of range");
      num_given_ += form.arena < 0;
    }
    for (const RowInstruction& g : instructions_) {
      require(g.op >= 0 && g.op < kNumRowOps && g.dtype >= kF32 && g.dtype <= kF16, "an instruction is not known");
      require(g.op > kRowStore || known(g.buffer), "an instruction's buffer is out of range");
      for (const RowOperand* o : {&g.out, &g.a, &g.b, &g.c}) {
        int64_t last = o->at;
        for (int i = 0; i < 3; ++i) last += int64_t(g.n[i] - 1) * o->step[i];
        require(o->at >= 0 && last < scratch_floats_, "an operand is outside of scratch");
      }
    }
    for (const Step& s : steps_) {
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
    require(int64_t(addresses.size()) == num_given_, "one address must be given for each buffer that has none");
    nb::gil_scoped_release release;
    static thread_local Kept arena, scratch;
    static thread_local std::vector<RowBuffer> buffers;
    char* const own = arena.bytes(arena_bytes_ * num_rows);
    buffers.clear();
    size_t given = 0;
    for (const BufferForm& form : buffers_)
      buffers.push_back({form.arena < 0 ? pointer<char>(addresses[given++]) : own + form.arena * num_rows, form.row_bytes, int32_t(form.dtype)});
    for (int64_t i = first; i < end; ++i) {
      const Step& s = steps_[size_t(i)];
      if (s.product) {
        const RowBuffer &x = buffers[size_t(s.x)], &y = buffers[size_t(s.y)];
        const int64_t element = x.dtype == kF32 ? 4 : 2;
        multiply({x.rows + s.x_at * element, buffers[size_t(s.weight)].rows, s.bias < 0 ? nullptr : buffers[size_t(s.bias)].rows,
                                     y.rows, num_rows * s.m, s.n, s.k, s.x_stride, s.weight_stride, x.dtype, int32_t(s.product - 1), num_threads, nullptr});
      } else {
        auto* const floats = reinterpret_cast<float*>(scratch.bytes(scratch_floats_ * num_threads * int64_t(sizeof(float))));
        const RowsArgs args{instructions_.data() + s.first, s.count, buffers.data(), num_rows, floats, scratch_floats_, num_threads};
        active_kernels().run_rows(&args);
      }
    }
  }

 private:
  std::vector<RowInstruction> instructions_;
  std::vector<BufferForm> buffers_;
  std::vector<Step> steps_;
  int64_t scratch_floats_, arena_bytes_, num_given_ = 0;
};

}  // namespace

void bind_rows(nb::module_& m) {
  nb::class_<Program>(m, "Program")
      .def(nb::init<nb::bytes, nb::bytes, nb::bytes, int64_t, int64_t>())
      .def("run", &Program::run);
}

}  // namespace quire
