// A model's forward in one call, where it is made of nothing but these parts (native_forward.py):
//
//   ids ───────> rows of the embedding ──> scaled, if they are ──> layers ──> more layers ──> rows wanted ──> tail: last norm and head ──> logits
//   positions ─> rows of tables (rope) ─────────────────────────────┴─────────────┘
#pragma once
#include <optional>
#include <vector>

#include "program.h"

namespace quire {

// A weight [n, k]: of a packed format (linear_args.h) or plain rows, kRowsNK; `dtype`: of the elements that are taken.
struct Embedding {
  Address weight;
  int32_t format;
  int64_t n, k;
  int32_t dtype;

  // Rows ids[i], int64, to out[i, k]. Throws std::out_of_range.
  void rows(const int64_t* ids, int64_t count, char* out, int32_t num_threads) const;
};

// Rows of several tables that hang on a position alone, in blocks of positions that follow one another. The blocks last used are kept.
class Tables {
 public:
  static constexpr int64_t kPositions = 64, kBlocks = 64;  // of a block; that are kept, so that a step of no more tokens finds all of its own

  explicit Tables(std::vector<int64_t> row_bytes);
  int64_t size() const { return int64_t(row_bytes_.size()); }
  int64_t row_bytes(int64_t table) const { return row_bytes_[size_t(table)]; }
  int64_t position_bytes() const { return position_bytes_; }  // of all of them

  // Rows of `count` positions, at most kBlocks, to out[table]. Returns the first block that is not there, if one is not.
  std::optional<int64_t> rows(const int64_t* positions, int64_t count, const std::vector<char*>& out);
  // Keep a block, kPositions contiguous rows of each table, in the place of the one that was used least recently.
  void keep(int64_t block, const std::vector<Address>& tables);

 private:
  struct Block {
    int64_t number, used;
  };
  char* place(size_t slot) { return memory_.bytes(kBlocks * kPositions * position_bytes_) + int64_t(slot) * kPositions * position_bytes_; }
  Block* find(int64_t number);

  std::vector<int64_t> row_bytes_;
  int64_t position_bytes_ = 0, now_ = 0;
  std::vector<Block> blocks_;
  Kept memory_;
};

// What is made of rows by a program, whose given buffers are its weights, the rows and what becomes of them.
struct Part {
  const Program* program;
  std::vector<Address> addresses;  // of the weights, and place for two more

  Part(const Program* of, std::vector<Address> weights);
  int64_t num_weights() const { return int64_t(addresses.size()) - 2; }
  int64_t in_bytes() const { return program->row_bytes(num_weights()); }
  int64_t out_bytes() const { return program->row_bytes(num_weights() + 1); }
  void run(const char* rows, Address out, int64_t count, int32_t num_threads);
};

// Layers that take the same inputs, in order: -1 the hidden states, otherwise the number of a table.
struct Stage {
  const Layers* layers;
  std::vector<int64_t> inputs;
};

class Forward {
 public:
  // scaled: what becomes of the embedding's rows before the layers. tail: takes rows of what the last layers give, and gives logits. Programs and
  // layers must outlive this. Throws std::invalid_argument where they do not fit.
  Forward(const Embedding& embedding, std::optional<Part> scaled, std::vector<int64_t> table_row_bytes, std::vector<Stage> stages, Part tail);

  // ids, positions: int64 of the step's tokens. tables: their rows of each table, or empty: those kept are used, of a step of at most
  // Tables::kBlocks tokens. wanted: int64 [num_wanted], the tokens behind which logits [num_wanted, V] are wanted. Where the tables lack a block it is
  // returned, and nothing has been done. Throws std::out_of_range for an id or a token wanted, and as Layers::run.
  std::optional<int64_t> run(Step& step, Address ids, Address positions, const std::vector<Address>& tables, Address wanted, int64_t num_wanted,
                             Address logits, int32_t num_threads);

  void keep(int64_t block, const std::vector<Address>& tables) { tables_.keep(block, tables); }

 private:
  Embedding embedding_;
  std::optional<Part> scaled_;
  Tables tables_;
  std::vector<Stage> stages_;
  Part tail_;
  Kept hidden_, table_rows_, results_[2], wanted_;
};

}  // namespace quire
