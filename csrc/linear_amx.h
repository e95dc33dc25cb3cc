// bf16 products on AMX (tiles_amx.h), for weights that are packed, of int4 codes, or as the model has them. The law:
//
//   step s of k = [32 s, 32 s + 32):  e_s, o_s = sums of x[k] * W[k, n] over its even and its odd k, ascending, from 0
//   y[m, n] = rounded((((e_0 + o_0) + (e_1 + o_1)) + ...) + bias[n]),  fp32 throughout, denormal numbers as zero, rounded once
//
// for every number of rows. A code's element is bf16(code * scale): a weight of int4 is a bf16 weight that takes less memory, and has
// the bits of the product with its own rows. int8 has a law of its own (linear_amx_int8.h).
//
// A panel of 64 columns is made of lines of pairs (packed_formats.h); a step of a line is one operand, B. Up to 16 rows of x pass a panel once;
// more of them, in pairs of tiles of 16, pass one block of k after another, which stays in the first cache; their sums wait in scratch meanwhile.
// A packed bf16 weight is read where it is, up to kStreamRows rows in longer blocks, any other decoded or transposed, operand by operand. The last
// sums of two tiles times two lines are rounded and written to y between the multiplications of the next: vectors work while tiles do.
//
//            B 6  B 7            x is copied to tiles: [tile of rows][step][rows of the tile][64 bytes]
//      A 4 | C 0  C 1
//      A 5 | C 2  C 3            while they pass, what will be read next is asked for, evenly
#pragma once
#include "linear_panels.h"
#include "linear_amx_weights.h"

#if defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace product {

constexpr int kBlockSteps = 8, kRowsAStep = 32 / kBlockSteps, kStreamRows = 64, kStreamSteps = 64, kBlockScratch = kBlockSteps * kStepBytes;

// Rows first..last-1 of x, from row m0 on, to tiles; what is missing from a last tile is zero.
inline void tiles_of_x(const LinearArgs& g, const TilePlan& p, int64_t m0, int first, int last, char* out) {
  const int64_t steps = steps_of(g.k);
  for (int r = first; r < last; ++r) {
    char* to = out + (r / p.tile_rows * steps * p.tile_rows + r % p.tile_rows) * 64;
    const auto* x = (const uint16_t*)g.x + (m0 + r) * g.x_stride;
    for (int64_t s = 0; s < steps; ++s, to += p.tile_rows * 64) {
      const int64_t left = m0 + r < g.m ? g.k - s * kTileK : 0;
      store_u32((uint32_t*)to, left >= kTileK ? load_pairs(x + s * kTileK) : left > 0 ? load_pairs_n(x + s * kTileK, int(left)) : set1_u32(0));
    }
  }
}

// Sums of a unit, rows of two lines of columns, on their way to y.
struct Waiting {
  const char* sums;
  uint16_t* y;
  const uint16_t* bias;  // or null
  int64_t y_stride;
  int at, rows;  // rows at..rows-1 are yet to be written
};

// Writes up to `count` rows.
QUIRE_INLINE void write_waiting(Waiting& u, int count) {
  for (const int end = int(smaller(u.at + count, u.rows)); u.at < end; ++u.at) {
    const auto* const sums = (const float*)(u.sums + u.at / 16 * 2 * kTileBytes + u.at % 16 * 64);
    F32x16 low = load(sums), high = load(sums + kTileBytes / 4);
    if (u.bias) {
      low = add(low, load_bf16(u.bias));
      high = add(high, load_bf16(u.bias + 16));
    }
    _mm512_storeu_si512(u.y + u.at * u.y_stride, (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v));
  }
}

// Adds `steps` steps of MT tiles of rows times NT lines of columns to C 0..3. Operands of a line lie kTileBytes apart and their rows together,
// or, kStreamed, as they are packed. Meanwhile `waiting` is written, where two tiles of rows leave time for it.
template <int MT, int NT, bool kStreamed>
QUIRE_INLINE void tile_steps(const char* x, int64_t next_tile, int64_t x_step, const char* lines, int64_t steps, Ahead& ahead, Waiting& waiting) {
  constexpr int kB = MT == 2 ? 6 : 5, kLine = kStreamed ? 64 : kTileBytes, kStride = kStreamed ? kInterleaved : 64;
  for (int64_t s = 0; s < steps; ++s, x += x_step, lines += kStepBytes) {
    if constexpr (MT == 2) {
      tile_load_once<4>(x, 64);
      tile_load_once<5>(x + next_tile, 64);
    } else {
      tile_load<4>(x, 64);
    }
    ask(ahead);
    tile_load<kB>(lines, kStride);
    tile_dot<0, 4, kB>();
    if constexpr (MT == 2) tile_dot<2, 5, kB>();
    ask(ahead);
    tile_load<kB + 1>(lines + kLine, kStride);
    tile_dot<1, 4, kB + 1>();
    if constexpr (MT == 2) {
      tile_dot<3, 5, kB + 1>();
      write_waiting(waiting, kRowsAStep);
    }
    if constexpr (NT == 4) {
      ask(ahead);
      tile_load<7>(lines + 2 * kLine, kStride);
      tile_dot<2, 4, 7>();
      ask(ahead);
      tile_load<5>(lines + 3 * kLine, kStride);
      tile_dot<3, 4, 5>();
    }
  }
}

