// What the bindings and the kernels agree on: plain C structs and one table of functions per instruction set.
// This header is compiled with different flags in different objects, so it holds declarations, PODs and static functions only: an
// inline function here could be emitted with AVX-512 instructions, merged by the linker, and crash on a CPU without them.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "linear_args.h"
#include "rows_args.h"
#include "sampling_args.h"

namespace quire {

enum DType : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2 };
static constexpr int64_t element_bytes(int32_t dtype) { return dtype == kF32 ? 4 : 2; }

// How a row, one token-and-head's keys or values, lies in pages and staged tensors: plain elements of a dtype, or codes
// followed by their scales (encode.h says how they come about).
//
//   kInt8   [dim] int8            [1] scale                 element = code * scale
//   kInt4   [ceil(dim / 2)] bytes [ceil(dim / 32)] scales   element = (nibble - 8) * 16 * scale, the even element in the low nibble
//
// A scale is one byte, eeeeemmm: (1 + m / 8) * 2^(e - 22), from 2^-22 to 896, or 0xff: NaN. Both products are exact in fp32, so whoever reads a
// row, in whatever order, reads the same numbers.
enum Format : int32_t { kInt8 = 3, kInt4 = 4 };
constexpr int32_t kInt4Group = 32;  // elements that share a scale

// A kernel that finds its arguments wrong writes why and returns non-zero; the binding turns it into an exception.
struct Error {
  char text[192];
};

// One layer's keys, or values, in a page: [Hkv, B, bytes] from `offset` bytes on. `format` is a DType or a Format.
struct RowLayout {
  int64_t offset;
  int32_t dim, format, bytes;
};

struct PageLayout {
  void* pages;
  int64_t num_pages, page_bytes;
  RowLayout k, v;
  int32_t page_size, num_kv_heads;
};

// Staged rows: [T, Hkv] of them seen through strides in bytes.
struct Staged {
  const void *k, *v;
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
};

// Keys are summed up in parts of this many, which start at absolute multiples of it, and the parts are then merged in
// order: always, so that the parts of a long sequence may be given to several threads without changing a bit.
constexpr int32_t kPartKeys = 512;
constexpr int32_t kTileKeys = 64;  // and within a part, tile by tile; tiles start at absolute multiples, too

// A block of one sequence's query tokens; the scheduler orders these, largest first. A block with few rows and many keys
// may be cut into `num_splits` items, each with some of the parts; the last one to finish merges them.
struct WorkItem {
  int32_t seq, first_token, num_tokens;
  int32_t first_part, end_part;            // parts of kPartKeys keys that this item sums up
  int32_t num_splits;                      // 1: the item does the whole block and merges as it goes
  int32_t block_first_part, num_parts;     // of the whole block
  int64_t partials, counter;               // of head 0 of this block, where num_splits > 1
  int64_t begun;                           // AttendArgs::begun has the block's parts from here on; -1: nothing is
};

// The first keys of one part, which several sequences have in the same pages: of a common prompt, or of what the samples of one began with. The query
// rows of all of them meet these together, before any other item; each row's state goes to AttendArgs::states, where its own item goes on.
struct SharedItem {
  int32_t seq, part, keys;          // one of the sequences; keys: a multiple of a tile
  int32_t first_token, num_tokens;  // of AttendArgs::shared_tokens; those of one sequence lie together
  int64_t states;                   // of slice 0 (attention_item.h): [rows][state_floats]
};

// Where a block goes on in a part: from the states that a shared item left for its tokens, `token` being the first of them. -1: nothing is begun.
struct Begun {
  int32_t shared, token;
};

