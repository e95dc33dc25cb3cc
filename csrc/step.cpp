#include "step.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "bind.h"
#include "check.h"
#include "schedule.h"

namespace quire {
namespace {

constexpr int64_t kKeptBytes = 64 << 20;  // of staged rows, from step to step: what 512 tokens of a small model take; more is given back

}  // namespace

Store::Store(Address pages, int64_t num_pages, int64_t page_bytes, const std::vector<PlaceForm>& places) {
  for (const auto& [layer_idx, group, page_size, num_kv_heads, k_offset, k_dim, k_format, k_bytes, v_offset, v_dim, v_format, v_bytes] : places) {
    const PageLayout layout =
        layout_of(pages, num_pages, page_bytes, page_size, num_kv_heads, k_offset, k_dim, k_format, k_bytes, v_offset, v_dim, v_format, v_bytes);
    if (!places_.emplace(layer_idx, LayerPlace{layout, group, staged_bytes_}).second)
      throw std::invalid_argument("layer " + std::to_string(layer_idx) + " has two places");
    staged_bytes_ += int64_t(num_kv_heads) * (k_bytes + v_bytes);
  }
}

const LayerPlace& Store::place(int32_t layer_idx) const {
  const auto found = places_.find(layer_idx);
  if (found == places_.end()) throw std::invalid_argument("layer " + std::to_string(layer_idx) + " has no place in this store");
  return found->second;
}

Step::Step(Store& store, Address query_start, Address num_committed, int32_t num_seqs, int32_t num_tokens, const std::vector<TableForm>& tables)
    : store_(store),
      query_start_(pointer<int32_t>(query_start)),
      num_committed_(pointer<int32_t>(num_committed)),
      num_seqs_(num_seqs),
      num_tokens_(num_tokens),
      tables_(tables) {
  if (num_seqs < 0 || num_tokens < 0) throw std::invalid_argument("num_seqs and num_tokens must not be negative");
  for (const auto& [layer_idx, place] : store.places_)
    if (place.group < 0 || size_t(place.group) >= tables.size())
      throw std::invalid_argument("layer " + std::to_string(layer_idx) + " is of group " + std::to_string(place.group) + ", which has no table");
  store_.current_ = this;
}

Step::~Step() {
  if (store_.current_ != this) return;
  store_.current_ = nullptr;
  if (store_.staged_.held() > kKeptBytes) store_.staged_.give_back();
}

Staged Step::rows_of(const LayerPlace& place) const {
  if (store_.current_ != this) throw std::runtime_error("another step of this store has begun");
  const int64_t k_bytes = place.layout.k.bytes, v_bytes = place.layout.v.bytes, heads = place.layout.num_kv_heads;
  char* const k = store_.staged_.bytes(store_.staged_bytes_ * num_tokens_ + kLine) + place.staged_bytes * num_tokens_;
  return {k, k + heads * k_bytes * num_tokens_, heads * k_bytes, k_bytes, heads * v_bytes, v_bytes};
}

void Step::attend(int32_t layer_idx, const AttendForm& form, const void* q, const void* k, const void* v, void* out, int32_t num_threads) {
  const LayerPlace& place = store_.place(layer_idx);
  const Kernels& kernels = active_kernels();
  const int32_t heads = place.layout.num_kv_heads;
  const int64_t element = element_bytes(form.dtype);
  AttendArgs args{};
  args.layout = place.layout;
  args.staged = rows_of(place);
  const auto stage = [&](const RowLayout& row, const void* from, const void* to) {
    if (row.format < kInt8) return from == to && row.format == form.dtype;
    const int64_t bytes = row.dim * element;
    const EncodeArgs encoded{from, const_cast<void*>(to), heads * bytes, bytes, form.dtype, row.format, row.dim, num_tokens_, heads, num_threads};
    kernels.encode(&encoded);
    return true;
  };
  if (!stage(place.layout.k, k, args.staged.k) || !stage(place.layout.v, v, args.staged.v))
    throw std::invalid_argument("keys and values that are not encoded must be of the pages' dtype, and where they are staged");
  const auto& [page_ids, page_start, num_page_ids] = tables_[size_t(place.group)];
  args.q = q;
  args.out = out;
  args.q_head_stride = place.layout.k.dim * element;
  args.q_token_stride = args.q_head_stride * form.num_heads;
  args.query_start = query_start_;
  args.num_committed = num_committed_;
  args.page_ids = pointer<int32_t>(page_ids);
  args.page_start = pointer<int32_t>(page_start);
  args.num_page_ids = num_page_ids;
  args.num_seqs = num_seqs_;
  args.num_tokens = num_tokens_;
  args.num_heads = form.num_heads;
  args.dtype = form.dtype;
  args.scale = form.scale;
  args.softcap = form.softcap;
  args.window = form.window;
  args.chunk = form.chunk;
  args.num_threads = num_threads;
  static thread_local Schedule schedule;
  Error error{};
  check_attend(args);
  build_schedule(args, kernels, schedule);
  if (kernels.attend(&args, &error)) throw std::runtime_error(error.text);
  note(layer_idx);
}

void Step::convolve(int32_t layer_idx, const ConvolveForm& form, const void* kernel, const void* bias, const void* x, void* out, int32_t num_threads) {
  const LayerPlace& place = store_.place(layer_idx);
  const RowLayout& row = place.layout.k;
  const auto& [page_ids, page_start, num_page_ids] = tables_[size_t(place.group)];
  ConvolveArgs args{};
  args.layout = place.layout;
  args.staged = rows_of(place);
  if (x != args.staged.k) throw std::invalid_argument("rows of a convolution must be where they are staged");
  args.out = out;
  args.query_start = query_start_;
  args.num_committed = num_committed_;
  args.page_ids = pointer<int32_t>(page_ids);
  args.page_start = pointer<int32_t>(page_start);
  args.num_seqs = num_seqs_;
  args.num_tokens = num_tokens_;
  args.width = form.width;
  args.dtype = form.dtype;
  args.num_threads = num_threads;
  args.weight = kernel;
  args.bias = bias;
  static thread_local std::vector<float> scratch;
  scratch.resize(size_t(convolve_scratch_floats(row.dim, form.width)));
  args.scratch = scratch.data();
  AttendArgs seen{};
  seen.layout = args.layout;
  seen.query_start = args.query_start;
  seen.num_committed = args.num_committed;
  seen.page_ids = args.page_ids;
  seen.page_start = args.page_start;
  seen.num_page_ids = num_page_ids;
  seen.num_seqs = args.num_seqs;
  seen.num_tokens = args.num_tokens;
  seen.window = form.width;
  check_attend(seen);
  active_kernels().convolve(&args);
  note(layer_idx);
}

// A forward may be run again in the same step (chain.py), and what it stages takes the place of what was.
void Step::note(int32_t layer_idx) {
  if (std::find(layers_.begin(), layers_.end(), layer_idx) == layers_.end()) layers_.push_back(layer_idx);
}

void Step::commit(const std::vector<Address>& slots, int32_t num_threads) const {
  if (slots.size() != tables_.size()) throw std::invalid_argument("one tensor of slots must be given for each group");
  for (const int32_t layer_idx : layers_) {
    const LayerPlace& place = store_.place(layer_idx);
    const CommitArgs args{place.layout, rows_of(place), pointer<int64_t>(slots[size_t(place.group)]), num_tokens_, num_threads};
    check_commit(args);
    active_kernels().commit(&args);
  }
}

}  // namespace quire
