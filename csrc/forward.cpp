#include "forward.h"

#include <string.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "bind.h"

namespace quire {

void Embedding::rows(const int64_t* ids, int64_t count, char* out, int32_t num_threads) const {
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= n) throw std::out_of_range("a token's id is out of range");
  if (format == kRowsNK) {
    const int64_t bytes = k * element_bytes(dtype);
    for (int64_t i = 0; i < count; ++i) memcpy(out + i * bytes, pointer<char>(weight) + ids[i] * bytes, size_t(bytes));
    return;
  }
  const UnpackArgs args{pointer<void>(weight), ids, out, count, n, k, format, dtype, num_threads};
  active_kernels().linear.rows(&args);
}

Tables::Tables(std::vector<int64_t> row_bytes) : row_bytes_(std::move(row_bytes)) {
  for (const int64_t bytes : row_bytes_) {
    require(bytes > 0, "a table's rows must have bytes");
    position_bytes_ += bytes;
  }
  blocks_.reserve(kBlocks);
}

Tables::Block* Tables::find(int64_t number) {
  const auto found = std::find_if(blocks_.begin(), blocks_.end(), [&](const Block& block) { return block.number == number; });
  return found == blocks_.end() ? nullptr : &*found;
}

std::optional<int64_t> Tables::rows(const int64_t* positions, int64_t count, const std::vector<char*>& out) {
  require(count <= kBlocks, "rows of more positions than there are blocks");
  ++now_;
  for (int64_t i = 0; i < count; ++i) {
    Block* const block = find(positions[i] / kPositions);
    if (!block) return positions[i] / kPositions;
    block->used = now_;
    const char* from = place(size_t(block - blocks_.data()));
    for (size_t t = 0; t < row_bytes_.size(); ++t) {
      memcpy(out[t] + i * row_bytes_[t], from + positions[i] % kPositions * row_bytes_[t], size_t(row_bytes_[t]));
      from += kPositions * row_bytes_[t];
    }
  }
  return std::nullopt;
}

void Tables::keep(int64_t number, const std::vector<Address>& tables) {
  require(tables.size() == row_bytes_.size(), "one address must be given for each table");
  Block* block = find(number);
  if (!block && blocks_.size() < size_t(kBlocks)) {
    blocks_.push_back({});
    block = &blocks_.back();
  } else if (!block) {
    block = &*std::min_element(blocks_.begin(), blocks_.end(), [](const Block& a, const Block& b) { return a.used < b.used; });
  }
  *block = {number, now_};
  char* to = place(size_t(block - blocks_.data()));
  for (size_t t = 0; t < tables.size(); ++t) {
    memcpy(to, pointer<char>(tables[t]), size_t(kPositions * row_bytes_[t]));
    to += kPositions * row_bytes_[t];
  }
}

Part::Part(const Program* of, std::vector<Address> weights) : program(of), addresses(std::move(weights)) {
  require(of->num_given() == int64_t(addresses.size()) + 2, "a part has other weights than its program");
  addresses.resize(addresses.size() + 2);
}

void Part::run(const char* rows, Address out, int64_t count, int32_t num_threads) {
  addresses[addresses.size() - 2] = reinterpret_cast<Address>(rows);
  addresses.back() = out;
  program->run(0, program->num_steps(), count, program->bound(addresses, count), num_threads);
}

Forward::Forward(const Embedding& embedding, std::optional<Part> scaled, std::vector<int64_t> table_row_bytes, std::vector<Stage> stages, Part tail)
    : embedding_(embedding), scaled_(std::move(scaled)), tables_(std::move(table_row_bytes)), stages_(std::move(stages)), tail_(std::move(tail)) {
  const int64_t hidden_bytes = embedding_.k * element_bytes(embedding_.dtype);
  require(embedding_.n > 0 && embedding_.k > 0 && is_dtype(embedding_.dtype), "an embedding's shape or dtype is out of range");
  require(!scaled_ || (scaled_->in_bytes() == hidden_bytes && scaled_->out_bytes() == hidden_bytes), "rows of the embedding do not fit what scales them");
  require(!stages_.empty(), "there are no layers");
  for (const auto& [layers, inputs] : stages_) {
    require(layers->size() > 0 && layers->num_inputs() == int64_t(inputs.size()) && std::count(inputs.begin(), inputs.end(), -1) == 1,
            "the layers' inputs are not all told, or not one is the hidden states");
    require(layers->output_bytes() == hidden_bytes, "the layers do not give hidden states");
    for (size_t i = 0; i < inputs.size(); ++i) {
      require(inputs[i] >= -1 && inputs[i] < tables_.size(), "an input is no table");
      require(layers->input_bytes(int64_t(i)) == (inputs[i] < 0 ? hidden_bytes : tables_.row_bytes(inputs[i])), "rows of an input do not fit the layers");
    }
  }
  require(tail_.in_bytes() == hidden_bytes, "rows of the tail do not fit the layers");
}

std::optional<int64_t> Forward::run(Step& step, Address ids, Address positions, const std::vector<Address>& tables, Address wanted,
                                    int64_t num_wanted, Address logits, int32_t num_threads) {
  const int64_t num_tokens = step.num_tokens(), hidden_bytes = embedding_.k * element_bytes(embedding_.dtype);
  const int64_t* const at = pointer<int64_t>(wanted);
  for (int64_t i = 0; i < num_wanted; ++i)
    if (at[i] < 0 || at[i] >= num_tokens) throw std::out_of_range("a token behind which logits are wanted is out of range");
  std::vector<Address> given = tables;
  if (tables.empty() && tables_.size()) {
    char* to = table_rows_.bytes(num_tokens * tables_.position_bytes());
    std::vector<char*> out;
    for (int64_t t = 0; t < tables_.size(); to += num_tokens * tables_.row_bytes(t++)) out.push_back(to);
    if (const auto missing = tables_.rows(pointer<int64_t>(positions), num_tokens, out)) return missing;
    for (char* const rows : out) given.push_back(reinterpret_cast<Address>(rows));
  }
  require(int64_t(given.size()) == tables_.size(), "one address must be given for each table");
  char* hidden = hidden_.bytes(num_tokens * hidden_bytes);
  embedding_.rows(pointer<int64_t>(ids), num_tokens, hidden, num_threads);
  size_t results = 0;
  const auto next = [&] { return results_[results++ % 2].bytes(num_tokens * hidden_bytes); };
  if (scaled_) {
    char* const to = next();
    scaled_->run(hidden, reinterpret_cast<Address>(to), num_tokens, num_threads);
    hidden = to;
  }
  for (const auto& [layers, taken] : stages_) {
    std::vector<Address> inputs;
    for (const int64_t input : taken) inputs.push_back(input < 0 ? reinterpret_cast<Address>(hidden) : given[size_t(input)]);
    char* const to = next();
    layers->run(step, num_tokens, std::move(inputs), std::find(taken.begin(), taken.end(), -1) - taken.begin(), {reinterpret_cast<Address>(to)},
                num_threads);
    hidden = to;
  }
  if (!num_wanted) return std::nullopt;
  char* const rows = wanted_.bytes(num_wanted * hidden_bytes);
  for (int64_t i = 0; i < num_wanted; ++i) memcpy(rows + i * hidden_bytes, hidden + at[i] * hidden_bytes, size_t(hidden_bytes));
  tail_.run(rows, logits, num_wanted, num_threads);
  return std::nullopt;
}

}  // namespace quire
