// Products of bf16 rows with packed weights by the CPU's dot products of 32-bit cells: two of bf16 (VDPBF16PS), or four bytes (VPDPBUSD of AVX512-VNNI).
//
//   cell    what a row of x and a column of the weight have for one step of k: 2 of bf16, 4 codes
//   block   64 steps, after which sums are added to those before: 128 of bf16, a span of 256 codes. Both are 16 KB of a panel
//
//   x       [tile of up to 16 rows][block][row][64 cells]         weight, a panel   [block][step][64 columns]
//
//              w 0   w 1   w 2   w 3     16 columns each
//       x 0    sum   sum   sum   sum
//       ...                              up to 6 rows: 24 sums, 4 of weights and one of x in 32 registers
//
// int4 codes are decoded to bf16, code * scale rounded, a block at a time: a weight of int4 is a bf16 weight that takes less memory, and has the bits of
// the product with its own rows.
//
// The laws are those of linear_packed.h for bf16 and of linear_codes.h for int8, bit for bit: an output is one lane of one sum, so neither depends
// on how many rows there are. VPDPBUSD takes unsigned bytes times signed ones, so codes of weights are packed with 128 added to them, and a sum
// begins with what that is too much: -128 times the sum of its row's codes.
#pragma once
#include "linear_codes.h"
#include "linear_panels.h"

#if defined(QUIRE_BF16_DOT) && !defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace product {

constexpr int kDotRows = 6, kBlockSteps = 64, kCellBytes = 4, kXBlock = kBlockSteps * kCellBytes, kStepsAtOnce = 4;
constexpr int kStepBytes = kCellBytes * kWide;  // of a panel

// Of a block: up to kDotRows rows of x, from the first one on, and a panel.
struct DotArgs {
  const char *x, *w;
  float* sums;  // [row][64]
  int steps;    // a multiple of kStepsAtOnce
  bool first;
  const uint16_t* scales;  // of columns, bf16
  const float* x_scales;   // of rows
  const int32_t* begin;    // what the sums of rows begin with
};

struct PairDots {
  using Format = PackedBf16;
  using Sum = F32x16;
  static constexpr int kCellK = 2, kExtra = 0;  // k of a cell; bytes of a row in a block, behind its cells
  static constexpr bool kDecodes = false;
  QUIRE_INLINE Sum begin(const DotArgs&, int) { return zero(); }
  QUIRE_INLINE Sum dot(Sum sum, U32x16 x, U32x16 w) { return dot_pair(sum, x, w); }
  template <int R, bool kFirst>
  QUIRE_INLINE void add_to(const DotArgs& a, Sum (&sum)[R][kLines]) {
    QUIRE_UNROLL for (int r = 0; r < R; ++r)
      QUIRE_UNROLL for (int j = 0; j < kLines; ++j) add_block(a.sums + r * kWide + 16 * j, sum[r][j], kFirst);
  }
  // A row's k elements as cells.
  QUIRE_INLINE void place(const uint16_t* x, int k, char* cells, float*, int32_t*) {
    for (int i = 0; i < k; i += 32) store_u32((uint32_t*)(cells + 2 * i), k - i >= 32 ? load_pairs(x + i) : load_pairs_n(x + i, k - i));
  }
};

struct DecodedDots : PairDots {
  using Format = PackedInt4;
  static constexpr bool kDecodes = true;
  // A block of a panel, `steps` of it, to cells.
  static void decode(const char* span, int steps, char* to) {
    for (; steps > 0; span += kSpanBytes<Format>) {
      F32x16 scales[kLines];
      QUIRE_UNROLL for (int j = 0; j < kLines; ++j) scales[j] = load_bf16((const uint16_t*)span + 16 * j);
      const char* w = span + kScaleBytes<Format>;
      for (int k = 0; k < Format::kSpan && steps > 0; k += Format::kUnit, steps -= Format::kUnit / 2, to += Format::kUnit / 2 * kStepBytes) {
        QUIRE_UNROLL for (int j = 0; j < kLines; ++j, w += 64) {
          F32x16 cells[Format::kUnit];
          quire::QUIRE_ISA::product::decode<Format>(Format::raw(w), cells);
          QUIRE_UNROLL for (int i = 0; i < Format::kUnit; i += 2)
            store_u32((uint32_t*)(to + i / 2 * kStepBytes + 64 * j), brain_pairs(mul(cells[i], scales[j]), mul(cells[i + 1], scales[j])));
        }
      }
    }
  }
};

