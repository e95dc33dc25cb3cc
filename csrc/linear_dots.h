// Products of bf16 rows with packed weights by the CPU's dot products of 32-bit cells: two of bf16 (VDPBF16PS), or four bytes (VPDPBUSD of AVX512-VNNI).
// How int4 codes are multiplied is told in linear_nibbles.h; placing x and passing panels is the same.
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
// The laws are those of linear_packed.h for bf16 and of linear_codes.h for int8, bit for bit: an output is one lane of one sum, so neither depends
// on how many rows there are. VPDPBUSD takes unsigned bytes times signed ones, so codes of weights are packed with 128 added to them, and a sum
// begins with what that is too much: -128 times the sum of its row's codes.
#pragma once
#include "linear_codes.h"
#include "linear_panels.h"

#if defined(QUIRE_VECTOR_DOTS)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace product {

constexpr int kDotRows = 6, kBlockSteps = 64, kCellBytes = 4, kXBlock = kBlockSteps * kCellBytes, kStepsAtOnce = 4;
constexpr int kStepBytes = kCellBytes * kWide;  // of a panel

// Of a block: up to kDotRows rows of x, from the first one on, and a panel.
struct DotArgs {
  const char *x, *w;   // cells of x; the panel's part, scales and all
  float* sums;         // [row][64]
  int steps;           // a multiple of kStepsAtOnce
  bool first;
  const float* extra;  // what a format has beside the cells: [of its own, `next` apart][row]
  int next;
};

// The sums of a block in registers, a row's cell with four lines at a time.
template <class P, int R>
void dots_in_registers(const DotArgs&, Ahead&);

struct PairDots {
  using Format = PackedBf16;
  using Sum = F32x16;
  static constexpr int kCellK = 2, kExtra = 0, kAsks = kBlockSteps / kStepsAtOnce;  // k of a cell; bytes of a row beside a block's cells; how often a block asks ahead
  static constexpr double kReadNs = 0.1;
  static int walks(int rows) { return int(ceil_div(rows, kDotRows)); }
  QUIRE_INLINE Sum begin(const DotArgs&, int) { return zero(); }
  QUIRE_INLINE Sum dot(Sum sum, U32x16 x, U32x16 w) { return dot_pair(sum, x, w); }
  template <int R, bool kFirst>
  QUIRE_INLINE void add_to(const DotArgs& a, Sum (&sum)[R][kLines]) {
    QUIRE_UNROLL for (int r = 0; r < R; ++r)
      QUIRE_UNROLL for (int j = 0; j < kLines; ++j) add_block(a.sums + r * kWide + 16 * j, sum[r][j], kFirst);
  }
  // A row's k elements as cells.
  QUIRE_INLINE void place(const uint16_t* x, int k, char* cells, float*, int) {
    for (int i = 0; i < k; i += 32) store_u32((uint32_t*)(cells + 2 * i), load_pairs_upto(x + i, k - i));
  }
  template <int R>
  static void dots(const DotArgs& a, Ahead& asked) { dots_in_registers<PairDots, R>(a, asked); }
};

struct ByteDots {
  using Format = PackedInt8;
  using Sum = U32x16;
  static constexpr int kCellK = 4, kExtra = sizeof(float) + sizeof(int32_t), kAsks = kBlockSteps / kStepsAtOnce;
  static constexpr double kReadNs = 0.05;
  static int walks(int rows) { return int(ceil_div(rows, kDotRows)); }
  QUIRE_INLINE Sum begin(const DotArgs& a, int r) { return set1_u32(((const uint32_t*)a.extra)[a.next + r]); }
  QUIRE_INLINE Sum dot(Sum sum, U32x16 x, U32x16 w) { return dot_bytes(sum, w, x); }
  template <int R, bool kFirst>
  QUIRE_INLINE void add_to(const DotArgs& a, Sum (&sum)[R][kLines]) {
    QUIRE_UNROLL for (int j = 0; j < kLines; ++j) {
      const F32x16 scale = load_bf16((const uint16_t*)a.w + 16 * j);
      QUIRE_UNROLL for (int r = 0; r < R; ++r) {
        float* const to = a.sums + r * kWide + 16 * j;
        store(to, fma(to_f32(sum[r][j]), mul(scale, set1(a.extra[r])), kFirst ? zero() : load(to)));
      }
    }
  }
  QUIRE_INLINE void place(const uint16_t* x, int k, char* cells, float* extra, int next) {
    *extra = one_byte(x, k, cells, 64);
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < k; i += 64) sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(cells + i));
    ((int32_t*)extra)[next] = -128 * _mm512_reduce_add_epi32(sum);
  }
  template <int R>
  static void dots(const DotArgs& a, Ahead& asked) { dots_in_registers<ByteDots, R>(a, asked); }
};

