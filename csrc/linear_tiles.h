// The inner loops of the matrix products: how elements become cells, packing, register tiles. The law they keep is in linear.h.
#pragma once
#include "simd.h"

#if defined(QUIRE_PLAIN)
#define QUIRE_UNROLL_LANES  // 16 vectors of 16 lanes are too many for any register file there
#else
#define QUIRE_UNROLL_LANES QUIRE_UNROLL
#endif

namespace quire {
namespace QUIRE_ISA {
namespace {
namespace product {

constexpr int kBlock = 128;  // k in one block of the law
constexpr int kPiece = 16;   // rows of W [K, N] that few rows of x take at once

// A format says how elements become cells: a cell is what one multiply-add takes from x and from W, an fp32 number, or a
// pair of bf16 where the CPU multiplies pairs. Either travels as a float. `raw` loads kPerLoad elements along k; `split`
// turns 16 raws, transposed, into kSplit vectors of cells, k ascending. `across` takes one cell each of 16 columns of
// W [K, N], from one row or a pair of rows.
struct Fp32 {
  using Elem = float;
  static constexpr int kPerCell = 1, kPerLoad = 16, kSplit = 1;
  QUIRE_INLINE F32x16 raw(const Elem* p) { return load(p); }
  QUIRE_INLINE F32x16 raw_n(const Elem* p, int n) { return load_n(p, n); }
  QUIRE_INLINE void split(F32x16 raws, F32x16* cells) { cells[0] = raws; }
  QUIRE_INLINE F32x16 widen(const Elem* p) { return load(p); }
  QUIRE_INLINE F32x16 widen_n(const Elem* p, int n) { return load_n(p, n); }
  QUIRE_INLINE void narrow(Elem* p, F32x16 v) { store(p, v); }
  QUIRE_INLINE void narrow_n(Elem* p, F32x16 v, int n) { store_n(p, v, n); }
};

struct Fp16 {
  using Elem = uint16_t;
  static constexpr int kPerCell = 1, kPerLoad = 16, kSplit = 1;
  QUIRE_INLINE F32x16 raw(const Elem* p) { return load_f16(p); }
  QUIRE_INLINE F32x16 raw_n(const Elem* p, int n) { return load_f16_n(p, n); }
  QUIRE_INLINE void split(F32x16 raws, F32x16* cells) { cells[0] = raws; }
  QUIRE_INLINE F32x16 widen(const Elem* p) { return load_f16(p); }
  QUIRE_INLINE F32x16 widen_n(const Elem* p, int n) { return load_f16_n(p, n); }
  QUIRE_INLINE void narrow(Elem* p, F32x16 v) { store_f16(p, v); }
  QUIRE_INLINE void narrow_n(Elem* p, F32x16 v, int n) { store_f16_n(p, v, n); }
};

struct WideBf16 {
  using Elem = uint16_t;
  static constexpr int kPerCell = 1, kPerLoad = 32, kSplit = 2;
  QUIRE_INLINE F32x16 raw(const Elem* p) { return floats(load_u32((const uint32_t*)p)); }
  QUIRE_INLINE F32x16 raw_n(const Elem* p, int n) { return floats(load_pairs_n(p, n)); }
  QUIRE_INLINE void split(F32x16 raws, F32x16* cells) {
    cells[0] = pair_low(bits(raws));
    cells[1] = pair_high(bits(raws));
  }
  QUIRE_INLINE F32x16 widen(const Elem* p) { return load_bf16(p); }
  QUIRE_INLINE F32x16 widen_n(const Elem* p, int n) { return load_bf16_n(p, n); }
  QUIRE_INLINE void narrow(Elem* p, F32x16 v) { store_bf16(p, v); }
  QUIRE_INLINE void narrow_n(Elem* p, F32x16 v, int n) { store_bf16_n(p, v, n); }
};

#if defined(QUIRE_BF16_DOT)
struct Bf16 : WideBf16 {
  static constexpr int kPerCell = 2, kSplit = 1;
  QUIRE_INLINE void split(F32x16 raws, F32x16* cells) { cells[0] = raws; }
};
#else
using Bf16 = WideBf16;
#endif

template <int kPerCell>
QUIRE_INLINE F32x16 madd(F32x16 x, F32x16 w, F32x16 acc) {
  if constexpr (kPerCell == 2) return dot_pair(acc, bits(x), bits(w));
  return fma(x, w, acc);
}

constexpr int cells_in_block(int per_cell) { return kBlock / per_cell; }
template <class F>
constexpr int kCells = cells_in_block(F::kPerCell);

template <class F>
QUIRE_INLINE F32x16 raw_upto(const typename F::Elem* p, int64_t n) {
  if (n >= F::kPerLoad) return F::raw(p);
  return n > 0 ? F::raw_n(p, int(n)) : zero();
}
template <class F>
QUIRE_INLINE F32x16 widen_upto(const typename F::Elem* p, int64_t n) {
  if (n >= 16) return F::widen(p);
  return n > 0 ? F::widen_n(p, int(n)) : zero();
}
template <class F>
QUIRE_INLINE F32x16 across(const typename F::Elem* p, int64_t stride, int rows, int n) {
  const F32x16 first = widen_upto<F>(p, n);
  if constexpr (F::kPerCell == 1) return first;
  const U32x16 second = rows > 1 ? bits(widen_upto<F>(p + stride, n)) : set1_u32(0);
  return floats(or_(shr<16>(bits(first)), second));
}

// Cells of one row of x, to `cells` whole loads of them, zeros past k.
template <class F>
void cells_of_row(const typename F::Elem* x, int64_t k, float* out, int cells) {
  for (int c = 0; c < cells; c += 16) {
    const int64_t at = int64_t(c) * F::kPerCell;
    store(out + c, F::kPerCell == 2 ? raw_upto<F>(x + at, k - at) : widen_upto<F>(x + at, k - at));
  }
}

// One load from each of 16 rows of W [N, K], transposed: r[i] holds the i-th lanes, one row a lane.
template <class F>
QUIRE_INLINE void load_transposed(F32x16 (&r)[16], const typename F::Elem* w, int64_t stride, int rows, int k) {
  if (rows == 16 && k >= F::kPerLoad) {
    QUIRE_UNROLL_LANES for (int i = 0; i < 16; ++i) r[i] = F::raw(w + i * stride);
  } else {
    for (int i = 0; i < 16; ++i) r[i] = i < rows ? raw_upto<F>(w + i * stride, k) : zero();
  }
  transpose16(r);
}

// One block of k, MR rows of x against 16 columns of y or fewer.
template <class Elem>
struct FewArgs {
  const float* x;  // cells of each row, kCells apart
  const Elem *w, *ahead;  // and what will be wanted next, for the cache
  int64_t stride;
  float* sums;  // [rows, 16], for each group of 16 columns
  int k, columns;
  bool first;  // the first block of k
};

// Sums of a block of k to those of the blocks before.
QUIRE_INLINE void add_block(float* sums, F32x16 block, bool first) { store(sums, first ? block : add(load(sums), block)); }

// W [N, K]: 16 of its rows are transposed in registers, so that lanes are columns of y as everywhere.
template <class F, int MR>
void few_nk(const FewArgs<typename F::Elem>& g) {
  alignas(64) float block[MR * 16];
  QUIRE_UNROLL for (int i = 0; i < MR; ++i) store(block + 16 * i, zero());
  const float* x = g.x;
  for (int at = 0; at < g.k; at += F::kPerLoad) {
    F32x16 r[16], acc[MR];
    QUIRE_UNROLL_LANES for (int i = 0; i < 16; ++i) __builtin_prefetch(g.ahead + i * g.stride + at, 0, 2);
    load_transposed<F>(r, g.w + at, g.stride, g.columns, g.k - at);
    QUIRE_UNROLL for (int i = 0; i < MR; ++i) acc[i] = load(block + 16 * i);
    QUIRE_UNROLL_LANES for (int j = 0; j < 16; ++j) {
      F32x16 cells[F::kSplit];
      F::split(r[j], cells);
      QUIRE_UNROLL for (int s = 0; s < F::kSplit; ++s)
        QUIRE_UNROLL for (int i = 0; i < MR; ++i) acc[i] = madd<F::kPerCell>(set1(x[i * kCells<F> + j * F::kSplit + s]), cells[s], acc[i]);
    }
    QUIRE_UNROLL for (int i = 0; i < MR; ++i) store(block + 16 * i, acc[i]);
    x += 16 * F::kSplit;
  }
  QUIRE_UNROLL for (int i = 0; i < MR; ++i) add_block(g.sums + 16 * i, load(block + 16 * i), g.first);
}

// W [K, N], NV groups of 16 columns (g.columns of them when NV is 1), a piece of a block.
template <class F, int MR, int NV>
void few_kn(const FewArgs<typename F::Elem>& g, float* block, bool begins, bool ends) {
  F32x16 acc[NV][MR];
  QUIRE_UNROLL for (int j = 0; j < NV; ++j)
    QUIRE_UNROLL for (int i = 0; i < MR; ++i) acc[j][i] = begins ? zero() : load(block + (j * MR + i) * 16);
  const float* x = g.x;
  for (int k = 0; k < g.k; k += F::kPerCell, ++x) {
    QUIRE_UNROLL for (int j = 0; j < NV; ++j) {
      const int64_t at = k * g.stride + 16 * j;
      __builtin_prefetch(g.ahead + at, 0, 2);
      const F32x16 cells = across<F>(g.w + at, g.stride, g.k - k, NV == 1 ? g.columns : 16);
      QUIRE_UNROLL for (int i = 0; i < MR; ++i) acc[j][i] = madd<F::kPerCell>(set1(x[i * kCells<F>]), cells, acc[j][i]);
    }
  }
  // Other ways to the same sum go on with zeros to a whole load, which turns -0 into 0.
  if (g.k % F::kPerLoad)
    QUIRE_UNROLL for (int j = 0; j < NV; ++j)
      QUIRE_UNROLL for (int i = 0; i < MR; ++i) acc[j][i] = madd<F::kPerCell>(zero(), zero(), acc[j][i]);
  QUIRE_UNROLL for (int j = 0; j < NV; ++j)
    QUIRE_UNROLL for (int i = 0; i < MR; ++i) {
      const int at = (j * MR + i) * 16;
      if (ends) {
        add_block(g.sums + at, acc[j][i], g.first);
      } else {
        store(block + at, acc[j][i]);
      }
    }
}

// 16 columns of y: their weights in one block of k, as cells [cells, width] of fp32.
template <class F>
void pack_nk(const typename F::Elem* w, int64_t stride, int columns, int k, float* out, int width) {
  for (int at = 0; at < k; at += F::kPerLoad) {
    F32x16 r[16];
    load_transposed<F>(r, w + at, stride, columns, k - at);
    QUIRE_UNROLL_LANES for (int j = 0; j < 16; ++j) {
      F32x16 cells[F::kSplit];
      F::split(r[j], cells);
      QUIRE_UNROLL for (int s = 0; s < F::kSplit; ++s) store(out + (j * F::kSplit + s) * width, cells[s]);
    }
    out += 16 * F::kSplit * width;
  }
}
template <class F>
void pack_kn(const typename F::Elem* w, int64_t stride, int columns, int k, float* out, int width) {
  for (int at = 0; at < k; at += F::kPerCell, out += width) store(out, across<F>(w + at * stride, stride, k - at, columns));
  for (int at = (k + F::kPerCell - 1) / F::kPerCell; at % (F::kPerLoad / F::kPerCell); ++at, out += width) store(out, zero());
}

struct TileArgs {
  const float *x, *w;  // cells: of each row, a block apart; of a panel
  float* sums;         // [rows, width]
  int cells;
  bool first;
  const char* ahead;  // weights that will be wanted next, for the cache: four lines every four cells
  int64_t ahead_next, ahead_lines[4];
  const float* scales;  // [width], what these cells' sums are multiplied by before they are added; or null
};

template <int kPerCell, int MR, int NV>
QUIRE_INLINE void tile_step(F32x16 (&acc)[MR][NV], const float* x, const float* w) {
  F32x16 cells[NV];
  QUIRE_UNROLL for (int j = 0; j < NV; ++j) cells[j] = load(w + 16 * j);
  QUIRE_UNROLL for (int i = 0; i < MR; ++i) {
    const F32x16 xi = set1(x[i * cells_in_block(kPerCell)]);
    QUIRE_UNROLL for (int j = 0; j < NV; ++j) acc[i][j] = madd<kPerCell>(xi, cells[j], acc[i][j]);
  }
}

template <int kPerCell, int MR, int NV>
void tile(const TileArgs& g) {
  F32x16 acc[MR][NV];
  QUIRE_UNROLL for (int i = 0; i < MR; ++i)
    QUIRE_UNROLL for (int j = 0; j < NV; ++j) acc[i][j] = zero();
  const float *x = g.x, *w = g.w;
  const char* ahead = g.ahead;
  const int64_t ahead_next = g.ahead_next, ahead_lines[4] = {g.ahead_lines[0], g.ahead_lines[1], g.ahead_lines[2], g.ahead_lines[3]};
  for (int c = g.cells; c > 0; c -= 4) {  // cells come in whole loads, 16 at the least
    QUIRE_UNROLL for (int u = 0; u < 4; ++u) {
      __builtin_prefetch(ahead + ahead_lines[u], 0, 2);
      tile_step<kPerCell, MR, NV>(acc, x + u, w + u * 16 * NV);
    }
    x += 4;
    w += 4 * 16 * NV;
    ahead += ahead_next;
  }
  QUIRE_UNROLL for (int i = 0; i < MR; ++i)
    QUIRE_UNROLL for (int j = 0; j < NV; ++j)
      add_block(g.sums + (i * NV + j) * 16, g.scales ? mul(acc[i][j], load(g.scales + 16 * j)) : acc[i][j], g.first);
}

}  // namespace product
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
