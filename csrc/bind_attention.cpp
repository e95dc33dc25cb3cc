// Python bindings of attend, commit and encode, and of the step that layer programs attend in.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <limits>
#include <stdexcept>
#include <string>

#include "bind.h"
#include "check.h"
#include "kept.h"
#include "schedule.h"
#include "step.h"

namespace nb = nanobind;

namespace quire {
namespace {

RowLayout row_layout(const char* name, int64_t slots, int64_t page_bytes, int64_t offset, int32_t dim, int32_t format, int32_t bytes) {
  const std::string field(name);
  if (format < kF32 || format > kInt4) throw std::invalid_argument(field + " format " + std::to_string(format) + ": must be from 0 to 4");
  if (dim < (*name == 'K')) throw std::invalid_argument(field + " dim " + std::to_string(dim) + ": must be positive, of values at least 0");
  if (bytes != row_bytes(format, dim))
    throw std::invalid_argument(field + " rows of " + std::to_string(bytes) + " bytes: must be " + std::to_string(row_bytes(format, dim)));
  if (offset < 0 || offset + slots * bytes > page_bytes)
    throw std::invalid_argument(field + " rows at " + std::to_string(offset) + " do not fit in a page of " + std::to_string(page_bytes) + " bytes");
  const int64_t element = is_dtype(format) ? element_bytes(format) : 1;
  if (offset % element || page_bytes % element)
    throw std::invalid_argument(field + " rows at " + std::to_string(offset) + " in pages of " + std::to_string(page_bytes) +
                                " bytes: must be multiples of " + std::to_string(element));
  return {offset, dim, format, bytes};
}

void attend(int32_t dtype, Address q, int64_t q_token_stride, int64_t q_head_stride, Address k, int64_t k_token_stride, int64_t k_head_stride,
            Address v, int64_t v_token_stride, int64_t v_head_stride, Address out, Address pages, int64_t num_pages, int64_t page_bytes,
            int32_t page_size, int32_t num_kv_heads, int64_t k_offset, int32_t k_dim, int32_t k_format, int32_t k_bytes, int64_t v_offset,
            int32_t v_dim, int32_t v_format, int32_t v_bytes, int32_t num_heads, Address query_start, Address num_committed, Address page_ids, Address page_start,
            int32_t num_page_ids, int32_t num_seqs, int32_t num_tokens, float scale, float softcap, int32_t window, int32_t chunk, Address sinks,
            int32_t sinks_dtype, int32_t num_threads) {
  AttendArgs args{};
  args.layout =
      layout_of(pages, num_pages, page_bytes, page_size, num_kv_heads, k_offset, k_dim, k_format, k_bytes, v_offset, v_dim, v_format, v_bytes);
  args.staged = {pointer<void>(k), pointer<void>(v), k_token_stride, k_head_stride, v_token_stride, v_head_stride};
  require(is_dtype(dtype), "dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  require(!is_dtype(k_format) || k_format == dtype, "keys that are not encoded must have the queries' dtype");
  require(!is_dtype(v_format) || v_format == dtype, "values that are not encoded must have the queries' dtype");
  require(num_heads > 0 && num_heads % num_kv_heads == 0, "num_heads must be a positive multiple of num_kv_heads");
  require(num_seqs >= 0 && num_tokens >= 0, "num_seqs and num_tokens must not be negative");
  require(window >= 0 && chunk >= 0 && softcap >= 0, "window, chunk and softcap must not be negative (0 means none)");
  require(num_threads > 0, "num_threads must be positive");
  args.q = pointer<void>(q);
  args.out = pointer<void>(out);
  args.q_token_stride = q_token_stride;
  args.q_head_stride = q_head_stride;
  args.query_start = pointer<int32_t>(query_start);
  args.num_committed = pointer<int32_t>(num_committed);
  args.page_ids = pointer<int32_t>(page_ids);
  args.page_start = pointer<int32_t>(page_start);
  args.sinks = pointer<void>(sinks);
  args.dtype = dtype;
  args.sinks_dtype = sinks_dtype;
  args.num_page_ids = num_page_ids;
  args.num_seqs = num_seqs;
  args.num_tokens = num_tokens;
  args.num_heads = num_heads;
  args.scale = scale;
  args.softcap = softcap;
  args.num_threads = num_threads;
  args.window = window;
  args.chunk = chunk;
  Error error{};
  int failed;
  {
    nb::gil_scoped_release release;
    static thread_local Schedule schedule;
    const Kernels& kernels = active_kernels();
    check_attend(args);
    build_schedule(args, kernels, schedule);
    failed = kernels.attend(&args, &error);
  }
  if (failed) throw std::runtime_error(error.text);
}

void commit(Address k, int64_t k_token_stride, int64_t k_head_stride, Address v, int64_t v_token_stride, int64_t v_head_stride, Address pages,
            int64_t num_pages, int64_t page_bytes, int32_t page_size, int32_t num_kv_heads, int64_t k_offset, int32_t k_dim, int32_t k_format,
            int32_t k_bytes, int64_t v_offset, int32_t v_dim, int32_t v_format, int32_t v_bytes, Address slots, int32_t num_tokens,
            int32_t num_threads) {
  require(num_tokens >= 0, "num_tokens must not be negative");
  require(num_threads > 0, "num_threads must be positive");
  const CommitArgs args{
      layout_of(pages, num_pages, page_bytes, page_size, num_kv_heads, k_offset, k_dim, k_format, k_bytes, v_offset, v_dim, v_format, v_bytes),
      {pointer<void>(k), pointer<void>(v), k_token_stride, k_head_stride, v_token_stride, v_head_stride},
      pointer<int64_t>(slots),
      num_tokens,
      num_threads};
  nb::gil_scoped_release release;
  check_commit(args);
  active_kernels().commit(&args);
}

void encode(int32_t dtype, int32_t format, Address x, int64_t token_stride, int64_t head_stride, Address rows, int32_t num_tokens, int32_t num_heads,
            int32_t dim, int32_t bytes, int32_t num_threads) {
  require(is_dtype(dtype), "dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  require(format == kInt8 || format == kInt4, "format must be 3 (int8) or 4 (int4)");
  require(num_tokens >= 0 && num_heads >= 0, "num_tokens and num_heads must not be negative");
  require(dim > 0 && num_threads > 0, "dim and num_threads must be positive");
  require(bytes == row_bytes(format, dim), "bytes must be what a row of this format takes");
  const EncodeArgs args{pointer<void>(x), pointer<void>(rows), token_stride, head_stride, dtype, format, dim, num_tokens, num_heads, num_threads};
  nb::gil_scoped_release release;
  active_kernels().encode(&args);
}

// Which keys the schedule has sequences share, for those who want to see it: (part, keys of it, places of the query tokens in the step) of each
// shared item, of bf16 keys and values in one KV head. tables: page ids of each sequence.
std::vector<std::tuple<int32_t, int32_t, std::vector<int32_t>>> shared_items(const std::vector<int32_t>& query_start,
                                                                             const std::vector<int32_t>& num_committed,
                                                                             const std::vector<std::vector<int32_t>>& tables, int32_t page_size,
                                                                             int32_t num_heads) {
  require(query_start.size() == tables.size() + 1 && num_committed.size() == tables.size(), "one entry must be given for each sequence");
  require(page_size > 0 && num_heads > 0, "page_size and num_heads must be positive");
  std::vector<int32_t> page_ids, page_start{0};
  for (const std::vector<int32_t>& table : tables) {
    page_ids.insert(page_ids.end(), table.begin(), table.end());
    page_start.push_back(int32_t(page_ids.size()));
  }
  AttendArgs args{};
  args.dtype = kBF16;
  args.layout.k = args.layout.v = {0, 64, kBF16, 128};
  args.layout.num_pages = std::numeric_limits<int32_t>::max();
  args.layout.page_size = page_size;
  args.layout.num_kv_heads = args.num_threads = 1;
  args.num_heads = num_heads;
  args.query_start = query_start.data();
  args.num_committed = num_committed.data();
  args.page_ids = page_ids.data();
  args.page_start = page_start.data();
  args.num_page_ids = int32_t(page_ids.size());
  args.num_seqs = int32_t(tables.size());
  args.num_tokens = query_start.back();
  check_attend(args);
  Schedule schedule;
  build_schedule(args, active_kernels(), schedule);
  std::vector<std::tuple<int32_t, int32_t, std::vector<int32_t>>> found;
  for (const SharedItem& item : schedule.shared) {
    const auto tokens = schedule.shared_tokens.begin() + item.first_token;
    found.emplace_back(item.part, item.keys, std::vector<int32_t>(tokens, tokens + item.num_tokens));
  }
  return found;
}

}  // namespace

int32_t row_bytes(int32_t format, int32_t dim) {
  if (format == kInt8) return dim + 1;
  if (format == kInt4) return (dim + 1) / 2 + (dim + kInt4Group - 1) / kInt4Group;
  return dim * int32_t(element_bytes(format));
}

PageLayout layout_of(uintptr_t pages, int64_t num_pages, int64_t page_bytes, int32_t page_size, int32_t num_kv_heads, int64_t k_offset, int32_t k_dim,
                     int32_t k_format, int32_t k_bytes, int64_t v_offset, int32_t v_dim, int32_t v_format, int32_t v_bytes) {
  require(page_size > 0 && num_kv_heads > 0, "page_size and num_kv_heads must be positive");
  const int64_t slots = int64_t(num_kv_heads) * page_size;
  return {pointer<void>(pages), num_pages, page_bytes, row_layout("K", slots, page_bytes, k_offset, k_dim, k_format, k_bytes),
          row_layout("V", slots, page_bytes, v_offset, v_dim, v_format, v_bytes), page_size, num_kv_heads};
}

// Rows x [T, C] behind `before` [S, W - 1, C], which lie as pages would that hold so many tokens.
void convolve(int32_t dtype, Address before, Address x, Address weight, Address bias, Address out, Address query_start, int32_t num_seqs, int32_t num_tokens,
              int32_t channels, int32_t width, int32_t num_threads) {
  require(is_dtype(dtype), "dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  require(num_seqs >= 0 && num_tokens >= 0 && channels > 0 && num_threads > 0, "num_seqs, num_tokens, channels or num_threads is out of range");
  require(width > 0 && width <= kMostTaps, "width is out of range");
  const int32_t size = width > 1 ? width - 1 : 1, bytes = row_bytes(dtype, channels);
  std::vector<int32_t> committed(size_t(num_seqs), width - 1), pages(size_t(num_seqs) + 1);
  for (int32_t s = 0; s <= num_seqs; ++s) pages[size_t(s)] = s;
  std::vector<float> scratch(size_t(convolve_scratch_floats(channels, width)));
  ConvolveArgs args{};
  args.layout = {pointer<void>(before), num_seqs, int64_t(size) * bytes, {0, channels, dtype, bytes}, {}, size, 1};
  args.staged.k = pointer<void>(x);
  args.staged.k_token_stride = bytes;
  args.weight = pointer<void>(weight);
  args.bias = pointer<void>(bias);
  args.out = pointer<void>(out);
  args.scratch = scratch.data();
  args.query_start = pointer<int32_t>(query_start);
  args.num_committed = committed.data();
  args.page_ids = args.page_start = pages.data();
  args.num_seqs = num_seqs;
  args.num_tokens = num_tokens;
  args.width = width;
  args.dtype = dtype;
  args.num_threads = num_threads;
  active_kernels().convolve(&args);
}

void recur(int32_t dtype, Address q, Address k, Address v, Address decay, Address beta, Address out, const std::vector<Address>& before,
           const std::vector<Address>& after, const std::vector<int64_t>& starts, const std::vector<int64_t>& of, int64_t num_k_heads, int64_t num_v_heads,
           int64_t k_dim, int64_t v_dim, float scale, bool normalized, bool corrects, int32_t num_threads) {
  require(is_dtype(dtype), "dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  require(num_k_heads > 0 && num_v_heads > 0 && num_v_heads % num_k_heads == 0, "num_v_heads must be a positive multiple of num_k_heads");
  require(k_dim > 0 && k_dim <= kMostStateRows && v_dim > 0 && num_threads > 0, "k_dim, v_dim or num_threads is out of range");
  require(of.size() == before.size() + 1 && of.front() == 0 && of.back() + 1 == int64_t(starts.size()) && starts.size() == after.size() + 1,
          "segments and sequences do not fit");
  std::vector<const float*> from;
  std::vector<float*> to;
  for (const Address one : before) from.push_back(pointer<float>(one));
  for (const Address one : after) to.push_back(pointer<float>(one));
  static thread_local Kept scratch;
  auto* const floats = reinterpret_cast<float*>(scratch.bytes(num_threads * k_dim * v_dim * int64_t(sizeof(float))));
  const RecurArgs args{pointer<void>(q), pointer<void>(k), pointer<void>(v), pointer<float>(decay), pointer<float>(beta), pointer<void>(out), from.data(),
                       to.data(), floats, starts.data(), of.data(), int64_t(before.size()), num_k_heads, num_v_heads, k_dim, v_dim, dtype, num_threads,
                       scale, normalized, corrects};
  active_kernels().recur(&args);
}

void bind_attention(nb::module_& m) {
  m.def("attend", &attend);
  m.def("commit", &commit);
  m.def("encode", &encode);
  m.def("convolve", &convolve, nb::call_guard<nb::gil_scoped_release>());
  m.def("recur", &recur, nb::call_guard<nb::gil_scoped_release>());
  m.attr("most_state_rows") = kMostStateRows;
  m.def("shared_items", &shared_items);
  nb::class_<Store>(m, "Store").def(nb::init<Address, int64_t, int64_t, const std::vector<PlaceForm>&>());
  nb::class_<Step>(m, "Step")
      .def(nb::init<Store&, Address, Address, int32_t, int32_t, const std::vector<TableForm>&>(), nb::keep_alive<1, 2>())
      .def("commit", &Step::commit, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("staged_layers", &Step::staged_layers)
      .def_prop_ro("staged_bytes", &Step::staged_bytes);
}

}  // namespace quire