struct ByteDots {
  using Format = PackedInt8;
  using Sum = U32x16;
  static constexpr int kCellK = 4, kExtra = sizeof(float) + sizeof(int32_t);
  static constexpr bool kDecodes = false;
  QUIRE_INLINE Sum begin(const DotArgs& a, int r) { return set1_u32(uint32_t(a.begin[r])); }
  QUIRE_INLINE Sum dot(Sum sum, U32x16 x, U32x16 w) {  // written out: GCC 12 keeps sums of its intrinsic in memory between steps
    asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(w.v), "v"(x.v));
    return sum;
  }
  template <int R, bool kFirst>
  QUIRE_INLINE void add_to(const DotArgs& a, Sum (&sum)[R][kLines]) {
    QUIRE_UNROLL for (int j = 0; j < kLines; ++j) {
      const F32x16 scale = load_bf16(a.scales + 16 * j);
      QUIRE_UNROLL for (int r = 0; r < R; ++r) {
        float* const to = a.sums + r * kWide + 16 * j;
        store(to, fma(to_f32(sum[r][j]), mul(scale, set1(a.x_scales[r])), kFirst ? zero() : load(to)));
      }
    }
  }
  QUIRE_INLINE void place(const uint16_t* x, int k, char* cells, float* scale, int32_t* begin) {
    *scale = one_byte(x, k, cells, 64);
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < k; i += 64) sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(cells + i));
    *begin = -128 * _mm512_reduce_add_epi32(sum);
  }
};

template <class P, int R>
void dots(const DotArgs& a, Ahead& asked) {
  typename P::Sum sum[R][kLines];
  QUIRE_UNROLL for (int r = 0; r < R; ++r)
    QUIRE_UNROLL for (int j = 0; j < kLines; ++j) sum[r][j] = P::begin(a, r);
  const char *x = a.x, *w = a.w;
  Ahead ahead = asked;
  for (int s = a.steps; s > 0; s -= kStepsAtOnce) {
    ask(ahead);
    QUIRE_UNROLL for (int u = 0; u < kStepsAtOnce; ++u) {
      U32x16 cells[kLines];
      QUIRE_UNROLL for (int j = 0; j < kLines; ++j) cells[j] = load_u32((const uint32_t*)(w + u * kStepBytes + 64 * j));
      QUIRE_UNROLL for (int r = 0; r < R; ++r) {
        uint32_t cell;
        memcpy(&cell, x + r * kXBlock + u * kCellBytes, sizeof(cell));
        QUIRE_UNROLL for (int j = 0; j < kLines; ++j) sum[r][j] = P::dot(sum[r][j], set1_u32(cell), cells[j]);
      }
    }
    x += kStepsAtOnce * kCellBytes;
    w += kStepsAtOnce * kStepBytes;
  }
  asked = ahead;
  a.first ? P::template add_to<R, true>(a, sum) : P::template add_to<R, false>(a, sum);
}

template <class P>
struct DotProduct {
  using Format = typename P::Format;
  static constexpr int kBlockK = kBlockSteps * P::kCellK, kScratch = P::kDecodes ? kBlockSteps * kStepBytes : 0;
  static constexpr int64_t kBytes = kBlockK / Format::kSpan * kSpanBytes<Format>;  // of a block of a panel
  static_assert(kBlockK % Format::kSpan == 0 && Format::kPad % (P::kCellK * kStepsAtOnce) == 0);
  typedef void (*Dots)(const DotArgs&, Ahead&);
  static constexpr Dots rows[] = {nullptr, &dots<P, 1>, &dots<P, 2>, &dots<P, 3>, &dots<P, 4>, &dots<P, 5>, &dots<P, 6>};

