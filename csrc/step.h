// One step over a store of pages, as layer programs see it: they stage a layer's keys and values, attend, and know nothing of
// tables or pages. What the Python side does for all other layers is in store.py.
//
//   staged rows   [layer][T][Hkv][bytes], K and then V of each layer, in one piece of memory that the store keeps
//   commit        all layers that were staged, once the whole step has succeeded
#pragma once
#include <map>
#include <tuple>
#include <vector>

#include "kept.h"
#include "kernels.h"

namespace quire {

using Address = uintptr_t;

// Where one layer's rows lie, in pages of its group and among the staged rows of a token.
struct LayerPlace {
  PageLayout layout;
  int32_t group;
  int64_t staged_bytes;  // of the layers before, a token
};

// layer_idx, group, page_size, num_kv_heads, then offset, dim, format and bytes of K and of V
using PlaceForm = std::tuple<int32_t, int32_t, int32_t, int32_t, int64_t, int32_t, int32_t, int32_t, int64_t, int32_t, int32_t, int32_t>;

class Step;

class Store {
 public:
  Store(Address pages, int64_t num_pages, int64_t page_bytes, const std::vector<PlaceForm>& places);
  const LayerPlace& place(int32_t layer_idx) const;

 private:
  friend class Step;
  const Step* current_ = nullptr;  // the one whose rows are staged
  std::map<int32_t, LayerPlace> places_;
  int64_t staged_bytes_ = 0;  // of all layers, a token
  Kept staged_;
};

// What attention of one layer asks for; 0 means none.
struct AttendForm {
  int32_t dtype, num_heads, window, chunk;
  float scale, softcap;
};

// What a short convolution asks for: how wide its kernel [C, W] is, and which of its layer's weights are that and its bias, -1 for none.
struct ConvolveForm {
  int32_t dtype, width, weight, bias;
};

// page_ids, page_start and how many page_ids, of one group
using TableForm = std::tuple<Address, Address, int32_t>;

class Step {
 public:
  // Another one of the same store is over when this one begins. query_start [num_seqs + 1] and num_committed [num_seqs] int32, as the tables'; all must outlive it.
  Step(Store& store, Address query_start, Address num_committed, int32_t num_seqs, int32_t num_tokens, const std::vector<TableForm>& tables);
  ~Step();
  Step(const Step&) = delete;

  int32_t num_tokens() const { return num_tokens_; }
  const Store& store() const { return store_; }

  // Where a layer's rows of keys and values are to be staged.
  Staged rows_of(const LayerPlace& place) const;  // throws where the step is over

  // q [T, num_heads, Dk] and k, v [T, Hkv, D] of form.dtype -> out [T, num_heads, Dv]. Keys and values that are not encoded must
  // be where they are staged. Throws where a table or a length is out of range.
  void attend(int32_t layer_idx, const AttendForm& form, const void* q, const void* k, const void* v, void* out, int32_t num_threads);

  // x [T, C] of form.dtype, where it is staged, along each sequence with a kernel [C, W] and a bias [C] or null -> out [T, C]. Throws as `attend`.
  void convolve(int32_t layer_idx, const ConvolveForm& form, const void* kernel, const void* bias, const void* x, void* out, int32_t num_threads);

  // Write what was staged to pages: slots[g] int64 [T] of group g (page * B + offset), -1 for nowhere.
  void commit(const std::vector<Address>& slots, int32_t num_threads) const;
  const std::vector<int32_t>& staged_layers() const { return layers_; }
  int64_t staged_bytes() const { return store_.staged_bytes_ * num_tokens_; }  // that all layers' rows take

 private:
  void note(int32_t layer_idx);
  Store& store_;
  const int32_t *query_start_, *num_committed_;
  int32_t num_seqs_, num_tokens_;
  std::vector<TableForm> tables_;
  std::vector<int32_t> layers_;
};

}  // namespace quire
