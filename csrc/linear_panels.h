// What products that read a weight panel by panel have in common, whatever their law: rows of x go to scratch as tiles of them, so many at once, and
// panels of 64 columns of the weight pass them, shared by threads. How is a product's own, a struct P:
//
//   plan(g)                                    -> TilePlan
//   shapes(p)                                  something that lives while tiles are multiplied
//   place(g, p, m0, first, last, x)            rows first..last-1 of x, from row m0 on, to tiles
//   pass(g, p, x, m, count, panel, last, own)  a panel times `count` tiles of x, to y from its row m on; `last`: behind it nothing is this thread's
#pragma once
#include "caches.h"
#include "linear_packed.h"

namespace quire {
namespace QUIRE_ISA {
namespace {
namespace product {

// Rows of one tile: up to so many threads share panels in another way (linear_few.h). kEvenTiles: more rows are shared out evenly to tiles, since with
// less to compute behind each other one of a few rows would not hide the reading of a panel.
#if defined(QUIRE_AMX)
constexpr int kFewTileRows = 16;
constexpr bool kEvenTiles = false;
constexpr int64_t kTileXBytes = 3 << 19;  // of x at once for a thread, or for all who share it: it stays in the second cache
#else
constexpr int kFewTileRows = 32;
constexpr bool kEvenTiles = true;
constexpr int64_t kTileXBytes = 1 << 19;  // half of one, of CPUs that have no tiles
#endif
// Rows of x from which on a thread has them for its own, where all would be in the second cache at once, and where not; at once of all threads.
constexpr int kOwnRows = 256, kOwnRowsMany = 160, kMostRows = 2048;

struct TilePlan {
  int threads, rows, tile_rows;  // rows of x at once, and of one of its tiles
  bool by_rows;                  // threads share the rows of x, not the columns
  int64_t tile_bytes, x_bytes, own_bytes;  // of a tile, of all at once, and of what a thread has for its own
};

// `read`: nanoseconds on one thread for an element of the weight, roughly; waking another costs microseconds. `row_bytes`: of a row of x in its
// tile. `before`: bytes of a thread's own in front of the sums of a panel. `in_place`: operands are read where the weight lies, so that each thread
// may read all of them, where it has rows enough of its own: then nobody waits for lines that another core holds.
inline TilePlan tile_plan(const LinearArgs& g, double read, int64_t row_bytes, int64_t before, bool in_place = false) {
  TilePlan p{};
  const double compute = 0.001 * double(g.m);
  p.threads = double(g.n) * double(g.k) * (read > compute ? read : compute) < 8000 ? 1 : g.num_threads;
  const int64_t unit = 32 * p.threads, fitting = kTileXBytes / (row_bytes + (row_bytes == 0)) / 32 * 32, own = g.m / p.threads;
  const bool few_panels = ceil_div(g.n, kWide) < 2 * p.threads && own >= 32;
  p.by_rows = p.threads > 1 && (few_panels || (in_place && own >= (g.m < fitting ? kOwnRows : kOwnRowsMany)));
  const int64_t even = p.by_rows ? unit : 32, most = p.by_rows ? smaller(fitting * p.threads, round_up(kMostRows, unit)) : fitting;
  const bool even_tiles = kEvenTiles && !p.by_rows && g.m <= most;
  p.tile_rows = int(even_tiles ? ceil_div(g.m, ceil_div(g.m, kFewTileRows)) : smaller(g.m, kFewTileRows));
  p.rows = int(smaller(round_up(g.m, p.tile_rows), round_up(ceil_div(g.m, ceil_div(g.m, most > even ? most : even)), even)));
  p.tile_bytes = row_bytes * p.tile_rows;
  p.x_bytes = round_up(row_bytes * p.rows, 64);
  p.own_bytes = before + round_up(p.rows, 16) * kWide * 4;
  return p;
}

// What memory is to bring next: `each` bytes before each operand of a weight, since many lines asked for at once stand in the way of those that are
// needed now.
struct Ahead {
  const char* at;
  int64_t each;
};
// Tiles of AMX were measured with lines that come into the second cache alone.
#if defined(QUIRE_AMX)
constexpr bool ask_near() { return false; }
#else
QUIRE_INLINE bool ask_near() { return fetch_near(); }
#endif
// On x86 written out: with addresses told in the instruction itself, as GCC has it, one row reads 28 GB/s where it reads 34 with each in a register of its own.
// Why is not known (docs/speed.md).
QUIRE_INLINE void ask(Ahead& ahead) {
  const char* const end = ahead.at + ahead.each;
#if defined(QUIRE_PLAIN)
  for (; ahead.at < end; ahead.at += 64) prefetch_l2(ahead.at);
#else
  if (ask_near())
    for (; ahead.at < end; ahead.at += 64) asm volatile("prefetcht0 (%0)" ::"r"(ahead.at));
  else
    for (; ahead.at < end; ahead.at += 64) asm volatile("prefetcht1 (%0)" ::"r"(ahead.at));
#endif
}

// Of `bytes`, while `count` tiles of x, two of them together, pass so many steps of four operands.
inline int64_t part_ahead(int64_t bytes, int64_t steps, int64_t count) {
  return bytes == 0 ? 0 : round_up(ceil_div(bytes, kLines * steps * ceil_div(count, 2)), 64);
}

template <class P>
int64_t tile_scratch_floats(const LinearArgs& g) {
  const TilePlan p = P::plan(g);
  return (p.x_bytes + p.threads * p.own_bytes) / 4;
}

// Without tiles, what is smaller than the smallest normal number is kept, as the other ways to a product do there.
QUIRE_INLINE void store_rounded(uint16_t* y, F32x16 v, int n) {
#if defined(QUIRE_AMX)
  _mm256_mask_storeu_epi16(y, first_lanes(n), (__m256i)_mm512_cvtneps_pbh(v.v));
#else
  n == 16 ? store_bf16(y, v) : store_bf16_n(y, v, n);
#endif
}

// Sums of 16 columns each, `lines` to a row, at(row, line), with bias to rows m.. of y, columns n.. of it.
template <class At>
QUIRE_INLINE void sums_to_y(const LinearArgs& g, int64_t m, int rows, int64_t n, int lines, const At& at) {
  for (int r = 0; r < rows; ++r) {
    auto* y = (uint16_t*)g.y + (m + r) * g.n + n;
    for (int j = 0; j < lines && n + 16 * j < g.n; ++j) {
      const int left = int(smaller(g.n - n - 16 * j, 16));
      F32x16 v = load(at(r, j));
      if (g.bias) v = add(v, load_bf16_n((const uint16_t*)g.bias + n + 16 * j, left));
      store_rounded(y + 16 * j, v, left);
    }
  }
}

template <class P>
void run_tiles(const LinearArgs& g) {
  const TilePlan p = P::plan(g);
  parallel(p.threads, [&](const Member& me) {
    char *const x = (char*)g.scratch, *const own = x + p.x_bytes + me.id * p.own_bytes;
    const int64_t panels = ceil_div(g.n, kWide), begin = p.by_rows ? 0 : panels * me.id / me.count, end = p.by_rows ? panels : panels * (me.id + 1) / me.count;
    [[maybe_unused]] const auto shapes = P::shapes(p);
    for (int64_t m0 = 0; m0 < g.m; m0 += p.rows) {
      const int rows = int(smaller(round_up(g.m - m0, p.tile_rows), p.rows)), tiles = rows / p.tile_rows;
      if (m0 > 0) me.meet();
      P::place(g, p, m0, rows * me.id / me.count, rows * (me.id + 1) / me.count, x);
      me.meet();
      const int first = p.by_rows ? tiles * me.id / me.count : 0, count = (p.by_rows ? tiles * (me.id + 1) / me.count : tiles) - first;
      for (int64_t panel = begin; panel < end && count > 0; ++panel)
        P::pass(g, p, x + first * p.tile_bytes, m0 + first * p.tile_rows, count, panel, panel + 1 == end, own);
    }
  });
}

}  // namespace product
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