  static int64_t blocks(const LinearArgs& g) { return ceil_div(g.k, kBlockK); }
  static TilePlan plan(const LinearArgs& g) { return tile_plan(g, P::kCellK == 2 ? 0.1 : 0.05, blocks(g) * (kXBlock + P::kExtra), kScratch, true); }
  static int shapes(const TilePlan&) { return 0; }

  // Behind the cells of a tile: of each block the scales of its rows, and then what their sums begin with.
  static float* scales(const TilePlan& p, const LinearArgs& g, char* tile, int64_t block) {
    return (float*)(tile + blocks(g) * p.tile_rows * kXBlock) + block * 2 * p.tile_rows;
  }

  static void place(const LinearArgs& g, const TilePlan& p, int64_t m0, int first, int last, char* x) {
    for (int r = first; r < last && m0 + r < g.m; ++r) {
      char* const tile = x + r / p.tile_rows * p.tile_bytes;
      const int row = r % p.tile_rows;
      const auto* from = (const uint16_t*)g.x + (m0 + r) * g.x_stride;
      for (int64_t block = 0; block < blocks(g); ++block, from += kBlockK) {
        float* const scale = scales(p, g, tile, block) + row;
        P::place(from, int(smaller(g.k - block * kBlockK, kBlockK)), tile + (block * p.tile_rows + row) * kXBlock, scale, (int32_t*)scale + p.tile_rows);
      }
    }
  }

  static void pass(const LinearArgs& g, const TilePlan& p, const char* x, int64_t m, int count, int64_t panel, bool, char* own) {
    const int rows_of_all = int(smaller(g.m - m, int64_t(count) * p.tile_rows));
    // The CPU follows one walk through a panel by itself; with more than one it must be asked for the next block before it is wanted.
    const int64_t walks = ceil_div(p.tile_rows, kDotRows) * count, each = walks > 1 ? round_up(ceil_div(kBytes, walks * kBlockSteps / kStepsAtOnce), 64) : 0;
    auto* const sums = (float*)(own + kScratch);
    const char* w = (const char*)g.w + panel * panel_bytes<Format>(g.k);
    for (int64_t block = 0; block < blocks(g); ++block, w += kBytes) {
      const int steps = int(round_up(smaller(g.k - block * kBlockK, kBlockK), Format::kPad)) / P::kCellK;
      const char* cells = w + kScaleBytes<Format>;
      if constexpr (P::kDecodes) {
        P::decode(w, steps, own);
        cells = own;
      }
      Ahead ahead{w + kBytes, each};
      for (int t = 0; t < count; ++t) {
        const char* const tile = x + t * p.tile_bytes;
        const int first = t * p.tile_rows, rows_here = int(smaller(rows_of_all - first, p.tile_rows)), groups = int(ceil_div(rows_here, kDotRows));
        for (int i = 0; i < groups; ++i) {
          const int r0 = rows_here * i / groups, r1 = rows_here * (i + 1) / groups;
          const float* const scale = scales(p, g, (char*)tile, block) + r0;
          const DotArgs a{tile + (block * p.tile_rows + r0) * kXBlock, cells, sums + (first + r0) * kWide, steps, block == 0,
                          (const uint16_t*)w, scale, (const int32_t*)scale + p.tile_rows};
          rows[r1 - r0](a, ahead);
        }
      }
    }
    sums_to_y(g, m, rows_of_all, panel * kWide, kLines, [&](int r, int line) { return sums + r * kWide + 16 * line; });
  }
};

}  // namespace product
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
