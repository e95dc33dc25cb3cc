// Where the rows of one tile of a sequence's keys and values lie: in pages, or in this step's staged tensors. All addresses
// are in bytes; what is in a row concerns only those who read it (elements.h).
#pragma once
#include "caches.h"
#include "kernels.h"
#include "simd.h"

namespace quire {
namespace QUIRE_ISA {
namespace {

constexpr int kLine = 64;  // bytes of a cache line
constexpr int kTile = kTileKeys;

// One sequence seen from one KV head.
struct History {
  const PageLayout* layout;
  const char *staged_k, *staged_v;  // of the sequence's first token in this step
  int64_t k_token_stride, v_token_stride;
  const int32_t* page_ids;
  int32_t num_committed, head;
};

// Bytes that lie together: the rows of one head on one page, or one staged row.
struct Run {
  const char *at, *end;
};

// Entries lo..hi-1, and zeros for the rest of the groups of 32 keys that these begin and end.
struct Rows {
  const char* k[kTile];
  const char* v[kTile];
  Run runs[2 * kTile];  // of keys and of values, by turns
  int num_runs;
  int64_t base = -1;  // of the tile these are of
  int lo, hi;
  int first_token, end_token;  // of the block's query tokens, those that see the tile

  Rows() {}  // clearing what is set before it is read takes a tenth of a microsecond
};

QUIRE_INLINE void add_run(Rows& rows, const char* at, int64_t bytes) { rows.runs[rows.num_runs++] = {at, at + bytes}; }

inline void locate(const History& from, int64_t base, int lo, int hi, const char* zeros, Rows& rows) {
  const PageLayout& at = *from.layout;
  rows.lo = lo;
  rows.hi = hi;
  rows.num_runs = 0;
  for (int j = lo; j < hi;) {
    const int64_t position = base + j;
    const char *k, *v;
    int64_t run, k_step, v_step;
    if (position < from.num_committed) {
      const int32_t entry = int32_t(position) / at.page_size, place = int32_t(position) % at.page_size;
      const char* page = (const char*)at.pages + from.page_ids[entry] * at.page_bytes;
      const int64_t slot = from.head * int64_t(at.page_size) + place;
      run = at.page_size - place < from.num_committed - position ? at.page_size - place : from.num_committed - position;
      k = page + at.k.offset + slot * at.k.bytes;
      v = page + at.v.offset + slot * at.v.bytes;
      k_step = at.k.bytes;
      v_step = at.v.bytes;
    } else {
      run = hi - j;
      k = from.staged_k + (position - from.num_committed) * from.k_token_stride;
      v = from.staged_v + (position - from.num_committed) * from.v_token_stride;
      k_step = from.k_token_stride;
      v_step = from.v_token_stride;
    }
    if (hi - j < run) run = hi - j;
    if (position < from.num_committed) {
      add_run(rows, k, run * k_step);
      add_run(rows, v, run * v_step);
    }
    for (const int64_t end = j + run; j < end; ++j, k += k_step, v += v_step) {
      rows.k[j] = k;
      rows.v[j] = v;
      if (position < from.num_committed) continue;
      add_run(rows, k, at.k.bytes);
      add_run(rows, v, at.v.bytes);
    }
  }
  for (int j = lo & ~31; j < lo; ++j) rows.k[j] = rows.v[j] = zeros;
  for (int j = hi; j & 31; ++j) rows.k[j] = rows.v[j] = zeros;
}

// Asks for rows that are wanted next, line by line, while others are computed: pages lie anywhere, so the CPU cannot guess them. With few query rows each
// step asks for as many lines as it reads itself: a core has room for some twenty on their way, so many at once keep what is wanted now waiting, and
// asking in one phase alone would leave the memory idle in the others.
struct Fetcher {
  const Run *runs = nullptr, *end_runs = nullptr;
  int apart = 1;         // of the runs that are wanted
  int64_t step = kLine;  // bytes from line to line of a run; what lies between them is asked for in further passes
  int passes = 1;
  const Run* run = runs;
  const char *at = nullptr, *end = nullptr;  // of the run at hand
  int pass = 0, due = 0;                     // due: in 1/256 lines

  bool done() const { return at >= end && run >= end_runs && pass + 1 >= passes; }
};
QUIRE_INLINE Fetcher whole_tile(const Rows& rows) { return {rows.runs, rows.runs + rows.num_runs}; }
QUIRE_INLINE Fetcher values_alone(const Rows& rows) { return {rows.runs + 1, rows.runs + rows.num_runs, 2}; }
// The first line of each row, then the second one: so keys are met.
QUIRE_INLINE Fetcher keys_alone(const Rows& rows, int64_t bytes) {
  return {rows.runs, rows.runs + rows.num_runs, 2, bytes, int((bytes + kLine - 1) / kLine)};
}
// Where lines come into the first cache they do so half a tile ahead, else a tile; `kFar`: into the second one.
template <bool kFar = false>
QUIRE_INLINE int ask(Fetcher& f, int lines) {  // gives back how many there are none left for
  const char* at = f.at;
  for (; lines > 0; --lines, at += f.step) {
    if (at >= f.end) {
      if (f.run >= f.end_runs) {
        if (f.pass + 1 >= f.passes) break;
        ++f.pass;
        f.run = f.runs;
      }
      at = (const char*)((uintptr_t(f.run->at) & ~uintptr_t(kLine - 1)) + f.pass * kLine);
      f.end = f.run->end;
      f.run += f.apart;
    }
    !kFar && fetch_near() ? prefetch(at) : prefetch_l2(at);
  }
  f.at = at;
  return lines;
}
// N lines, which one run mostly has: one test for all of them. The fewer operations there are to a line, the more lines are within what a core looks ahead.
template <int N>
QUIRE_INLINE int ask_together(Fetcher& f) {
  const char* at = f.at;
  if (f.end - at <= (N - 1) * f.step) return ask(f, N);
  if (fetch_near())
    QUIRE_UNROLL for (int i = 0; i < N; ++i, at += f.step) prefetch(at);
  else
    QUIRE_UNROLL for (int i = 0; i < N; ++i, at += f.step) prefetch_l2(at);
  f.at = at;
  return 0;
}
// The same where it need not be whole lines each time: `amount` in 1/256 of one.
template <bool kFar = false>
QUIRE_INLINE void fetch(Fetcher& f, int amount) {
  f.due += amount;
  ask<kFar>(f, f.due / 256);
  f.due %= 256;
}
// What few rows ask for: while they meet a tile's keys `first`, and then what is next, which values go on with.
struct Lines {
  Fetcher first, next;
};
QUIRE_INLINE Lines lines_ahead(const Rows& tile, const Rows* next, int64_t key_bytes) {
  Lines lines;
  if (fetch_near()) lines.first = values_alone(tile);
  if (next) lines.next = fetch_near() ? keys_alone(*next, key_bytes) : whole_tile(*next);
  return lines;
}
template <int N>
QUIRE_INLINE void ask_together(Lines& lines) {
  const int left = ask_together<N>(lines.first);
  if (left == N)
    ask_together<N>(lines.next);
  else if (left)
    ask(lines.next, left);
}
QUIRE_INLINE void ask_for_rest(Fetcher& f) {
  while (!f.done()) ask(f, 1);
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