struct AttendArgs {
  PageLayout layout;
  Staged staged;
  const void* q;
  void* out;  // [T, Hq, Dv] contiguous, of q's dtype
  int64_t q_token_stride, q_head_stride;  // in bytes
  const int32_t *query_start, *num_committed, *page_ids, *page_start;
  const void* sinks;  // [Hq] or null
  int32_t num_page_ids, num_seqs, num_tokens, num_heads, dtype, sinks_dtype;
  float scale, softcap;
  int32_t window, chunk, num_threads;
  const WorkItem* items;
  int64_t num_items;
  const SharedItem* shared;
  int64_t num_shared;
  const int32_t* shared_tokens;  // places in the step
  const Begun* begun;            // [parts] of each block that has some
  float* states;
  float* partials;    // per split block and KV head: [num_parts][rows][state_floats]
  int32_t* counters;  // per split block and KV head: how many of its items are done
};

struct CommitArgs {
  PageLayout layout;
  Staged staged;
  const int64_t* slots;  // [T], page * B + offset, or -1 to store nothing
  int32_t num_tokens, num_threads;
};

constexpr int32_t kMostTaps = 16;  // of a convolution: the rows that each of its results is made of

struct ConvolveArgs {
  PageLayout layout;    // keys of one head, plain, one element a channel
  Staged staged;        // the step's own rows
  const void *weight, *bias;  // [C, W], the oldest first; [C] or null
  void* out;            // [T, C] contiguous
  float* scratch;       // convolve_scratch_floats of them
  const int32_t *query_start, *num_committed, *page_ids, *page_start;
  int32_t num_seqs, num_tokens, width, dtype, num_threads;
};

static constexpr int64_t convolve_scratch_floats(int64_t channels, int64_t width) { return (width + 2) * ((channels + 15) / 16 * 16); }

constexpr int32_t kMostStateRows = 512;  // of the state of a head

// States [Hv, Dk, Dv] of segments of a step's tokens, which are those of a sequence one after the other.
struct RecurArgs {
  const void *q, *k, *v;       // [T, Hk, Dk], [T, Hk, Dk] and [T, Hv, Dv], contiguous
  const float *decay, *beta;   // [T, Hv]
  void* out;                   // [T, Hv, Dv]
  const float* const* before;  // [S], null where a sequence begins
  float* const* after;         // [N], null where nobody wants it; it may be the one before
  float* scratch;              // [threads, Dk, Dv]: states that nobody wants
  const int64_t *starts, *of;  // [N + 1]: first tokens of segments; [S + 1]: first segments of sequences
  int64_t num_seqs, num_k_heads, num_v_heads, k_dim, v_dim;
  int32_t dtype, num_threads;
  float scale;
  bool normalized, corrects;
};

// x [T, H, dim] through strides in bytes, to rows [T, H, bytes] of a Format, contiguous.
struct EncodeArgs {
  const void* x;
  void* rows;
  int64_t token_stride, head_stride;
  int32_t dtype, format, dim, num_tokens, num_heads, num_threads;
};

struct Kernels {
  const char* isa;
  int32_t (*block_rows)(const AttendArgs*);  // query rows (tokens x heads of a group) that one work item may hold
  int32_t split_rows;  // blocks of at most this many rows may be split over their keys
  int (*attend)(const AttendArgs*, Error*);
  int (*commit)(const CommitArgs*);
  int (*encode)(const EncodeArgs*);
  void (*convolve)(const ConvolveArgs*);
  void (*recur)(const RecurArgs*);
  LinearKernels linear;
  SamplingKernels sampling;
  void (*run_rows)(const RowsArgs*);
};

// What a row has of some keys of a part, its state: outputs, in the order of elements or of its way of computing; from the float on that is named
// here sixteen sums, what scores are subtracted from, and, not on AMX, whether it saw any of the keys.
static constexpr int64_t state_sums(int64_t v_dim) { return (v_dim + 63) / 64 * 64; }
static constexpr int64_t state_base(int64_t v_dim) { return state_sums(v_dim) + 16; }
static constexpr int64_t state_seen(int64_t v_dim) { return state_base(v_dim) + 1; }
static constexpr int64_t state_floats(int64_t v_dim) { return state_sums(v_dim) + 32; }

// Bytes of a row of `dim` elements of a DType or Format.
int32_t row_bytes(int32_t format, int32_t dim);

// The instruction set in use; chosen when the module is imported, changed by tests.
const Kernels& active_kernels();

}  // namespace quire
