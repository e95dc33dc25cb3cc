// Matrix products whose bits do not depend on the batch. The law, for every shape, layout, blocking and number of threads:
//
//   block b of k = [128 b, 128 b + 128):  s_b = fma(x[k], W[k, n], s_b) for k ascending, from 0
//   y[m, n] = rounded((s_0 + s_1 + ...) + bias[n]),  fp32 throughout, rounded once
//
// (avx512bf16 takes bf16 in pairs, of which its dot instruction adds the odd k first, denormal numbers as zero; bf16 on AMX has a law of its own, in
// linear_amx.h.) An output is one lane of one accumulator from beginning to end, so rows never meet, and linear and matmul agree. W is read as it lies
// in memory, nothing is kept.
//
// Few rows of x are limited by reading W: 16 of its rows are transposed in registers and used on the spot. With more rows
// a panel of W, one block of k by 16 or 32 columns, is transposed and widened once to a scratch in L1, and register tiles
// of kTileRows rows go over it. Both fetch ahead: the next panel's lines are asked for while this one is computed, since
// walking many rows of W at once is beyond what hardware prefetchers follow.
#pragma once

#include "kernels.h"
#include "packed_formats.h"
#include "parallel.h"

namespace quire {
namespace QUIRE_ISA {
namespace {
namespace product {

#if defined(QUIRE_AVX512)
constexpr int kTileRows = 14, kTileVectors = 2;  // 28 of 32 registers accumulate
#elif defined(QUIRE_AVX2)
constexpr int kTileRows = 6, kTileVectors = 1;
#else
constexpr int kTileRows = 2, kTileVectors = 1;
#endif
constexpr int kPanel = 16 * kTileVectors;          // columns
constexpr int kMaxRows = 252, kGroupColumns = 256;  // what one thread's scratch of sums holds
constexpr int kFewChunk = 2048;                    // columns of W [K, N] that few rows take at once
constexpr int64_t kMaxCells = 2 << 20;             // of x at once
template <class F, bool kKN>
constexpr int kFewRows = (kKN || sizeof(typename F::Elem) == 4) && kTileRows > 2 ? 8 : 4;  // measured: beyond, packing pays

struct Plan {
  bool few, by_rows;
  int threads, rows, panels;        // rows of x at once; panels whose sums a thread holds
  int64_t most_rows;                // that there is scratch for
  int64_t x_floats, thread_floats;  // scratch: cells of x, shared; each thread's panel and sums. They grow with m, as most_rows does.
};

// What is planned alike whatever the weight is: `bytes` of an element of W, `x_row` floats of a row of x as cells.
inline Plan plan_for(const LinearArgs& g, double bytes, int64_t x_row) {
  Plan p{};
  // Nanoseconds on one thread, roughly: reading at 10 GB/s or 100 GFLOP/s. Waking another thread costs microseconds.
  const double read = 0.1 * bytes, compute = 0.02 * double(g.m);
  p.threads = double(g.n) * double(g.k) * (read > compute ? read : compute) < 8000 ? 1 : g.num_threads;
  const int64_t fitting = smaller(kMaxRows, kMaxCells / (x_row + 1) / kTileRows * kTileRows), most = fitting > kTileRows ? fitting : kTileRows;
  p.rows = int(smaller(g.m, round_up(ceil_div(g.m, ceil_div(g.m, most)), kTileRows)));
  p.most_rows = smaller(g.m, most);
  p.x_floats = p.most_rows * x_row;
  return p;
}

template <class F, bool kKN>
Plan plan_rows(const LinearArgs& g) {
  Plan p = plan_for(g, sizeof(typename F::Elem), ceil_div(g.k, kBlock) * kCells<F>);
  p.few = g.m <= kFewRows<F, kKN>;
  // A part must not be one of few rows: those take more scratch than the larger part that its share is measured by.
  constexpr int kLeast = 2 * kTileRows > kFewRows<F, kKN> ? 2 * kTileRows : kFewRows<F, kKN> + 1;
  p.by_rows = p.threads > 1 && g.n < int64_t(p.threads) * 2 * kPanel && g.m >= int64_t(p.threads) * kLeast;
  p.panels = g.m <= 64 && !kKN ? 1 : kGroupColumns / kPanel;
  p.thread_floats = p.few ? g.m * (kKN ? 2 * kFewChunk : 16) : (kCells<F> + p.most_rows * p.panels) * kPanel;
  return p;
}

template <class F>
void pack_x(const LinearArgs& g, int64_t m0, int rows, int first, int last, float* out, int load = F::kPerLoad) {
  for (int r = first; r < last; ++r) {
    const auto* x = (const typename F::Elem*)g.x + (m0 + r) * g.x_stride;
    for (int64_t k = 0; k < g.k; k += kBlock) {
      const int cells = int(round_up(smaller(g.k - k, kBlock), load)) / F::kPerCell;
      cells_of_row<F>(x + k, g.k - k, out + (k / kBlock * rows + r) * kCells<F>, cells);
    }
  }
}

// Sums [panel, rows, width] -> y.
template <class F>
void finish(const LinearArgs& g, const float* sums, int width, int64_t m0, int rows, int64_t n0, int64_t n1) {
  const auto* bias = (const typename F::Elem*)g.bias;
  for (int r = 0; r < rows; ++r) {
    auto* y = (typename F::Elem*)g.y + (m0 + r) * g.n;
    for (int64_t n = n0; n < n1; n += 16) {
      const int64_t at = n - n0, left = n1 - n;
      F32x16 v = load(sums + (at / width * rows + r) * width + at % width);
      if (bias) v = add(v, widen_upto<F>(bias + n, left));
      if (left >= 16) {
        F::narrow(y + n, v);
      } else {
        F::narrow_n(y + n, v, int(left));
      }
    }
  }
}

template <class F, bool kKN, int MR>
QUIRE_INLINE void few_block(FewArgs<typename F::Elem>& a, const LinearArgs& g, int64_t n0, int64_t n1, int64_t k0) {
  constexpr int kVectors = MR <= 4 ? 4 : 2;
  const auto* w = (const typename F::Elem*)g.w + (kKN ? k0 * g.w_stride + n0 : n0 * g.w_stride + k0);
  const bool more = k0 + kBlock < g.k;
  a.w = w;
  if constexpr (!kKN) {
    a.ahead = more ? w + kBlock : w - k0 + 16 * g.w_stride;
    a.columns = int(n1 - n0);
    few_nk<F, MR>(a);
  } else {
    float* sums = a.sums;
    float* block = sums + MR * kFewChunk;
    const int k = a.k;
    for (int at = 0; at == 0 || at < k; at += kPiece) {
      a.k = int(smaller(k - at, kPiece));
      const bool begins = at == 0, ends = at + kPiece >= k;
      for (int64_t n = 0; n < n1 - n0;) {
        const int64_t left = n1 - n0 - n, taken = left >= 16 * kVectors ? 16 * kVectors : 16;
        a.w = w + n;
        a.ahead = a.w + kPiece * g.w_stride;
        a.columns = int(smaller(left, 16));
        a.sums = sums + n * MR;
        if (taken > 16) {
          few_kn<F, MR, kVectors>(a, block + n * MR, begins, ends);
        } else {
          few_kn<F, MR, 1>(a, block + n * MR, begins, ends);
        }
        n += taken;
      }
      a.x += kPiece / F::kPerCell;
      w += kPiece * g.w_stride;
    }
    a.sums = sums;
  }
}

template <class F, bool kKN>
void few_rows(const LinearArgs& g, const float* x, float* sums, int64_t n_begin, int64_t n_end) {
  constexpr int kChunk = kKN ? kFewChunk : 16;
  const int m = int(g.m);
  for (int64_t n0 = n_begin; n0 < n_end; n0 += kChunk) {
    const int64_t n1 = smaller(n0 + kChunk, n_end);
    int64_t k0 = 0;
    do {
      FewArgs<typename F::Elem> a{x + k0 / kBlock * m * kCells<F>, nullptr, nullptr, g.w_stride, sums, int(smaller(g.k - k0, kBlock)), 0, k0 == 0};
      switch (m) {
        case 1: few_block<F, kKN, 1>(a, g, n0, n1, k0); break;
        case 2: few_block<F, kKN, 2>(a, g, n0, n1, k0); break;
        case 3: few_block<F, kKN, 3>(a, g, n0, n1, k0); break;
        case 4: few_block<F, kKN, 4>(a, g, n0, n1, k0); break;
        default:
          if constexpr (kFewRows<F, kKN> > 4) {
            switch (m) {
              case 5: few_block<F, kKN, 5>(a, g, n0, n1, k0); break;
              case 6: few_block<F, kKN, 6>(a, g, n0, n1, k0); break;
              case 7: few_block<F, kKN, 7>(a, g, n0, n1, k0); break;
              default: few_block<F, kKN, 8>(a, g, n0, n1, k0); break;
            }
          }
      }
      k0 += kBlock;
    } while (k0 < g.k);
    finish<F>(g, sums, 16, 0, m, n0, n1);
  }
}

typedef void (*Tile)(const TileArgs&);
template <int kPerCell>
struct Tiles {
  template <int MR>
  static constexpr Tile of() {
    if constexpr (MR <= kTileRows) return &tile<kPerCell, MR, kTileVectors>;
    return nullptr;
  }
  static constexpr Tile rows[] = {nullptr, of<1>(), of<2>(), of<3>(),  of<4>(),  of<5>(),  of<6>(), of<7>(),
                                  of<8>(), of<9>(), of<10>(), of<11>(), of<12>(), of<13>(), of<14>()};
};

// One panel and one block of k.
template <class F, bool kKN>
void panel_block(const LinearArgs& g, const float* x, int rows, float* panel, float* sums, int64_t n0, int64_t k0, const typename F::Elem* ahead) {
  using Elem = typename F::Elem;
  const int columns = int(smaller(g.n - n0, kPanel)), k = int(smaller(g.k - k0, kBlock));
  const Elem* w = (const Elem*)g.w + (kKN ? k0 * g.w_stride + n0 : n0 * g.w_stride + k0);
  for (int j = 0; j < columns; j += 16) {
    const int left = columns - j < 16 ? columns - j : 16;
    if constexpr (kKN) {
      pack_kn<F>(w + j, g.w_stride, left, k, panel + j, kPanel);
    } else {
      pack_nk<F>(w + j * g.w_stride, g.w_stride, left, k, panel + j, kPanel);
    }
  }
  // Every four cells a tile asks for four lines of what comes next; the tiles share a round's lines among them.
  constexpr int kRowBytes = (kKN ? kPanel : kBlock) * int(sizeof(Elem)), kRowsOfW = kKN ? kBlock : kPanel, kRounds = kCells<F> / 4;
  constexpr int kLines = kRowBytes < 64 ? 1 : kRowBytes / 64, kRows = kRowsOfW < kRounds ? 1 : kRowsOfW / kRounds;
  const int64_t row_bytes = g.w_stride * int64_t(sizeof(Elem));
  constexpr int kRoundsNeeded = kRows * kLines > 4 ? 2 : 1;  // or one tile could not ask for all of them
  const int needed = int(ceil_div(rows, kTileRows)), tiles = needed > kRoundsNeeded ? needed : kRoundsNeeded, cells = int(ceil_div(k, F::kPerLoad)) * F::kPerLoad / F::kPerCell;
  TileArgs a{x, panel, sums, cells, k0 == 0, (const char*)panel, 0, {}, nullptr};
  for (int t = 0; t < tiles; ++t) {
    const int r0 = rows * t / tiles, r1 = rows * (t + 1) / tiles;
    a.x = x + r0 * kCells<F>;
    a.sums = sums + r0 * kPanel;
    const int first = kRows * kLines * t / tiles, last = kRows * kLines * (t + 1) / tiles;
    a.ahead = last > first ? (const char*)ahead : (const char*)panel;
    a.ahead_next = last > first ? kRows * row_bytes : 0;
    for (int u = 0; u < 4; ++u) {
      const int line = first + u * (last - first) / 4;
      a.ahead_lines[u] = last > first ? line / kLines * row_bytes + line % kLines * 64 : 0;
    }
    Tiles<F::kPerCell>::rows[r1 - r0](a);
  }
}

template <class F, bool kKN>
void many_rows(const LinearArgs& g, const Plan& p, const float* x, int64_t m0, int rows, float* scratch, int64_t n_begin, int64_t n_end) {
  float *panel = scratch, *sums = scratch + kCells<F> * kPanel;
  const int64_t columns = p.panels * kPanel, to_next = kKN ? kPanel : kPanel * g.w_stride, to_block = kKN ? kBlock * g.w_stride : kBlock;
  for (int64_t n0 = n_begin; n0 < n_end; n0 += columns) {
    const int64_t n1 = smaller(n0 + columns, n_end);
    int64_t k0 = 0;
    do {
      for (int64_t n = n0; n < n1; n += kPanel) {
        const auto* first = (const typename F::Elem*)g.w + n0 / kPanel * to_next + k0 / kBlock * to_block;
        const auto* ahead = n + kPanel < n1       ? first + ((n - n0) / kPanel + 1) * to_next
                            : k0 + kBlock < g.k ? first + to_block
                                                : (const typename F::Elem*)g.w + (n / kPanel + 1) * to_next;
        panel_block<F, kKN>(g, x + k0 / kBlock * rows * kCells<F>, rows, panel, sums + (n - n0) * rows, n, k0, ahead);
      }
      k0 += kBlock;
    } while (k0 < g.k);
    finish<F>(g, sums, kPanel, m0, rows, n0, n1);
  }
}

// One thread's part; the team's threads meet where they share the cells of x.
template <class F, bool kKN>
void part(const LinearArgs& g, const Plan& p, const Member& me) {
  float* scratch = g.scratch + p.x_floats + me.id * p.thread_floats;
  const int64_t unit = p.few && !kKN ? 16 : kPanel, units = ceil_div(g.n, unit);
  const int64_t n_begin = units * me.id / me.count * unit, n_end = smaller(units * (me.id + 1) / me.count * unit, g.n);
  if (p.few) return few_rows<F, kKN>(g, g.scratch, scratch, n_begin, n_end);
  for (int64_t m0 = 0; m0 < g.m; m0 += p.rows) {
    const int rows = int(smaller(g.m - m0, p.rows));
    if (m0 > 0) me.meet();
    pack_x<F>(g, m0, rows, rows * me.id / me.count, rows * (me.id + 1) / me.count, g.scratch);
    me.meet();
    many_rows<F, kKN>(g, p, g.scratch, m0, rows, scratch, n_begin, n_end);
  }
}

// Some rows of x as a product of their own, for one thread.
template <class F>
LinearArgs rows_of(const LinearArgs& g, int64_t first, int64_t last) {
  LinearArgs some = g;
  some.x = (const typename F::Elem*)g.x + first * g.x_stride;
  some.y = (typename F::Elem*)g.y + first * g.n;
  some.m = last - first;
  some.num_threads = 1;
  return some;
}

template <class F, bool kKN>
int64_t scratch_floats(const LinearArgs& g) {
  const Plan p = plan_rows<F, kKN>(g);
  if (p.by_rows) return p.threads * scratch_floats<F, kKN>(rows_of<F>(g, 0, ceil_div(g.m, p.threads)));
  return p.x_floats + p.threads * p.thread_floats;
}

template <class F, bool kKN>
void run(const LinearArgs& g) {
  const Plan p = plan_rows<F, kKN>(g);
  if (p.few) pack_x<F>(g, 0, int(g.m), 0, int(g.m), g.scratch);
  if (!p.by_rows) return parallel(p.threads, [&](const Member& me) { part<F, kKN>(g, p, me); });
  parallel_for(p.threads, p.threads, [&](int64_t i, int) {
    LinearArgs some = rows_of<F>(g, g.m * i / p.threads, g.m * (i + 1) / p.threads);
    some.scratch += i * scratch_floats<F, kKN>(rows_of<F>(g, 0, ceil_div(g.m, p.threads)));
    part<F, kKN>(some, plan_rows<F, kKN>(some), {0, 1, nullptr});
  });
}

template <bool kKN>
int64_t scratch_floats_of(const LinearArgs& g) {
  return g.dtype == kF32 ? scratch_floats<Fp32, kKN>(g) : g.dtype == kBF16 ? scratch_floats<Bf16, kKN>(g) : scratch_floats<Fp16, kKN>(g);
}
template <bool kKN>
void multiply(const LinearArgs& g) {
  g.dtype == kF32 ? run<Fp32, kKN>(g) : g.dtype == kBF16 ? run<Bf16, kKN>(g) : run<Fp16, kKN>(g);
}

}  // namespace product
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