// Sums of tiles, NT of columns for each of rows, to rows m.. of y, columns n.. of it.
template <int NT>
QUIRE_INLINE void tiles_to_y(const LinearArgs& g, const char* sums, int64_t m, int rows, int64_t n) {
  sums_to_y(g, m, rows, n, NT, [&](int r, int j) { return (const float*)(sums + (r / 16 * NT + j) * kTileBytes + r % 16 * 64); });
}

// A panel for up to 16 rows of x: its lines where they are, or a block after the other.
template <class W>
void few_tiles(const LinearArgs& g, const TilePlan& p, const char* x, int64_t panel, char* block) {
  const int64_t steps = steps_of(g.k), x_step = p.tile_rows * 64;
  char* const sums = block + kBlockScratch;
  Waiting none{};
  zero_sums();
  if constexpr (W::kStreams) {
    const char* lines = W::at(g, panel, 0);
    Ahead ahead{lines + 4 * kAhead, kStepBytes / kLines};
    tile_steps<1, 4, true>(x, 0, x_step, lines, steps, ahead, none);
  } else {
    Ahead nothing{};
    for (int64_t s = 0; s < steps; s += kBlock / kTileK) {
      const int here = int(smaller(steps - s, kBlock / kTileK));
      W::block(g, panel, s * kTileK, here, block);
      tile_steps<1, 4, false>(x + s * x_step, 0, x_step, block, here, nothing, none);
    }
  }
  store_sums(sums);
  tiles_to_y<4>(g, sums, 0, p.tile_rows, panel * kWide);
}

// Steps s..s+here-1 of a panel for `count` tiles of 16 rows of x, from row m0 of y on; `lines` are of step s.
template <bool kStreamed>
void many_steps(const LinearArgs& g, const char* x, int64_t m0, int count, int64_t panel, const char* lines, int64_t s, int64_t here, Ahead ahead,
                char* sums) {
  const int64_t steps = steps_of(g.k), x_tile = steps * kTileBytes;
  const bool ends = s + here == steps;
  Waiting waiting{};
  x += s * kTileBytes;
  for (int t = 0; t < count; t += 2) {
    const int rows = int(smaller(g.m - m0 - 16 * t, t + 1 < count ? 32 : 16));
    if (t + 1 < count) {
      for (int half = 0; half < 2; ++half, sums += 4 * kTileBytes) {
        s == 0 ? zero_sums() : load_sums(sums);
        tile_steps<2, 2, kStreamed>(x + t * x_tile, x_tile, kTileBytes, lines + half * 2 * (kStreamed ? 64 : kTileBytes), here, ahead, waiting);
        store_sums(sums);
        if (!ends) continue;
        write_waiting(waiting, 32);
        const int64_t m = m0 + 16 * t, n = panel * kWide + 32 * half;
        if (n + 32 > g.n)
          tiles_to_y<2>(g, sums, m, rows, n);
        else
          waiting = {sums, (uint16_t*)g.y + m * g.n + n, g.bias ? (const uint16_t*)g.bias + n : nullptr, g.n, 0, rows};
      }
    } else {
      s == 0 ? zero_sums() : load_sums(sums);
      tile_steps<1, 4, kStreamed>(x + t * x_tile, 0, kTileBytes, lines, here, ahead, waiting);
      store_sums(sums);
      if (ends) tiles_to_y<4>(g, sums, m0 + 16 * t, rows, panel * kWide);
    }
  }
  write_waiting(waiting, 32);
}

template <class W>
void many_tiles(const LinearArgs& g, const char* x, int64_t m0, int count, int64_t panel, bool last, char* block) {
  const int64_t steps = steps_of(g.k), parts = ceil_div(steps, kStreamSteps);
  const int64_t each = W::kStreams && 16 * count <= kStreamRows && steps ? ceil_div(steps, parts) : kBlockSteps;
  char* const sums = block + kBlockScratch;
  int64_t s = 0;
  do {  // once where there is no k
    const int here = int(smaller(steps - s, each));
    const char* const lines = W::kStreams ? W::at(g, panel, s * kTileK) : block;
    if constexpr (!W::kStreams) W::block(g, panel, s * kTileK, here, block);
    // What comes next is shared among the passes of what is here; behind the last panel nothing is ours.
    const int64_t bytes = last || here == 0 ? 0 : W::bytes(g) * here / steps;
    const Ahead ahead{W::at(g, panel, s * kTileK) + bytes, part_ahead(bytes, here, count)};
    many_steps<W::kStreams>(g, x, m0, count, panel, lines, s, here, ahead, sums);
    s += here;
  } while (s < steps);
}

// The product of bf16 x with a weight that gives its operands as W does (linear_amx_weights.h).
template <class W>
struct BrainProduct {
  static TilePlan plan(const LinearArgs& g) { return tile_plan(g, 0.15, steps_of(g.k) * 64, kBlockScratch, W::kStreams); }
  static TileShapes shapes(const TilePlan& p) { return TileShapes(p.tile_rows, 0x1f); }  // all of C and A
  static void place(const LinearArgs& g, const TilePlan& p, int64_t m0, int first, int last, char* x) { tiles_of_x(g, p, m0, first, last, x); }
  static void pass(const LinearArgs& g, const TilePlan& p, const char* x, int64_t m, int count, int64_t panel, bool last, char* own) {
    g.m <= kFewTileRows ? few_tiles<W>(g, p, x, panel, own) : many_tiles<W>(g, x, m, count, panel, last, own);
  }
};

}  // namespace product
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
