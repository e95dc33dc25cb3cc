// What the bindings and the kernels agree on: plain C structs and one table of functions per instruction set.
// This header is compiled with different flags in different objects, so it holds declarations and PODs only: an inline
// function here could be emitted with AVX-512 instructions, merged by the linker, and crash on a CPU without them.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "linear_args.h"
#include "sampling_args.h"

namespace quire {

enum DType : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2 };

// A kernel that finds its arguments wrong writes why and returns non-zero; the binding turns it into an exception.
struct Error {
  char text[192];
};

// One layer's share of a page: K as [Hkv, B, Dk] at k_offset, V as [Hkv, B, Dv] at v_offset, in elements.
struct PageLayout {
  void* pages;
  int64_t num_pages, page_elems, k_offset, v_offset;
  int32_t page_size, num_kv_heads, k_dim, v_dim, dtype;
};

// Staged keys and values: [T, Hkv, D] seen through strides in elements, the last dimension contiguous.
struct Staged {
  const void *k, *v;
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
};

// Keys are summed up in parts of this many, which start at absolute multiples of it, and the parts are then merged in
// order: always, so that the parts of a long sequence may be given to several threads without changing a bit.
constexpr int32_t kPartKeys = 512;

// A block of one sequence's query tokens; the scheduler orders these, largest first. A block with few rows and many keys
// may be cut into `num_splits` items, each with some of the parts; the last one to finish merges them.
struct WorkItem {
  int32_t seq, first_token, num_tokens;
  int32_t first_part, end_part;            // parts of kPartKeys keys that this item sums up
  int32_t num_splits;                      // 1: the item does the whole block and merges as it goes
  int32_t block_first_part, num_parts;     // of the whole block
  int64_t partials, counter;               // of head 0 of this block, where num_splits > 1
};

struct AttendArgs {
  PageLayout layout;
  Staged staged;
  const void* q;
  void* out;  // [T, Hq, Dv] contiguous
  int64_t q_token_stride, q_head_stride;
  const int32_t *query_start, *num_committed, *page_ids, *page_start;
  const void* sinks;  // [Hq] or null
  int32_t num_page_ids, num_seqs, num_tokens, num_heads, sinks_dtype;
  float scale, softcap;
  int32_t window, chunk, num_threads;
  const WorkItem* items;
  int64_t num_items;
  float* partials;    // per split block and KV head: [num_parts][rows][partial_stride]
  int32_t* counters;  // per split block and KV head: how many of its items are done
};

struct CommitArgs {
  PageLayout layout;
  Staged staged;
  const int64_t* slots;  // [T], page * B + offset, or -1 to store nothing
  int32_t num_tokens, num_threads;
};

struct Kernels {
  const char* isa;
  int32_t block_rows;  // query rows (tokens x heads of a group) that one work item may hold
  int32_t split_rows;  // blocks of at most this many rows may be split over their keys
  int (*attend)(const AttendArgs*, Error*);
  int (*commit)(const CommitArgs*);
  LinearKernels linear;
  SamplingKernels sampling;
};

// Floats of one row's partial result: its output, its largest score, its sum.
constexpr int64_t partial_stride(int64_t v_dim) { return (v_dim + 31) / 32 * 32 + 2; }

// The instruction set in use; chosen when the module is imported, changed by tests.
const Kernels& active_kernels();

}  // namespace quire
