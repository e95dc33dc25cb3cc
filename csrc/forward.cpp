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

Forward::Forward(const Embedding& embedding, std::vector<int64_t> table_row_bytes, const Layers& layers, std::vector<int64_t> inputs,
                 const Program& tail, std::vector<Address> tail_weights)
    : embedding_(embedding),
      tables_(std::move(table_row_bytes)),
      layers_(layers),
      inputs_(std::move(inputs)),
      hidden_at_(std::find(inputs_.begin(), inputs_.end(), -1) - inputs_.begin()),
      tail_(tail),
      addresses_(std::move(tail_weights)) {
  const int64_t hidden_bytes = embedding_.k * element_bytes(embedding_.dtype), num_weights = int64_t(addresses_.size());
  require(embedding_.n > 0 && embedding_.k > 0 && is_dtype(embedding_.dtype), "an embedding's shape or dtype is out of range");
  require(layers_.size() > 0 && layers_.num_inputs() == int64_t(inputs_.size()) && hidden_at_ < int64_t(inputs_.size()),
          "the layers' inputs are not all told, or none is the hidden states");
  for (size_t i = 0; i < inputs_.size(); ++i) {
    require(inputs_[i] >= -1 && inputs_[i] < tables_.size(), "an input is no table");
    require(layers_.input_bytes(int64_t(i)) == (inputs_[i] < 0 ? hidden_bytes : tables_.row_bytes(inputs_[i])), "rows of an input do not fit the layers");
  }
  require(tail_.num_given() == num_weights + 2 && tail_.row_bytes(num_weights) == hidden_bytes, "rows of the tail do not fit the layers");
  addresses_.resize(addresses_.size() + 2);
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
  char* const hidden = hidden_.bytes(num_tokens * hidden_bytes);
  embedding_.rows(pointer<int64_t>(ids), num_tokens, hidden, num_threads);
  std::vector<Address> inputs;
  for (const int64_t input : inputs_) inputs.push_back(input < 0 ? reinterpret_cast<Address>(hidden) : given[size_t(input)]);
  char* const result = result_.bytes(num_tokens * hidden_bytes);
  layers_.run(step, num_tokens, std::move(inputs), hidden_at_, {reinterpret_cast<Address>(result)}, num_threads);
  if (!num_wanted) return std::nullopt;
  char* const rows = wanted_.bytes(num_wanted * hidden_bytes);
  for (int64_t i = 0; i < num_wanted; ++i) memcpy(rows + i * hidden_bytes, result + at[i] * hidden_bytes, size_t(hidden_bytes));
  addresses_[addresses_.size() - 2] = reinterpret_cast<Address>(rows);
  addresses_.back() = logits;
  tail_.run(0, tail_.num_steps(), num_wanted, tail_.bound(addresses_, num_wanted), num_threads);
  return std::nullopt;
}

}  // namespace quire
