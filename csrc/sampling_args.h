// Arguments and function table of the sampling kernels (see kernels.h: declarations and PODs only).
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace quire {

// How one row is sampled. sampler_native.py packs these 136 bytes field by field, in this order, without padding.
// Ids outside the vocabulary are skipped.
struct SampleRow {
  // Fixed for a sequence.
  uint64_t seed;
  const int32_t* bias_ids;
  const double* biases;
  const int32_t* allowed_ids;
  double top_p, repetition_penalty, presence_penalty, frequency_penalty;
  int32_t num_biases, num_allowed;  // num_allowed = -1: every token is allowed
  int32_t top_k, num_top;           // top_k = 0: no cut; num_top = -1: no logprobs, 0: the drawn token's alone
  float inv_temperature;            // 1 / temperature; 0: take the most likely token
  float min_relative;               // log(min_p): the lowest (logit - max logit) / temperature that survives
  // New in every step.
  const int32_t *penalised_ids, *output_counts, *banned_ids;
  const uint32_t* mask;  // nullptr, or ceil(vocab_size / 32) words: bit i % 32 of word i / 32 set where token i may be drawn
  int32_t num_penalised, num_banned, position, forced;  // forced >= 0: score this token, draw nothing
};

enum SampleStatus : int32_t { kSampled = 0, kNotFinite = 1, kNothingLeft = 2 };

struct SampleResult {
  int32_t token, status, num_top;
  float logprob;
};

struct SampleArgs {
  const void* logits;  // [num_rows, vocab_size], the last dimension contiguous
  int64_t row_stride;  // in elements
  int32_t dtype, num_rows, vocab_size, num_threads, max_top;
  const SampleRow* rows;
  SampleResult* results;
  int32_t* top_ids;     // [num_rows, max_top], most likely first
  float* top_logprobs;  // [num_rows, max_top]
  float* scratch;       // [num_threads, scratch_floats(vocab_size)]
};

struct SamplingKernels {
  void (*sample)(const SampleArgs*);
  int64_t (*scratch_floats)(int32_t vocab_size);
  // The noise words of tokens 0 .. count - 1; count is a multiple of 32.
  void (*noise)(uint64_t seed, int32_t position, int64_t count, uint32_t* out);
};

}  // namespace quire
