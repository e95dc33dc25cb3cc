#include "program.h"

#include <utility>

#include "bind.h"
#include "kept.h"

namespace quire {
namespace {

// Whether two products have the same rows of x, and weights of one form: they are one call. No result lies over x, which the last reads, too.
bool one_x(const PlannedStep& a, const PlannedStep& b) {
  return a.product == b.product && a.x == b.x && a.x_at == b.x_at && a.m == b.m && a.k == b.k && a.x_stride == b.x_stride;
}

}  // namespace

Program::Program(std::vector<RowInstruction> instructions, std::vector<BufferForm> buffers, std::vector<PlannedStep> steps, int64_t scratch_floats,
                 int64_t arena_bytes)
    : instructions_(std::move(instructions)),
      buffers_(std::move(buffers)),
      steps_(std::move(steps)),
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
      require(s.product > 0 && s.product <= kNumWeightFormats && known(s.x) && known(s.weight) && known(s.y) && s.bias >= -1 && s.bias < num_buffers,
              "a product's buffer is out of range");
    else
      require(s.first >= 0 && s.count >= 0 && s.first + s.count <= num_instructions, "a step's instructions are out of range");
  }
}

std::vector<RowBuffer>& Program::bound(const std::vector<Address>& addresses, int64_t num_rows) const {
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

void Program::run(int64_t first, int64_t end, int64_t num_rows, const std::vector<RowBuffer>& buffers, int32_t num_threads) const {
  require(first >= 0 && first <= end && end <= num_steps(), "steps are out of range");
  require(num_rows >= 0 && num_threads > 0, "num_rows must not be negative and num_threads must be positive");
  static thread_local Kept scratch;
  static thread_local std::vector<LinearArgs> products;
  products.clear();
  for (int64_t i = first; i < end; ++i) {
    const PlannedStep& s = steps_[size_t(i)];
    if (s.product) {
      const RowBuffer &x = buffers[size_t(s.x)], &y = buffers[size_t(s.y)];
      const int64_t element = element_bytes(x.dtype);
      products.push_back({x.rows + s.x_at * element, buffers[size_t(s.weight)].rows, s.bias < 0 ? nullptr : buffers[size_t(s.bias)].rows, y.rows,
                          num_rows * s.m, s.n, s.k, s.x_stride, s.weight_stride, x.dtype, int32_t(s.product - 1), num_threads, nullptr});
      if (i + 1 < end && one_x(s, steps_[size_t(i + 1)])) continue;
      multiply(products);
      products.clear();
    } else {
      auto* const floats = reinterpret_cast<float*>(scratch.bytes(scratch_floats_ * num_threads * int64_t(sizeof(float))));
      const RowsArgs args{instructions_.data() + s.first, s.count, buffers.data(), num_rows, floats, scratch_floats_, num_threads};
      active_kernels().run_rows(&args);
    }
  }
}

namespace {

// Memory of this thread for `count` kinds of rows of `row_bytes` each, the buffers from `mix` on. Throws where they are planned otherwise.
void place_rows(const int64_t* row_bytes, size_t count, int64_t num_rows, RowBuffer* mix) {
  static thread_local Kept kept;
  int64_t size = 0, from[4];
  for (size_t i = 0; i < count; ++i) {
    require(mix[i].row_bytes == row_bytes[i], "rows of what mixes do not fit the layer's place");
    from[i] = size;
    size += (row_bytes[i] * num_rows + kLine - 1) / kLine * kLine;
  }
  char* const memory = kept.bytes(size);
  for (size_t i = 0; i < count; ++i) mix[i].rows = memory + from[i];
}

// Where q, k, v and what attention gives lie: k and v where they are staged, if they are staged as they are.
void place_mix(const AttendForm& form, const PageLayout& at, const Staged& staged, int64_t num_rows, RowBuffer* mix) {
  require(form.num_heads > 0 && form.num_heads % at.num_kv_heads == 0, "num_heads must be a positive multiple of num_kv_heads");
  const int64_t heads = form.num_heads * element_bytes(form.dtype), kv_heads = at.num_kv_heads * element_bytes(form.dtype);
  const int64_t row_bytes[] = {heads * at.k.dim, kv_heads * at.k.dim, kv_heads * at.v.dim, heads * at.v.dim};
  place_rows(row_bytes, 4, num_rows, mix);
  if (at.k.format < kInt8) mix[1].rows = (char*)staged.k;
  if (at.v.format < kInt8) mix[2].rows = (char*)staged.v;
}

// Where x, which is staged, and what the convolution gives lie.
void place_mix(const ConvolveForm& form, const PageLayout& at, const Staged& staged, int64_t num_rows, RowBuffer* mix) {
  require(at.k.format == form.dtype && at.num_kv_heads == 1 && !at.v.dim, "rows of a convolution are keys of one head, of the pages' dtype");
  const int64_t row = at.k.dim * element_bytes(form.dtype), row_bytes[] = {row, row};
  place_rows(row_bytes, 2, num_rows, mix);
  mix[0].rows = (char*)staged.k;
}

}  // namespace

void Layers::add(const Program& program, int64_t middle, int64_t num_weights, int64_t num_inputs, const MixForm& form, int32_t layer_idx) {
  require(middle >= 0 && middle <= program.num_steps(), "steps are out of range");
  const Layer layer{&program, middle, num_weights, num_inputs, form, layer_idx, {}};
  require(num_weights >= 0 && num_inputs > 0 && layer.first_output() < program.num_given(), "a program's buffers are fewer than its layer has");
  if (const auto* convolves = std::get_if<ConvolveForm>(&form))
    require(convolves->weight < num_weights && convolves->bias < num_weights, "a convolution's weights are none of its layer");
  layers_.push_back(layer);
}

void Layers::set_weights(int64_t index, std::vector<Address> addresses) {
  require(index >= 0 && index < size(), "there is no such layer");
  Layer& layer = layers_[size_t(index)];
  require(int64_t(addresses.size()) == layer.num_weights, "one address must be given for each weight");
  layer.weights = std::move(addresses);
}

int64_t Layers::output_bytes() const {
  const Layer& last = layers_.back();
  const int64_t first = last.first_output();
  return last.program->num_given() == first + 1 ? last.program->row_bytes(first) : -1;
}

void Layers::run(Step& step, int64_t num_rows, std::vector<Address> inputs, int64_t hidden_at, const std::vector<Address>& outputs,
                 int32_t num_threads) const {
  require(num_threads > 0 && num_rows == step.num_tokens(), "a layer's rows must be the step's tokens");
  require(hidden_at >= 0 && hidden_at < int64_t(inputs.size()), "there is no such input");
  static thread_local Kept between[2];
  for (size_t i = 0; i + 1 < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    const Address to = reinterpret_cast<Address>(between[i % 2].bytes(layer.program->row_bytes(layer.first_output()) * num_rows));
    run_one(layer, step, num_rows, inputs, {to}, num_threads);
    inputs[size_t(hidden_at)] = to;
  }
  if (!layers_.empty()) run_one(layers_.back(), step, num_rows, inputs, outputs, num_threads);
}

void Layers::run_one(const Layer& layer, Step& step, int64_t num_rows, const std::vector<Address>& inputs,
                     const std::vector<Address>& outputs, int32_t num_threads) const {
  const LayerPlace& place = step.store().place(layer.layer_idx);
  require(int64_t(inputs.size()) == layer.num_inputs && int64_t(layer.weights.size()) == layer.num_weights,
          "a layer's inputs or weights are not all given");
  static thread_local std::vector<Address> addresses;
  addresses.assign(layer.weights.begin(), layer.weights.end());
  addresses.insert(addresses.end(), inputs.begin(), inputs.end());
  addresses.resize(size_t(layer.first_output()), 0);
  addresses.insert(addresses.end(), outputs.begin(), outputs.end());
  std::vector<RowBuffer>& buffers = layer.program->bound(addresses, num_rows);
  RowBuffer* const mix = buffers.data() + layer.num_weights + layer.num_inputs;
  std::visit([&](const auto& form) { place_mix(form, place.layout, step.rows_of(place), num_rows, mix); }, layer.form);
  layer.program->run(0, layer.middle, num_rows, buffers, num_threads);
  if (const auto* convolves = std::get_if<ConvolveForm>(&layer.form)) {
    const void* const bias = convolves->bias < 0 ? nullptr : pointer<void>(layer.weights[size_t(convolves->bias)]);
    step.convolve(layer.layer_idx, *convolves, pointer<void>(layer.weights[size_t(convolves->weight)]), bias, mix[0].rows, mix[1].rows, num_threads);
  } else {
    step.attend(layer.layer_idx, std::get<AttendForm>(layer.form), mix[0].rows, mix[1].rows, mix[2].rows, mix[3].rows, num_threads);
  }
  layer.program->run(layer.middle, layer.program->num_steps(), num_rows, buffers, num_threads);
}

}  // namespace quire
