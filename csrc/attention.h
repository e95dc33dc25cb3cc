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
#include "parallel.h"

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
  const int64_t k_row = round_up(args.layout.k.dim + 1), v_row = round_up(args.layout.v.dim, 32), rows = kBlockRows;
  float** const parts[] = {&s.q,    &s.columns, &s.keys,      &s.values,    &s.scores, &s.out,  &s.total_out,
                           &s.sums, &s.max,     &s.total_max, &s.total_sum, &s.alpha,  &s.seen, &s.zeros};
  const int64_t sizes[] = {(rows + kMaxRows) * k_row, kColumnFloats + kScaleFloats, kTile * k_row, kTile * v_row, rows * kTile, rows * v_row,
                           rows * v_row, rows * 16, rows, rows, rows, rows, rows, k_row};
  int64_t total = 0;
  for (const int64_t size : sizes) total += round_up(size);
  float* at = memory.get(total);
  if (!at) return false;
#ifdef QUIRE_DEBUG
  for (int64_t i = 0; i < total; ++i) at[i] = __builtin_nanf("");
#endif
  for (int i = 0; i < 14; ++i) {
    *parts[i] = at;
    at += round_up(sizes[i]);
  }
  memset(s.zeros, 0, size_t(k_row) * 4);
  return true;
}

// Queries as panels [Dk][kMaxRows] of fp32, or of bf16 pairs for the CPU's own dot product; an odd Dk gets one more zero.
inline void load_queries(Block& b, int64_t packed_token) {
  const int k_dim = b.args.layout.k.dim, span = b.key.query_pairs ? 32 : 16;
  const int64_t bytes = element_bytes(b.args.dtype);
  for (int r0 = 0; r0 < b.rows(); r0 += kMaxRows) {
    const char* from[16] = {};
    for (int r = r0; r < r0 + kMaxRows && r < b.rows(); ++r)
      from[r - r0] = (const char*)b.args.q + (packed_token + r / b.heads) * b.args.q_token_stride +
                     (b.first_head + r % b.heads) * b.args.q_head_stride;
    float* to = b.s.q + r0 / kMaxRows * (b.k_rows * kMaxRows);
    for (int d = 0; d <= k_dim; d += span) {
      const int n = k_dim - d < span ? k_dim - d : span;
      F32x16 x[16];
      for (int r = 0; r < 16; ++r) {
        if (!from[r])
          x[r] = zero();
        else if (b.key.query_pairs)
          x[r] = floats(load_pairs_n((const uint16_t*)from[r] + d, n));
        else
          x[r] = load_elements_n(b.args.dtype, from[r] + d * bytes, n);
      }
      transpose16(x);
      for (int i = 0; i < 16; ++i, to += kMaxRows) store_n(to, x[i], kMaxRows);
    }
  }
}

inline void start_totals(Block& b) {
  const AttendArgs& args = b.args;
  for (int r = 0; r < b.rows(); ++r) {
    float sink = -__builtin_inff();
    if (args.sinks) {
      float lanes[16];
      store(lanes, load_elements_n(args.sinks_dtype, (const char*)args.sinks + (b.first_head + r % b.heads) * element_bytes(args.sinks_dtype), 1));
      sink = lanes[0] * kLog2E;
    }
    b.s.total_max[r] = sink;
    b.s.total_sum[r] = args.sinks ? 1.0f : 0.0f;
  }
  memset(b.s.total_out, 0, size_t(b.rows() * b.v_stride) * 4);
}

