// Python bindings of attend and commit.
#include <nanobind/nanobind.h>

#include <stdexcept>

#include "bind.h"
#include "check.h"
#include "schedule.h"

namespace nb = nanobind;

namespace quire {
namespace {

using Address = uintptr_t;

void require(bool fine, const char* what) {
  if (!fine) throw std::invalid_argument(what);
}

PageLayout layout_of(int32_t dtype, Address pages, int64_t num_pages, int64_t page_elems, int64_t k_offset, int64_t v_offset, int32_t page_size,
                     int32_t num_kv_heads, int32_t k_dim, int32_t v_dim) {
  require(dtype >= kF32 && dtype <= kF16, "dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  require(page_size > 0 && num_kv_heads > 0 && k_dim > 0 && v_dim > 0, "page_size, num_kv_heads, k_dim and v_dim must be positive");
  const int64_t slots = int64_t(num_kv_heads) * page_size;
  require(k_offset >= 0 && k_offset + slots * k_dim <= page_elems, "k_offset + Hkv * B * Dk does not fit in a page");
  require(v_offset >= 0 && v_offset + slots * v_dim <= page_elems, "v_offset + Hkv * B * Dv does not fit in a page");
  return {pointer<void>(pages), num_pages, page_elems, k_offset, v_offset, page_size, num_kv_heads, k_dim, v_dim, dtype};
}

void attend(int32_t dtype, Address q, int64_t q_token_stride, int64_t q_head_stride, Address k, int64_t k_token_stride, int64_t k_head_stride,
            Address v, int64_t v_token_stride, int64_t v_head_stride, Address out, Address pages, int64_t num_pages, int64_t page_elems,
            int64_t k_offset, int64_t v_offset, int32_t page_size, int32_t num_heads, int32_t num_kv_heads, int32_t k_dim, int32_t v_dim,
            Address query_start, Address num_committed, Address page_ids, Address page_start, int32_t num_page_ids, int32_t num_seqs, int32_t num_tokens, float scale,
            float softcap, int32_t window, int32_t chunk, Address sinks, int32_t sinks_dtype, int32_t num_threads) {
  AttendArgs args{};
  args.layout = layout_of(dtype, pages, num_pages, page_elems, k_offset, v_offset, page_size, num_kv_heads, k_dim, v_dim);
  args.staged = {pointer<void>(k), pointer<void>(v), k_token_stride, k_head_stride, v_token_stride, v_head_stride};
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

void commit(int32_t dtype, Address k, int64_t k_token_stride, int64_t k_head_stride, Address v, int64_t v_token_stride, int64_t v_head_stride,
            Address pages, int64_t num_pages, int64_t page_elems, int64_t k_offset, int64_t v_offset, int32_t page_size, int32_t num_kv_heads,
            int32_t k_dim, int32_t v_dim, Address slots, int32_t num_tokens, int32_t num_threads) {
  require(num_tokens >= 0, "num_tokens must not be negative");
  require(num_threads > 0, "num_threads must be positive");
  const CommitArgs args{layout_of(dtype, pages, num_pages, page_elems, k_offset, v_offset, page_size, num_kv_heads, k_dim, v_dim),
                        {pointer<void>(k), pointer<void>(v), k_token_stride, k_head_stride, v_token_stride, v_head_stride},
                        pointer<int64_t>(slots), num_tokens, num_threads};
  nb::gil_scoped_release release;
  check_commit(args);
  active_kernels().commit(&args);
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.def("attend", &attend);
  m.def("commit", &commit);
}

}  // namespace quire
