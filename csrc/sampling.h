// Sampling kernels: one call draws a token from each row of logits. Included by kernels.cpp once per instruction set.
//
// A row is widened to fp32 in its thread's scratch and changed there, unless only its highest logit is asked for; no other row is ever read, and
// every sum over a row is taken in one order, so its result depends on nothing but itself. Meanings and order of operations: quire/params.py;
// sampler_reference.py says the same in torch.
#pragma once
#include "kernels.h"
#include "parallel.h"
#include "sampling_noise.h"
#include "sampling_select.h"
#include "simd_math.h"

namespace quire {
namespace QUIRE_ISA {
namespace {

// Rows are padded with kNone to whole blocks of noise.
int64_t padded_size(int64_t vocab_size) { return (vocab_size + kNoiseBlock - 1) / kNoiseBlock * kNoiseBlock; }

struct Row {
  float *logits, *work;  // padded and padded + 16 floats
  int64_t vocab_size, padded;
  float max_logit;
  bool finite;  // no NaN and no +inf
};

int64_t scratch_floats(int32_t vocab_size) { return 2 * padded_size(vocab_size) + 16; }

struct FromF32 {
  static F32x16 load16(const void* p, int64_t i) { return load((const float*)p + i); }
  static F32x16 load_some(const void* p, int64_t i, int n) { return load_n((const float*)p + i, n); }
};
struct FromBF16 {
  static F32x16 load16(const void* p, int64_t i) { return load_bf16((const uint16_t*)p + i); }
  static F32x16 load_some(const void* p, int64_t i, int n) { return load_bf16_n((const uint16_t*)p + i, n); }
};
struct FromF16 {
  static F32x16 load16(const void* p, int64_t i) { return load_f16((const uint16_t*)p + i); }
  static F32x16 load_some(const void* p, int64_t i, int n) { return load_f16_n((const uint16_t*)p + i, n); }
};

// Elements i to i + 15 of n, from `start` on; kNone past the end.
template <class From>
F32x16 widened(const void* source, int64_t start, int64_t n, int64_t i) {
  if (i + 16 <= n) return From::load16(source, start + i);
  return i < n ? select(lanes_between(0, int(n - i)), From::load_some(source, start + i, int(n - i)), set1(kNone)) : set1(kNone);
}

// The largest of n logits, starting with element `start` of the source, and whether none is NaN or +inf. Calls each(i, x) with 16 of them, up to `end`.
struct Highest {
  float logit;
  bool finite;
};
template <class From, class Each>
Highest find_highest(const void* source, int64_t start, int64_t n, int64_t end, const Each& each) {
  const F32x16 inf = set1(__builtin_inff());
  F32x16 highest = set1(kNone);
  uint32_t below_inf = 0xffff;
  for (int64_t i = 0; i < end; i += 16) {
    const F32x16 x = widened<From>(source, start, n, i);
    below_inf &= mask_bits(lt(x, inf));  // false for NaN
    highest = max(highest, x);
    each(i, x);
  }
  return {max_lanes(highest), below_inf == 0xffff};
}

// Widens logits into the row, which may be the source, and finds the largest.
template <class From>
void read_row(const void* source, int64_t start, int64_t n, Row& row) {
  const Highest found = find_highest<From>(source, start, n, row.padded, [&](int64_t i, F32x16 x) { store(row.logits + i, x); });
  row.max_logit = found.logit;
  row.finite = found.finite;
}

// Calls f with the way to read the logits.
template <class F>
void with_source(int32_t dtype, F f) {
  if (dtype == kF32) {
    f(FromF32());
  } else if (dtype == kBF16) {
    f(FromBF16());
  } else {
    f(FromF16());
  }
}

// The first token whose logit is `value`, passing over the first `skipped` of those.
int64_t find_equal(const Row& row, float value, int64_t skipped) {
  const F32x16 v = set1(value);
  for (int64_t i = 0; i < row.padded; i += 16) {
    uint32_t lanes = mask_bits(eq(load(row.logits + i), v));
    for (; lanes; lanes &= lanes - 1) {
      if (skipped-- == 0) return i + __builtin_ctz(lanes);
    }
  }
  return row.vocab_size - 1;
}

// log(sum(e^logit)).
double log_sum(const Row& row) {
  const F32x16 highest = set1(row.max_logit);
  Sum16 sum = {};
  for (int64_t i = 0; i < row.padded; i += 16) accumulate(sum, exp(sub(load(row.logits + i), highest)));
  return double(row.max_logit) + __builtin_log(total(sum));
}

// The num most likely tokens in order; returns how many there are.
int32_t top_tokens(const Row& row, int64_t num, double log_z, int32_t* ids, float* logprobs) {
  const Cut cut = select_first(row.logits, row.padded, row.work, double(row.padded), double(num), Counts());
  const F32x16 value = set1(cut.value);
  int64_t equals = cut.value > kNone ? cut.equals : 0;
  int32_t found = 0;
  for (int64_t i = 0; i < row.padded; i += 16) {
    const F32x16 x = load(row.logits + i);
    const uint32_t above = mask_bits(gt(x, value)), level = equals > 0 ? mask_bits(eq(x, value)) : 0;
    for (uint32_t lanes = above | level; lanes; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      if (!(above >> lane & 1) && equals-- <= 0) continue;
      const float logit = row.logits[i + lane];
      int32_t at = found++;  // tokens come in the order of ids: equal ones stay in it
      for (; at > 0 && logprobs[at - 1] < logit; --at) {
        logprobs[at] = logprobs[at - 1];
        ids[at] = ids[at - 1];
      }
      logprobs[at] = logit;
      ids[at] = int32_t(i + lane);
    }
  }
  for (int32_t i = 0; i < found; ++i) logprobs[i] = float(double(logprobs[i]) - log_z);
  return found;
}

// A logit that was finite stays finite: only masks make -inf.
float clamped(double logit, float before) {
  constexpr double kMost = 3.4028234663852886e38;
  if (before == kNone) return kNone;
  return float(logit > kMost ? kMost : logit < -kMost ? -kMost : logit);
}

bool has_edits(const SampleRow& s) { return s.num_penalised > 0 || s.num_biases > 0 || s.num_allowed >= 0 || s.num_banned > 0 || s.mask; }

// Penalties, bias and masks, in the order SamplingParams documents.
void edit_logits(const SampleRow& s, Row& row) {
  const uint32_t vocab_size = uint32_t(row.vocab_size);
  for (int32_t i = 0; i < s.num_penalised; ++i) {
    const uint32_t id = uint32_t(s.penalised_ids[i]);
    if (id >= vocab_size) continue;
    const float before = row.logits[id];
    double x = before < 0 ? double(before) * s.repetition_penalty : double(before) / s.repetition_penalty;
    if (s.output_counts[i] > 0) x = x - s.presence_penalty - s.frequency_penalty * double(s.output_counts[i]);
    row.logits[id] = clamped(x, before);
  }
  for (int32_t i = 0; i < s.num_biases; ++i) {
    const uint32_t id = uint32_t(s.bias_ids[i]);
    if (id < vocab_size) row.logits[id] = clamped(double(row.logits[id]) + s.biases[i], row.logits[id]);
  }
  if (s.num_allowed >= 0) {
    int64_t kept = 0;
    for (int32_t i = 0; i < s.num_allowed; ++i) {
      if (uint32_t(s.allowed_ids[i]) < vocab_size) row.work[kept++] = row.logits[s.allowed_ids[i]];
    }
    for (int64_t i = 0; i < row.padded; i += 16) store(row.logits + i, set1(kNone));
    kept = 0;
    for (int32_t i = 0; i < s.num_allowed; ++i) {
      if (uint32_t(s.allowed_ids[i]) < vocab_size) row.logits[s.allowed_ids[i]] = row.work[kept++];
    }
  }
  for (int32_t i = 0; i < s.num_banned; ++i) {
    if (uint32_t(s.banned_ids[i]) < vocab_size) row.logits[s.banned_ids[i]] = kNone;
  }
  if (s.mask) {
    const F32x16 none = set1(kNone);
    for (int64_t i = 0; i < row.padded; i += 16) {
      const uint32_t lanes = s.mask[i / 32] >> (i % 32) & 0xffffu;
      store(row.logits + i, lanes ? select(lanes_of(lanes), load(row.logits + i), none) : none);
    }
  }
}

Cut top_k_top_p(const SampleRow& s, const Row& row) {
  Cut cut = kNoCut;
  const bool top_k = s.top_k > 0 && s.top_k < row.vocab_size;
  if (top_k) cut = select_first(row.logits, row.padded, row.work, double(row.padded), double(s.top_k), Counts());
  if (s.top_p >= 1.0) return cut;
  const float* values = row.logits;
  int64_t num = row.padded;
  if (top_k && cut.value > kNone) {
    num = keep_between(values, num, cut.value, __builtin_inff(), row.work);
    for (int64_t i = 0; i < cut.equals; ++i) row.work[num++] = cut.value;
    pad(row.work, num);
    values = row.work;
  }
  const Masses masses = {row.max_logit, s.inv_temperature};
  const double whole = tally(values, num, kNone, masses).above;
  const Cut within = select_first(values, num, row.work, whole, s.top_p * whole, masses);
  return within.value > kNone ? within : cut;
}

// Gumbel-max: the token of the highest logit / temperature + noise, drawn in proportion to e^(logit / temperature) among the
// survivors (E. Gumbel, "Statistical theory of extreme values", 1954).
int64_t draw(const SampleRow& s, const Row& row, Cut cut) {
  const int64_t last_equal = cut.equals > 0 && cut.value > kNone ? find_equal(row, cut.value, cut.equals - 1) : -1;
  const NoiseKey key = noise_key(s.seed, s.position);
  const F32x16 highest = set1(row.max_logit), inverse = set1(s.inv_temperature), least = set1(s.min_relative), value = set1(cut.value);
  double best = -__builtin_inf();
  float bar = kLeastGumbel;  // the most likely token alone reaches this
  int64_t winner = -1;
  for (int64_t block = 0; block < row.padded; block += kNoiseBlock) {
    F32x16 relative[2];
    uint32_t lanes[2];
    for (int half = 0; half < 2; ++half) {
      const int64_t first = block + 16 * half;
      const F32x16 x = load(row.logits + first);
      relative[half] = mul(sub(x, highest), inverse);
      lanes[half] = mask_bits(gt(x, value));
      if (first <= last_equal) {
        const int64_t num = last_equal + 1 - first;
        lanes[half] |= mask_bits(eq(x, value)) & (num >= 16 ? 0xffffu : (1u << num) - 1u);
      }
      lanes[half] &= mask_bits(gt(relative[half], set1(bar - kMostGumbel))) & ~mask_bits(lt(relative[half], least));
    }
    if (!(lanes[0] | lanes[1])) continue;
    const NoiseWords words = noise_words(key, block / kNoiseBlock);
    for (int half = 0; half < 2; ++half) {
      const U32x16 word = half ? words.second : words.first;
      lanes[half] &= mask_bits(gt(add(relative[half], gumbel_bound(word)), set1(bar)));
      if (!lanes[half]) continue;
      float relatives[16];
      uint32_t each[16];
      store(relatives, relative[half]);
      store_u32(each, word);
      for (uint32_t rest = lanes[half]; rest; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        const double score = double(relatives[lane]) + gumbel(each[lane]);
        if (score > best) {
          best = score;
          winner = block + 16 * half + lane;
          if (float(best) > bar) bar = float(best);
        }
      }
    }
  }
  return winner;
}

// The first of the most likely tokens of a row as it is: its lines are read, and none are written.
template <class From>
void take_first(const void* source, int64_t start, int64_t n, SampleResult& result) {
  const auto [value, finite] = find_highest<From>(source, start, n, n, [](int64_t, F32x16) {});
  result = {-1, !finite ? kNotFinite : value == kNone ? kNothingLeft : kSampled, 0, 0.0f};
  uint32_t lanes = 0;
  for (int64_t i = 0; result.status == kSampled && !lanes; i += 16) {
    lanes = mask_bits(eq(widened<From>(source, start, n, i), set1(value)));
    if (lanes) result.token = int32_t(i + __builtin_ctz(lanes));
  }
}

void sample_row(const SampleArgs& a, int64_t index, float* scratch) {
  const SampleRow& s = a.rows[index];
  SampleResult& result = a.results[index];
  if (s.num_top < 0 && s.forced < 0 && !(s.inv_temperature > 0) && !has_edits(s))
    return with_source(a.dtype, [&](auto source) { take_first<decltype(source)>(a.logits, index * a.row_stride, a.vocab_size, result); });
  const int64_t padded = padded_size(a.vocab_size);
  Row row = {scratch, scratch + padded, a.vocab_size, padded, kNone, false};
  const int64_t start = index * a.row_stride;
  with_source(a.dtype, [&](auto source) { read_row<decltype(source)>(a.logits, start, a.vocab_size, row); });
  result = {-1, kNotFinite, 0, 0.0f};
  if (!row.finite) return;
  result.status = kNothingLeft;
  if (row.max_logit == kNone) return;
  double log_z = 0;
  if (s.num_top >= 0) log_z = log_sum(row);
  if (s.num_top > 0) result.num_top = top_tokens(row, s.num_top, log_z, a.top_ids + index * a.max_top, a.top_logprobs + index * a.max_top);
  int64_t token = s.forced;
  if (token < 0) {
    if (has_edits(s)) {
      edit_logits(s, row);
      read_row<FromF32>(row.logits, 0, row.padded, row);
    }
    if (row.max_logit == kNone) return;
    token = s.inv_temperature > 0 ? draw(s, row, top_k_top_p(s, row)) : find_equal(row, row.max_logit, 0);
  }
  if (s.num_top >= 0) {
    float raw[16];
    with_source(a.dtype, [&](auto source) { store(raw, source.load_some(a.logits, start + token, 1)); });
    result.logprob = float(double(raw[0]) - log_z);
  }
  result.token = int32_t(token);
  result.status = kSampled;
}

void sample(const SampleArgs* args) {
  const int64_t per_thread = scratch_floats(args->vocab_size);
  if (args->num_rows < 1) return;
  const int num_threads = args->num_threads < args->num_rows ? args->num_threads : args->num_rows;
  Next next{args->num_rows};
  parallel(num_threads, [&](const Member& me) {
    for (int64_t i; next.take(i);) sample_row(*args, i, args->scratch + me.id * per_thread);
  });
}

constexpr SamplingKernels sampling_kernels = {&sample, &scratch_floats, &noise};

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
