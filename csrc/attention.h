// Ragged paged attention: every query attends to its sequence's committed pages and to this step's staged keys up to
// itself, in one online softmax. One path serves decode, prefill chunks and mixtures; only the grouping of rows differs.
//
//   part   512 keys at absolute multiples of 512; each row sums up a part from scratch, then merges parts in order
//   tile   64 keys at absolute multiples of 64; scores, maximum, rescale and sums once per tile
//
// Up to kDirectRows rows meet a tile where it lies; more meet some tiles at once, copied to scratch, a panel of kMaxRows rows after the other.
//
// A row therefore does the same arithmetic whatever shares its block, step, thread or page size.
#pragma once
#include <stdio.h>

#include "attention_amx.h"
#include "attention_block.h"
#include "parallel.h"
#include "thread_memory.h"

namespace quire {
namespace QUIRE_ISA {
namespace {

inline bool carve_scratch(const AttendArgs& args, Scratch& s) {
  static thread_local ThreadMemory memory;
  const int64_t k_row = round_up(args.layout.k.dim + 1), v_row = round_up(args.layout.v.dim, 32), rows = kBlockRows;
  const Wanted wanted[] = {{&s.q, (rows + kMaxRows) * k_row},
                           {&s.columns, kColumnFloats + kScaleFloats},
                           {&s.keys, kGroupTiles * kTile * k_row},
                           {&s.values, kGroupTiles * kTile * v_row},
                           {&s.scores, kGroupTiles * kMaxRows * kTile},
                           {&s.out, rows * v_row},
                           {&s.total_out, rows * v_row},
                           {&s.sums, rows * 16},
                           {&s.max, rows},
                           {&s.total_max, rows},
                           {&s.total_sum, rows},
                           {&s.seen, rows},
                           {&s.value_scales, kGroupTiles * kTile},
                           {&s.zeros, zero_floats(args)}};
  if (!carve(memory, wanted)) return false;
  memset(s.zeros, 0, size_t(zero_floats(args)) * 4);
  return true;
}

// Queries as panels [Dk][kMaxRows] of fp32, or of bf16 pairs for the CPU's own dot product, where an odd Dk gets one more zero, or of bytes.
inline void load_queries(Block& b) {
  const Item& item = b.item;
  const int k_dim = b.args().layout.k.dim, span = b.key.queries == Queries::kPairs ? 32 : 16;
  const int64_t bytes = element_bytes(b.args().dtype);
  for (int r0 = 0; r0 < item.rows(); r0 += kMaxRows) {
    const char* from[16] = {};
    for (int r = r0; r < r0 + kMaxRows && r < item.rows(); ++r) from[r - r0] = item.query(r);
    float* to = b.s.q + r0 / kMaxRows * (b.k_rows * kMaxRows);
#if defined(QUIRE_VECTOR_DOTS)
    if (b.key.queries == Queries::kBytes) {
      place_query_bytes(from, k_dim, to);
      continue;
    }
#endif
    for (int d = 0; d <= k_dim; d += span) {
      const int n = k_dim - d < span ? k_dim - d : span;
      F32x16 x[16];
      for (int r = 0; r < 16; ++r) {
        if (!from[r])
          x[r] = zero();
        else if (b.key.queries == Queries::kPairs)
          x[r] = floats(load_pairs_n((const uint16_t*)from[r] + d, n));
        else
          x[r] = load_elements_n(b.args().dtype, from[r] + d * bytes, n);
      }
      transpose16(x);
      for (int i = 0; i < 16; ++i, to += kMaxRows) store_n(to, x[i], kMaxRows);
    }
  }
}

inline void start_totals(Block& b) {
  const Item& item = b.item;
  for (int r = 0; r < item.rows(); ++r) {
    b.s.total_max[r] = sink_score(item.args, item.first_head + r % item.heads);
    b.s.total_sum[r] = item.args.sinks ? 1.0f : 0.0f;
  }
  memset(b.s.total_out, 0, size_t(item.rows() * b.v_stride) * 4);
}

// Totals divided by their sums, from the order of units back to that of elements.
inline void write_out(const Block& b) {
  const AttendArgs& args = b.args();
  const int v_dim = args.layout.v.dim, unit = 16 * b.value.vecs;
  const int64_t bytes = element_bytes(args.dtype);
  for (int r = 0; r < b.item.rows(); ++r) {
    char* to = (char*)args.out + b.item.out(r) * bytes;
    const float* from = b.s.total_out + r * b.v_stride;
    const F32x16 sum = set1(b.s.total_sum[r]);
    for (int d = 0; d < v_dim; d += unit) {
      const int n = v_dim - d < unit ? v_dim - d : unit;
      F32x16 x[2] = {add(div(load(from + d), sum), zero()), zero()};  // -0 to +0, see many_rows
      if (b.value.vecs == 1) {
        store_elements_n(args.dtype, to + d * bytes, x[0], n);
        continue;
      }
      x[1] = add(div(load(from + d + 16), sum), zero());
      if (args.dtype == kBF16) {
        store_pairs_n((uint16_t*)to + d, make_pairs(x[0], x[1]), n);
        continue;
      }
      float lanes[2][16], ordered[32];
      for (int i = 0; i < 2; ++i) store(lanes[i], x[i]);
      for (int i = 0; i < 32; ++i) ordered[i] = lanes[i % 2][i / 2];
      for (int i = 0; i < n; i += 16) store_elements_n(args.dtype, to + (d + i) * bytes, load(ordered + i), n - i < 16 ? n - i : 16);
    }
  }
}

inline Block block_of(Item& item, Scratch& s, int64_t end, Coming* coming) {
  const PageLayout& at = item.args.layout;
  const KeyFormat& key = keys_of(item.args);
  const ValueFormat& value = values_of(item.args);
  Block b{item, s, key, value, round_up(at.k.dim + 1), round_up(at.v.dim, 16 * value.vecs), end, coming};
  load_queries(b);
  return b;
}

inline void run_item(const AttendArgs& args, const WorkItem& work, const Heads& of, Scratch& s, Coming* coming) {
  Item item = item_of(args, work, of);
  Block b = block_of(item, s, keys_of_part(item, work.end_part - 1).end, coming);
  run_parts(args, work, of, b);
}

inline void share_item(const AttendArgs& args, const SharedItem& work, const Heads& of, Scratch& s) {
  Item item = item_of(args, work, of);
  Block b = block_of(item, s, keys_of_part(item, work.part).end, nullptr);
  run_part(b, work.part, {nullptr, 0});
  save_part(b, states_of(args, work, of));
}

// How items are computed, with what a thread needs for it: false from prepare() if memory is short.
struct ByVectors {
  static constexpr int kRows = kBlockRows;
  Scratch s;
  bool prepare(const AttendArgs& args) { return carve_scratch(args, s); }
  void run(const AttendArgs& args, const Taken& at, const Taken& then) {
    if (!then.work) return run_item(args, *at.work, at.of, s, nullptr);
    Coming coming(args, *then.work, then.of);
    run_item(args, *at.work, at.of, s, &coming);
  }
  void share(const AttendArgs& args, const SharedItem& work, const Heads& of) { share_item(args, work, of, s); }
};

// Calls run(i, coming) with each thing that a thread takes; `coming`: what it does after that, -1 where that is not known. Of the last few things none
// is taken early: another thread may have nothing to do before this one comes to it.
constexpr int64_t kNotEarly = 2;  // for each thread
template <class Run>
void take_each(Next& next, int threads, const Run& run) {
  const int64_t late = next.count - kNotEarly * threads;
  int64_t i, coming;
  for (bool some = next.take(i); some; i = coming) {
    const bool early = i < late && next.take(coming);
    run(i, early ? coming : -1);
    some = early || next.take(coming);
  }
}

template <class Way>
int attend_by(const AttendArgs& args, Error* error) {
  const int32_t kv_heads = args.layout.num_kv_heads, group = args.num_heads / kv_heads;
  const int32_t heads = group < Way::kRows ? group : Way::kRows, num_slices = (group + heads - 1) / heads;
  const int64_t per_item = int64_t(kv_heads) * num_slices;
  const auto heads_of = [&](int64_t i) -> Heads {
    const int32_t slice = int32_t(i % per_item), kv_head = slice / num_slices, first = slice % num_slices * heads;
    return {slice, kv_head, kv_head * group + first, group - first < heads ? group - first : heads};
  };
  int failed = 0;
  Next shared{args.num_shared * per_item}, next{args.num_items * per_item};
  parallel(args.num_threads, [&](const Member& me) {
    Way way;
    const bool ready = way.prepare(args);
    if (!ready) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    for (int64_t i; ready && shared.take(i);) way.share(args, args.shared[i / per_item], heads_of(i));
    if (args.num_shared > 0) me.meet();  // since others' states are gone on from
    if (!ready) return;
    const auto taken = [&](int64_t i) { return Taken{i < 0 ? nullptr : args.items + i / per_item, heads_of(i < 0 ? 0 : i)}; };
    take_each(next, me.count, [&](int64_t i, int64_t coming) { way.run(args, taken(i), taken(coming)); });
  });
  if (failed) snprintf(error->text, sizeof error->text, "attend: out of memory for a thread's scratch");
  return failed;
}

struct Attention {
  int32_t rows;
  int (*attend)(const AttendArgs&, Error*);
};

// The way that serves a layer: the same one at every step, since it depends on what the layer's rows are.
inline Attention way_of([[maybe_unused]] const AttendArgs& args) {
#if defined(QUIRE_AMX)
  if (tiles::are_pairs(args)) return {tiles::kMostRows, &attend_by<tiles::ByTiles<tiles::Pairs>>};
  if (are_bytes(args)) return {tiles::kMostRows, &attend_by<tiles::ByTiles<tiles::Bytes>>};
#endif
  return {ByVectors::kRows, &attend_by<ByVectors>};
}

int32_t block_rows(const AttendArgs* args) { return way_of(*args).rows; }

int attend(const AttendArgs* args, Error* error) {
  const int64_t used = args->num_seqs > 0 ? args->query_start[args->num_seqs] : 0;
  const int64_t row = int64_t(args->num_heads) * args->layout.v.dim * element_bytes(args->dtype);
  memset((char*)args->out + used * row, 0, size_t((args->num_tokens - used) * row));
  return way_of(*args).attend(*args, error);
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
