// Python bindings of the sampling kernels. The rows come as the bytes of SampleRow structs, which sampler_native.py packs.
#include <nanobind/nanobind.h>
#include <string.h>

#include <vector>

#include "bind.h"

namespace nb = nanobind;

namespace quire {
namespace {

// (token, status, logprob, [(id, logprob), ...]) for each row.
nb::list sample(int32_t dtype, uintptr_t logits, int64_t row_stride, int32_t vocab_size, nb::bytes packed, int32_t max_top, uintptr_t scratch,
                int64_t num_scratch_floats, int32_t num_threads) {
  require(is_dtype(dtype), "dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  require(vocab_size > 0 && row_stride >= vocab_size, "vocab_size must be positive and row_stride no less");
  require(num_threads > 0, "num_threads must be positive");
  require(packed.size() % sizeof(SampleRow) == 0, "rows must be whole SampleRow structs");
  require(max_top >= 0 && max_top <= vocab_size, "max_top must be from 0 to vocab_size");
  const Kernels& kernels = active_kernels();
  require(num_scratch_floats >= num_threads * kernels.sampling.scratch_floats(vocab_size), "scratch is too small");
  const size_t num_rows = packed.size() / sizeof(SampleRow);
  std::vector<SampleRow> rows(num_rows);
  if (num_rows) memcpy(rows.data(), packed.c_str(), packed.size());
  for (const SampleRow& row : rows) {
    require(row.num_top <= max_top && row.forced < vocab_size, "num_top exceeds max_top, or a token to score the vocabulary");
  }
  std::vector<SampleResult> results(num_rows);
  std::vector<int32_t> top_ids(num_rows * size_t(max_top));
  std::vector<float> top_logprobs(num_rows * size_t(max_top));
  const SampleArgs args{pointer<void>(logits), row_stride,     dtype,          int32_t(num_rows), vocab_size,          num_threads,
                        max_top,               rows.data(),    results.data(), top_ids.data(),    top_logprobs.data(), pointer<float>(scratch)};
  {
    nb::gil_scoped_release release;
    kernels.sampling.sample(&args);
  }
  nb::list out;
  for (size_t i = 0; i < num_rows; ++i) {
    nb::list top;
    for (int32_t j = 0; j < results[i].num_top; ++j) {
      const size_t at = i * size_t(max_top) + size_t(j);
      top.append(nb::make_tuple(top_ids[at], top_logprobs[at]));
    }
    out.append(nb::make_tuple(results[i].token, int32_t(results[i].status), results[i].logprob, top));
  }
  return out;
}

void noise(uint64_t seed, int32_t position, int64_t count, uintptr_t out) {
  require(count >= 0 && count % 32 == 0, "count must be a multiple of 32");
  active_kernels().sampling.noise(seed, position, count, pointer<uint32_t>(out));
}

}  // namespace

void bind_sampling(nb::module_& m) {
  m.attr("sample_row_bytes") = sizeof(SampleRow);
  m.def("sample", &sample);
  m.def("sample_scratch_floats", [](int32_t vocab_size) { return active_kernels().sampling.scratch_floats(vocab_size); });
  m.def("sample_noise", &noise);
}

}  // namespace quire