template <class P, int R>
void dots_in_registers(const DotArgs& a, Ahead& asked) {
  typename P::Sum sum[R][kLines];
  QUIRE_UNROLL for (int r = 0; r < R; ++r)
    QUIRE_UNROLL for (int j = 0; j < kLines; ++j) sum[r][j] = P::begin(a, r);
  const char *x = a.x, *w = a.w + kScaleBytes<typename P::Format>;
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
  static constexpr int kBlockK = kBlockSteps * P::kCellK;
  static constexpr int64_t kBytes = kBlockK / Format::kSpan * kSpanBytes<Format>;  // of a block of a panel
  static_assert(kBlockK % Format::kSpan == 0 && Format::kPad % (P::kCellK * kStepsAtOnce) == 0);
  typedef void (*Dots)(const DotArgs&, Ahead&);
  static constexpr Dots rows[] = {nullptr,
                                  &P::template dots<1>,
                                  &P::template dots<2>,
                                  &P::template dots<3>,
                                  &P::template dots<4>,
                                  &P::template dots<5>,
                                  &P::template dots<6>};

  static int64_t blocks(const LinearArgs& g) { return ceil_div(g.k, kBlockK); }
  static TilePlan plan(const LinearArgs& g) { return tile_plan(g, P::kReadNs, blocks(g) * (kXBlock + P::kExtra), 0, true); }
  static int shapes(const TilePlan&) { return 0; }

  // Behind the cells of a tile: what its rows have beside them in a block.
  static float* extra(const TilePlan& p, const LinearArgs& g, const char* tile, int64_t block) {
    return (float*)(tile + (blocks(g) * kXBlock + block * P::kExtra) * p.tile_rows);
  }

  static void place(const LinearArgs& g, const TilePlan& p, int64_t m0, int first, int last, char* x) {
    for (int r = first; r < last && m0 + r < g.m; ++r) {
      char* const tile = x + r / p.tile_rows * p.tile_bytes;
      const int row = r % p.tile_rows;
      const auto* from = (const uint16_t*)g.x + (m0 + r) * g.x_stride;
      for (int64_t block = 0; block < blocks(g); ++block, from += kBlockK) {
        const int k = int(smaller(g.k - block * kBlockK, kBlockK));
        P::place(from, k, tile + (block * p.tile_rows + row) * kXBlock, extra(p, g, tile, block) + row, p.tile_rows);
      }
    }
  }

  static void pass(const LinearArgs& g, const TilePlan& p, const char* x, int64_t m, int count, int64_t panel, bool, char* own) {
    const int rows_of_all = int(smaller(g.m - m, int64_t(count) * p.tile_rows));
    // The CPU follows one walk through a panel by itself; with more than one it must be asked for the next block before it is wanted.
    const int64_t walks = int64_t(P::walks(p.tile_rows)) * count, each = walks > 1 ? round_up(ceil_div(kBytes, walks * P::kAsks), 64) : 0;
    auto* const sums = (float*)own;
    const char* w = (const char*)g.w + panel * panel_bytes<Format>(g.k);
    for (int64_t block = 0; block < blocks(g); ++block, w += kBytes) {
      const int steps = int(round_up(smaller(g.k - block * kBlockK, kBlockK), Format::kPad)) / P::kCellK;
      Ahead ahead{w + kBytes, each};
      for (int t = 0; t < count; ++t) {
        const char* const tile = x + t * p.tile_bytes;
        const int first = t * p.tile_rows, rows_here = int(smaller(rows_of_all - first, p.tile_rows)), groups = int(ceil_div(rows_here, kDotRows));
        for (int i = 0; i < groups; ++i) {
          const int r0 = rows_here * i / groups, r1 = rows_here * (i + 1) / groups;
          const char* const cells = tile + (block * p.tile_rows + r0) * kXBlock;
          rows[r1 - r0]({cells, w, sums + (first + r0) * kWide, steps, block == 0, extra(p, g, tile, block) + r0, p.tile_rows}, ahead);
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
