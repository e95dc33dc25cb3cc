// Ragged paged attention: every query attends to its sequence's committed pages and to this step's staged keys up to
// itself, in one online softmax. One path serves decode, prefill chunks and mixtures; only the grouping of rows differs.
//
//   part   512 keys at absolute multiples of 512; each row sums up a part from scratch, then merges parts in order
//   tile   64 keys at absolute multiples of 64; scores, maximum, rescale and sums once per tile
//
// A row therefore does the same arithmetic whatever shares its block, step, thread or page size.
#pragma once
#include <stdio.h>
#include <stdlib.h>

#include "attention_block.h"

namespace quire {
namespace QUIRE_ISA {
namespace {

constexpr int kSplitRows = 16;

// Grows to the largest need of its thread and is kept: allocating per call would fault its pages in every time.
struct ThreadMemory {
  float* floats = nullptr;
  int64_t size = 0;
  ~ThreadMemory() { free(floats); }
  float* get(int64_t wanted) {
    if (wanted > size) {
      free(floats);
      floats = (float*)aligned_alloc(64, size_t(wanted) * 4);
      size = floats ? wanted : 0;
    }
    return floats;
  }
};

QUIRE_INLINE int64_t round_up(int64_t x, int64_t to = 16) { return (x + to - 1) / to * to; }

// False if memory is short. A debug build fills it with NaN, so that reading what was never written shows.
inline bool carve_scratch(const AttendArgs& args, Scratch& s) {
  static thread_local ThreadMemory memory;
  const int64_t k_row = round_up(args.layout.k_dim + 1), v_row = round_up(args.layout.v_dim, 32), rows = kBlockRows;
  float** const parts[] = {&s.q, &s.keys, &s.values, &s.scores, &s.out, &s.total_out, &s.sums, &s.max, &s.total_max, &s.total_sum, &s.alpha, &s.seen, &s.zeros};
  const int64_t sizes[] = {(rows + kMaxRows) * k_row, kTile * k_row, kTile * v_row, rows * kTile, rows * v_row, rows * v_row, rows * 16, rows, rows, rows, rows, rows, k_row};
  int64_t total = 0;
  for (const int64_t size : sizes) total += round_up(size);
  float* at = memory.get(total);
  if (!at) return false;
#ifdef QUIRE_DEBUG
  for (int64_t i = 0; i < total; ++i) at[i] = __builtin_nanf("");
#endif
  for (int i = 0; i < 13; ++i) {
    *parts[i] = at;
    at += round_up(sizes[i]);
  }
  memset(s.zeros, 0, size_t(k_row) * 4);
  return true;
}

// Queries as panels [Dk][kMaxRows] of fp32, or of bf16 pairs for the CPU's own dot product; an odd Dk gets one more zero.
template <class D>
void load_queries(Block<D>& b, int64_t packed_token) {
  constexpr bool kPairs = few_rows_format<D>() == Keys::kDotPairs;
  constexpr int kSpan = kPairs ? 32 : 16;
  const int k_dim = b.args.layout.k_dim;
  for (int r0 = 0; r0 < b.rows(); r0 += kMaxRows) {
    const typename D::Element* from[16] = {};
    for (int r = r0; r < r0 + kMaxRows && r < b.rows(); ++r)
      from[r - r0] = (const typename D::Element*)b.args.q + (packed_token + r / b.heads) * b.args.q_token_stride +
                     (b.first_head + r % b.heads) * b.args.q_head_stride;
    float* to = b.s.q + r0 / kMaxRows * (b.k_rows * kMaxRows);
    for (int d = 0; d <= k_dim; d += kSpan) {
      const int n = k_dim - d < kSpan ? k_dim - d : kSpan;
      F32x16 x[16];
      for (int r = 0; r < 16; ++r) {
        if (!from[r])
          x[r] = zero();
        else if constexpr (kPairs)
          x[r] = floats(load_pairs_n((const uint16_t*)from[r] + d, n));
        else
          x[r] = D::widen_n(from[r] + d, n);
      }
      transpose16(x);
      for (int i = 0; i < 16; ++i, to += kMaxRows) store_n(to, x[i], kMaxRows);
    }
  }
}

template <class D>
void start_totals(Block<D>& b) {
  for (int r = 0; r < b.rows(); ++r) {
    float sink = -__builtin_inff();
    if (b.args.sinks) {
      const int head = b.first_head + r % b.heads;
      float lanes[16];
      if (b.args.sinks_dtype == kF32) store(lanes, Single::widen_n((const float*)b.args.sinks + head, 1));
      if (b.args.sinks_dtype == kBF16) store(lanes, Brain::widen_n((const uint16_t*)b.args.sinks + head, 1));
      if (b.args.sinks_dtype == kF16) store(lanes, Half::widen_n((const uint16_t*)b.args.sinks + head, 1));
      sink = lanes[0] * kLog2E;
    }
    b.s.total_max[r] = sink;
    b.s.total_sum[r] = b.args.sinks ? 1.0f : 0.0f;
  }
  memset(b.s.total_out, 0, size_t(b.rows() * b.v_stride) * 4);
}

template <class D>
void write_out(const Block<D>& b, int64_t packed_token) {
  const int v_dim = b.args.layout.v_dim;
  for (int r = 0; r < b.rows(); ++r) {
    typename D::Element* to = (typename D::Element*)b.args.out + ((packed_token + r / b.heads) * b.args.num_heads + b.first_head + r % b.heads) * v_dim;
    const float* from = b.s.total_out + r * b.v_stride;
    const F32x16 sum = set1(b.s.total_sum[r]);
    constexpr int kUnit = 16 * D::kVecs;
    for (int d = 0; d < v_dim; d += kUnit) {
      F32x16 x[D::kVecs];
      for (int i = 0; i < D::kVecs; ++i) x[i] = add(div(load(from + d + 16 * i), sum), zero());  // -0 to +0, see many_rows
      D::write_n(to + d, x, v_dim - d < kUnit ? v_dim - d : kUnit);
    }
  }
}

// Of the 2 * kTile rows of a tile, what each phase asks for: in proportion to the time it takes with few query rows.
template <class D>
Fetcher fetch_rates(const PageLayout& at) {
  constexpr int kBytes = sizeof(typename D::Element);
  const int patches = kTile / 16 * (at.k_dim / (D::kPairs ? 32 : 16)), steps = (at.k_dim + 15) / 16;
  return {nullptr, 0, 0, at.k_dim * kBytes, at.v_dim * kBytes, 40 * 256 / (patches > 0 ? patches : 1), 36 * 256 / steps, 52 * 256 / kTile + 1};
}

template <class D>
void run_item(const AttendArgs& args, const WorkItem& item, int64_t head_index, int32_t kv_head, int32_t first_head, int32_t heads, Scratch& s) {
  using Element = typename D::Element;
  const PageLayout& at = args.layout;
  const int64_t start = args.query_start[item.seq], packed_token = start + item.first_token;
  const int32_t committed = args.num_committed[item.seq];
  Block<D> b{args,
             s,
             {&at, (const Element*)args.staged.k + start * args.staged.k_token_stride + kv_head * args.staged.k_head_stride,
              (const Element*)args.staged.v + start * args.staged.v_token_stride + kv_head * args.staged.v_head_stride, args.staged.k_token_stride,
              args.staged.v_token_stride, args.page_ids + args.page_start[item.seq], committed, kv_head},
             committed + item.first_token,
             item.num_tokens,
             heads,
             first_head,
             round_up(at.k_dim + 1),
             round_up(at.v_dim, 16 * D::kVecs),
             fetch_rates<D>(at),
             {}};
  load_queries(b, packed_token);
  const int rows = b.rows();
  const int64_t stride = partial_stride(at.v_dim);
  float* const partials = item.num_splits > 1 ? args.partials + item.partials + head_index * item.num_parts * rows * stride : nullptr;
  if (!partials) start_totals(b);
  for (int32_t part = item.first_part; part < item.end_part; ++part) {
    run_part(b, part);
    for (int r = 0; r < rows; ++r) {
      const float sum = sum_lanes(load(s.sums + 16 * r));
      if (partials) {
        float* to = partials + ((part - item.block_first_part) * rows + r) * stride;
        memcpy(to, s.out + r * b.v_stride, size_t(b.v_stride) * 4);
        to[b.v_stride] = s.max[r];
        to[b.v_stride + 1] = s.seen[r] != 0.0f ? sum : -1.0f;
      } else if (s.seen[r] != 0.0f) {
        merge_row(s.out + r * b.v_stride, s.max[r], sum, s.total_out + r * b.v_stride, s.total_max + r, s.total_sum + r, b.v_stride);
      }
    }
  }
  if (partials) {
    if (__atomic_add_fetch(args.counters + item.counter + head_index, 1, __ATOMIC_ACQ_REL) < item.num_splits) return;
    start_totals(b);
    for (int32_t i = 0; i < item.num_parts * rows; ++i) {
      const float* from = partials + i * stride;
      const int r = i % rows;
      if (from[b.v_stride + 1] == -1.0f) continue;
      merge_row(from, from[b.v_stride], from[b.v_stride + 1], s.total_out + r * b.v_stride, s.total_max + r, s.total_sum + r, b.v_stride);
    }
  }
  write_out(b, packed_token);
}

template <class D>
int attend_typed(const AttendArgs& args, Error* error) {
  const int32_t kv_heads = args.layout.num_kv_heads, group = args.num_heads / kv_heads;
  const int32_t heads = group < kBlockRows ? group : kBlockRows, head_parts = (group + heads - 1) / heads;
  const int64_t per_item = int64_t(kv_heads) * head_parts;
  int failed = 0;
#pragma omp parallel num_threads(args.num_threads)
  {
    Scratch s;
    const bool ready = carve_scratch(args, s);
    if (!ready) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < args.num_items * per_item; ++i) {
      if (!ready) continue;
      const int32_t h = int32_t(i % per_item), kv_head = h / head_parts, first = h % head_parts * heads;
      run_item<D>(args, args.items[i / per_item], h, kv_head, kv_head * group + first, group - first < heads ? group - first : heads, s);
    }
  }
  if (failed) snprintf(error->text, sizeof error->text, "attend: out of memory for a thread's scratch");
  return failed;
}

int attend(const AttendArgs* args, Error* error) {
  const PageLayout& at = args->layout;
  const int64_t used = args->num_seqs > 0 ? args->query_start[args->num_seqs] : 0;
  const int64_t row = int64_t(args->num_heads) * at.v_dim * (at.dtype == kF32 ? 4 : 2);
  memset((char*)args->out + used * row, 0, size_t((args->num_tokens - used) * row));
  if (at.dtype == kBF16) return attend_typed<Brain>(*args, error);
  if (at.dtype == kF16) return attend_typed<Half>(*args, error);
  return attend_typed<Single>(*args, error);
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
