// Products with packed weights (packed_formats.h). The law is that of linear.h, with the bits of the weight as it lay before. For codes it is
//
//   part p of k (int8: 128, int4: 32):  s_p = fma(x[k], code[k, n], s_p) for k ascending, from 0
//   y[m, n] = rounded((s_0 * u[0, n] + s_1 * u[1, n] + ...) + bias[n]),  u the scale of the span (int8: 256, int4: 32) that the part is of, fp32
//   throughout, rounded once
//
// but for bf16 rows, which meet codes as integers (linear_codes.h; on AMX those of int4 made bf16: linear_amx.h) and bf16 weights panel by panel
// (linear_dots.h, by the same law where there is no instruction for pairs of bf16; linear_amx.h).
//
// Few rows of x widen W in registers, as it streams by. For more, 16 or 32 columns of one block of k are widened to a scratch in L1 and
// register tiles go over it.
#pragma once
#include "linear.h"
#include "packed_short.h"

namespace quire {
namespace QUIRE_ISA {
namespace {
namespace product {

// Lines at once of so many rows: enough sums to hide a multiply-add's latency, as far as there are registers.
#if defined(QUIRE_AVX512)
constexpr int kFewPacked = 8;
constexpr int few_lines(int rows) { return rows <= 4 ? 4 : 2; }
#else
#if defined(QUIRE_AVX2)
constexpr int kFewPacked = 6;
#else
constexpr int kFewPacked = 4;
#endif
constexpr int few_lines(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
#endif
constexpr int kAhead = 4096;  // bytes ahead of what is read, on the way to the cache, where a block is walked through once

// One block of k of a panel, its columns from 16 * line on.
struct FewPacked {
  const float* x;   // cells of each row, a block apart
  PartPlace place;  // of the panel
  float* sums;        // [lines, rows, 16]
  int line, k;        // k in this block, filled up
  bool first;
  const char* ahead;  // what will be wanted next
};

// One unit of k: each cell is made when it is multiplied, so that sums and not weights fill the registers.
template <class P, int MR, int NV, int I = 0>
QUIRE_INLINE void few_unit(F32x16 (&acc)[NV][MR], const typename P::Raw* raws, const float* x) {
  if constexpr (I < P::kUnit) {
    F32x16 cells[NV];
    QUIRE_UNROLL for (int j = 0; j < NV; ++j) cells[j] = P::template cell<I>(raws[j]);
    QUIRE_UNROLL for (int i = 0; i < MR; ++i) {
      const F32x16 xi = set1(x[i * kBlock + I]);
      QUIRE_UNROLL for (int j = 0; j < NV; ++j) acc[j][i] = fma(xi, cells[j], acc[j][i]);
    }
    few_unit<P, MR, NV, I + 1>(acc, raws, x);
  }
}

template <class P, int MR>
void few_packed(const FewPacked& g) {
  constexpr int NV = few_lines(MR);
  const char* ahead = g.ahead;
  const float* x = g.x;
  PartPlace place = g.place;
  bool first = g.first;
  for (int k = g.k; k > 0; k -= kPart<P>) {
    F32x16 acc[NV][MR];
    QUIRE_UNROLL for (int j = 0; j < NV; ++j)
      QUIRE_UNROLL for (int i = 0; i < MR; ++i) acc[j][i] = zero();
    const char* w = place.units + 64 * g.line;
    for (int units = (k < kPart<P> ? k : kPart<P>) / P::kUnit; units > 0; --units) {
      typename P::Raw raws[NV];
      QUIRE_UNROLL for (int j = 0; j < NV; ++j) {
        prefetch_l2(ahead + 64 * j);
        raws[j] = P::raw(w + 64 * j);
      }
      few_unit<P, MR, NV>(acc, raws, x);
      x += P::kUnit;
      w += 64 * kLines;
      ahead += 64 * NV;
    }
    QUIRE_UNROLL for (int j = 0; j < NV; ++j) {
      F32x16 scale;
      if constexpr (P::kScaled) scale = load_bf16((const uint16_t*)place.scales + 16 * (g.line + j));
      QUIRE_UNROLL for (int i = 0; i < MR; ++i) add_block(g.sums + (j * MR + i) * 16, P::kScaled ? mul(acc[j][i], scale) : acc[j][i], first);
    }
    place = {place.scales + kSpanBytes<P>, place.units + kSpanBytes<P>};  // in a block are whole spans, or it is in one
    first = false;
  }
}

typedef void (*Few)(const FewPacked&);
template <class P>
struct FewRows {
  template <int MR>
  static constexpr Few of() {
    if constexpr (MR <= kFewPacked) return &few_packed<P, MR>;
    return nullptr;
  }
  static constexpr Few rows[] = {nullptr, of<1>(), of<2>(), of<3>(), of<4>(), of<5>(), of<6>(), of<7>(), of<8>()};
};

template <class P>
Plan plan_packed(const LinearArgs& g) {
  Plan p = plan_for(g, double(kBlockBytes<P>) / (kWide * kBlock), round_up(g.k, kBlock));
  p.few = g.m <= kFewPacked;
  p.panels = g.m <= 64 ? 1 : kGroupColumns / kWide;
  p.thread_floats = p.few ? g.m * kWide : (kBlock + 1 + p.most_rows * p.panels * kWide / kPanel) * kPanel;
  if (kShort<P>) p.thread_floats = round_up(p.thread_floats, 16) + (p.few ? 1 : p.panels) * panel_bytes<P>(g.k) / 4;  // where they are opened
  return p;
}

// Sums [panel, rows, width] -> y, by its dtype.
inline void finish_as(const LinearArgs& g, const float* sums, int width, int64_t m0, int rows, int64_t n0, int64_t n1) {
  if (g.dtype == kF32) return finish<Fp32>(g, sums, width, m0, rows, n0, n1);
  g.dtype == kBF16 ? finish<Bf16>(g, sums, width, m0, rows, n0, n1) : finish<Fp16>(g, sums, width, m0, rows, n0, n1);
}

template <class P>
void pack_x_as(const LinearArgs& g, int64_t m0, int rows, int first, int last, float* out) {
  if (g.dtype == kF32) return pack_x<Fp32>(g, m0, rows, first, last, out, P::kPad);
  g.dtype == kBF16 ? pack_x<WideBf16>(g, m0, rows, first, last, out, P::kPad) : pack_x<Fp16>(g, m0, rows, first, last, out, P::kPad);
}

template <class P>
void few_rows_packed(const LinearArgs& g, const float* x, float* sums, int64_t begin, int64_t end) {
  const int m = int(g.m), lines = few_lines(m);
  char* const room = (char*)(sums + round_up(g.m * kWide, 16));
  for (int64_t panel = begin; panel < end; ++panel) {
    const char* const w = opened<P>(g.w, panel, g.k, room);
    int64_t k0 = 0;
    do {
      const PartPlace place = part_at<P>(w, k0);
      FewPacked a{x + k0 / kBlock * m * kBlock, place, sums, 0, int(round_up(smaller(g.k - k0, kBlock), P::kPad)), k0 == 0, nullptr};
      for (; a.line < kLines; a.line += lines, a.sums += lines * m * 16) {
        a.ahead = place.units + (lines == kLines ? kAhead : kBlockBytes<P> + kBlockBytes<P> / kLines * a.line);
        FewRows<P>::rows[m](a);
      }
      k0 += kBlock;
    } while (k0 < g.k);
    finish_as(g, sums, 16, 0, m, panel * kWide, smaller((panel + 1) * kWide, g.n));
  }
}

// kPanel columns of one part, from 16 * line on, as cells [cells, kPanel], with their scales [kPanel].
template <class P>
void widen_part(const PartPlace& place, int line, int k, float* out, float* scales) {
  const char* w = place.units + 64 * line;
  for (int at = 0; at < k; at += P::kUnit, w += 64 * kLines, out += P::kUnit * kPanel) {
    QUIRE_UNROLL for (int j = 0; j < kTileVectors; ++j) {
      F32x16 cells[P::kUnit];
      decode<P>(P::raw(w + 64 * j), cells);
      QUIRE_UNROLL for (int c = 0; c < P::kUnit; ++c) store(out + c * kPanel + 16 * j, cells[c]);
    }
  }
  if constexpr (P::kScaled)
    for (int j = 0; j < kTileVectors; ++j) store(scales + 16 * j, load_bf16((const uint16_t*)place.scales + 16 * (line + j)));
}

// One block of k, kPanel columns of a panel. The tiles share among them the lines of what is wanted next.
template <class P>
void block_packed(const float* x, int rows, float* panel, float* sums, PartPlace place, int line, int k, bool first) {
  constexpr int kParts = kBlock / kPart<P>, kRounds = kPart<P> / 4, kShare = int(kBlockBytes<P> / 64) * kTileVectors / kLines;
  float* scales = panel + kBlock * kPanel;
  const int tiles = int(ceil_div(rows, kTileRows)), each = int(ceil_div(kShare, tiles * kParts));
  const int64_t per_round = ceil_div(each, kRounds);
  const char* ahead = place.units + kBlockBytes<P> + line / kTileVectors * kShare * 64;
  TileArgs a{x, panel, sums, 0, first, ahead, 64 * per_round, {}, P::kScaled ? scales : nullptr};
  for (int u = 0; u < 4; ++u) a.ahead_lines[u] = 64 * smaller(u, per_round - 1);
  int at = 0;
  do {
    const int here = k - at < kPart<P> ? k - at : kPart<P>;
    widen_part<P>(place, line, here, panel, scales);
    a.cells = here;
    for (int t = 0; t < tiles; ++t) {
      const int r0 = rows * t / tiles, r1 = rows * (t + 1) / tiles;
      a.x = x + r0 * kBlock + at;
      a.sums = sums + r0 * kPanel;
      Tiles<1>::rows[r1 - r0](a);
      a.ahead += 64 * each;
    }
    a.first = false;
    place = {place.scales + kSpanBytes<P>, place.units + kSpanBytes<P>};
    at += kPart<P>;
  } while (at < k);
}

template <class P>
void many_rows_packed(const LinearArgs& g, const Plan& p, const float* x, int64_t m0, int rows, float* scratch, int64_t begin, int64_t end) {
  float *panel = scratch, *sums = panel + (kBlock + 1) * kPanel;
  char* const room = (char*)(sums + round_up(p.most_rows * p.panels * kWide, 16));
  for (int64_t first = begin; first < end; first += p.panels) {
    const int64_t last = smaller(first + p.panels, end);
    const char* w[kGroupColumns / kWide];
    for (int64_t at = first; at < last; ++at) w[at - first] = opened<P>(g.w, at, g.k, room + (at - first) * panel_bytes<P>(g.k));
    int64_t k0 = 0;
    do {
      const int k = int(round_up(smaller(g.k - k0, kBlock), P::kPad));
      for (int64_t at = first; at < last; ++at) {
        const PartPlace place = part_at<P>(w[at - first], k0);
        for (int line = 0; line < kLines; line += kTileVectors)
          block_packed<P>(x + k0 / kBlock * rows * kBlock, rows, panel, sums + ((at - first) * kWide + 16 * line) * rows, place, line, k, k0 == 0);
      }
      k0 += kBlock;
    } while (k0 < g.k);
    finish_as(g, sums, kPanel, m0, rows, first * kWide, smaller(last * kWide, g.n));
  }
}

template <class P>
void part_packed(const LinearArgs& g, const Plan& p, const Member& me) {
  float* scratch = g.scratch + p.x_floats + me.id * p.thread_floats;
  const int64_t panels = ceil_div(g.n, kWide), begin = panels * me.id / me.count, end = panels * (me.id + 1) / me.count;
  if (p.few) return few_rows_packed<P>(g, g.scratch, scratch, begin, end);
  for (int64_t m0 = 0; m0 < g.m; m0 += p.rows) {
    const int rows = int(smaller(g.m - m0, p.rows));
    if (m0 > 0) me.meet();
    pack_x_as<P>(g, m0, rows, rows * me.id / me.count, rows * (me.id + 1) / me.count, g.scratch);
    me.meet();
    many_rows_packed<P>(g, p, g.scratch, m0, rows, scratch, begin, end);
  }
}

template <class P>
void run_packed(const LinearArgs& g) {
  const Plan p = plan_packed<P>(g);
  if (p.few) pack_x_as<P>(g, 0, int(g.m), 0, int(g.m), g.scratch);
  parallel(p.threads, [&](const Member& me) { part_packed<P>(g, p, me); });
}

}  // namespace product
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