// Totals divided by their sums, from the order of units back to that of elements.
inline void write_out(const Block& b, int64_t packed_token) {
  const int v_dim = b.args.layout.v.dim, unit = 16 * b.value.vecs;
  const int64_t bytes = element_bytes(b.args.dtype);
  for (int r = 0; r < b.rows(); ++r) {
    char* to = (char*)b.args.out + ((packed_token + r / b.heads) * b.args.num_heads + b.first_head + r % b.heads) * v_dim * bytes;
    const float* from = b.s.total_out + r * b.v_stride;
    const F32x16 sum = set1(b.s.total_sum[r]);
    for (int d = 0; d < v_dim; d += unit) {
      const int n = v_dim - d < unit ? v_dim - d : unit;
      F32x16 x[2] = {add(div(load(from + d), sum), zero()), zero()};  // -0 to +0, see many_rows
      if (b.value.vecs == 1) {
        store_elements_n(b.args.dtype, to + d * bytes, x[0], n);
        continue;
      }
      x[1] = add(div(load(from + d + 16), sum), zero());
      if (b.args.dtype == kBF16) {
        store_pairs_n((uint16_t*)to + d, make_pairs(x[0], x[1]), n);
        continue;
      }
      float lanes[2][16], ordered[32];
      for (int i = 0; i < 2; ++i) store(lanes[i], x[i]);
      for (int i = 0; i < 32; ++i) ordered[i] = lanes[i % 2][i / 2];
      for (int i = 0; i < n; i += 16) store_elements_n(b.args.dtype, to + (d + i) * bytes, load(ordered + i), n - i < 16 ? n - i : 16);
    }
  }
}

// Of the lines of a tile, what each phase asks for: in proportion to the time it takes with few query rows.
inline Fetcher fetch_rates(const PageLayout& at, const KeyFormat& key) {
  const int patches = kTile / 16 * ((at.k.dim + key.span - 1) / key.span), steps = (at.k.dim + 2 * key.per - 1) / (2 * key.per);
  const int lines = tile_lines(at) * 2;
  return {nullptr, nullptr, 40 * lines / patches, 36 * lines / steps, 52 * lines / kTile + 1};
}

inline void run_item(const AttendArgs& args, const WorkItem& item, int64_t head_index, int32_t kv_head, int32_t first_head, int32_t heads,
                     Scratch& s) {
  const PageLayout& at = args.layout;
  const Staged& staged = args.staged;
  const int64_t start = args.query_start[item.seq], packed_token = start + item.first_token;
  const int32_t committed = args.num_committed[item.seq];
  const KeyFormat& key = kKeyFormats[at.k.format];
  const ValueFormat& value = kValueFormats[at.v.format];
  Block b{args,
          s,
          key,
          value,
          {&at, (const char*)staged.k + start * staged.k_token_stride + kv_head * staged.k_head_stride,
           (const char*)staged.v + start * staged.v_token_stride + kv_head * staged.v_head_stride, staged.k_token_stride, staged.v_token_stride,
           args.page_ids + args.page_start[item.seq], committed, kv_head},
          committed + item.first_token,
          item.num_tokens,
          heads,
          first_head,
          round_up(at.k.dim + 1),
          round_up(at.v.dim, 16 * value.vecs),
          fetch_rates(at, key),
          {}};
  load_queries(b, packed_token);
  const int rows = b.rows();
  const int64_t stride = partial_stride(at.v.dim);
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

int attend(const AttendArgs* const all, Error* error) {
  const AttendArgs& args = *all;
  const int64_t used = args.num_seqs > 0 ? args.query_start[args.num_seqs] : 0;
  const int64_t row = int64_t(args.num_heads) * args.layout.v.dim * element_bytes(args.dtype);
  memset((char*)args.out + used * row, 0, size_t((args.num_tokens - used) * row));
  const int32_t kv_heads = args.layout.num_kv_heads, group = args.num_heads / kv_heads;
  const int32_t heads = group < kBlockRows ? group : kBlockRows, head_parts = (group + heads - 1) / heads;
  const int64_t per_item = int64_t(kv_heads) * head_parts;
  int failed = 0;
  Next next{args.num_items * per_item};
  parallel(args.num_threads, [&](const Member&) {
    Scratch s;
    if (!carve_scratch(args, s)) return __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    for (int64_t i; next.take(i);) {
      const int32_t h = int32_t(i % per_item), kv_head = h / head_parts, first = h % head_parts * heads;
      run_item(args, args.items[i / per_item], h, kv_head, kv_head * group + first, group - first < heads ? group - first : heads, s);
    }
  });
  if (failed) snprintf(error->text, sizeof error->text, "attend: out of memory for a thread's scratch");
  return failed;
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
