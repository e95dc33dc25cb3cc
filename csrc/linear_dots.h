// Products of bf16 rows with packed weights by dot products in 32-bit lanes: two of bf16, or four bytes, where the CPU has such instructions (VDPBF16PS,
// VPDPBUSD of AVX512-VNNI), and else by two multiply-adds of fp32, or of pairs of words. How int4 codes are multiplied is told in linear_nibbles.h; placing
// x and passing panels is the same.
//
//   cell    what a row of x and a column of the weight have for one step of k: 2 of bf16, 4 codes
//   block   64 steps, after which sums are added to those before: 128 of bf16, a span of 256 codes. Both are 16 KB of a panel
//
//   x       [tile of up to 32 rows][block][row][64 cells]         weight, a panel   [block][step][64 columns]
//
//              w 0   w 1   w 2   w 3     16 columns each
//       x 0    sum   sum   sum   sum
//       ...                              up to 6 rows: 24 sums, 4 of weights and one of x in 32 registers; with fewer registers, fewer at once
//
// The laws are those of linear_packed.h for bf16 and of linear_codes.h for int8, bit for bit: an output is one lane of one sum, so neither depends
// on how many rows there are. Codes of weights are packed with 128 added to them, since VPDPBUSD takes unsigned bytes times signed ones, and a sum
// begins with what that is too much: -128 times the sum of its row's codes.
#pragma once
#include "linear_codes.h"
#include "linear_panels.h"
#include "packed_short.h"

#if !defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace product {

#if defined(QUIRE_PLAIN)
constexpr int kDotRows = 4;
constexpr int64_t kMostPairRows = 8;  // registers of four lanes are too few for more rows of bf16: linear_packed.h is faster there
#else
constexpr int kDotRows = 6;
constexpr int64_t kMostPairRows = INT64_MAX;
#endif
constexpr int kBlockSteps = 64, kStepsAtOnce = 4;
constexpr int kStepBytes = 4 * kWide;  // of a panel

// Lines of 16 columns whose sums are in registers at once with so many rows; a block is walked through once for each. `whole`: a line is one operand, not two.
constexpr int dot_lines([[maybe_unused]] int rows, [[maybe_unused]] bool whole) {
#if defined(QUIRE_AVX512)
  return whole || rows <= 3 ? kLines : 2;
#else
  return rows == 1 ? kLines : rows == 2 ? 2 : 1;
#endif
}

// Lines `first` to first + N - 1 of a panel's steps, one step after the other.
template <class Format, int N>
struct Steps {
  const char* at;

  Steps(const char* block, int first) : at(block + kScaleBytes<Format> + 64 * first) {}
  __attribute__((always_inline)) void next(U32x16 (&lines)[N]) {
    QUIRE_UNROLL for (int j = 0; j < N; ++j) lines[j] = load_u32((const uint32_t*)(at + 64 * j));
    at += kStepBytes;
  }
};

// Of a block: up to kRows rows of x, from the first one on, and a panel.
struct DotArgs {
  const char *x, *w;   // cells of x; the panel's part, scales and all, stored or opened
  float* sums;         // [row][64]
  int steps;           // a multiple of kStepsAtOnce
  bool first;
  const float* extra;  // what a format has beside the cells: [of its own, `next` apart][row]
  int next;
};

// The sums of a block in registers, a row's cell with a line at a time.
template <class P, int R, bool kOpened>
void dots_in_registers(const DotArgs&, Ahead&);

struct PairDots {
  using Format = PackedBf16;
  using Sum = F32x16;
  // Rows at once; k of a cell; bytes of a row beside a block's cells; how often a walk through a block asks ahead.
  static constexpr int kRows = kDotRows, kCellK = 2, kExtra = 0, kAsks = kBlockSteps / kStepsAtOnce;
  static constexpr double kReadNs = 0.1;
#if defined(QUIRE_BF16_DOT)
  static constexpr int kCellBytes = 4, kParts = 1;
  static constexpr int lines_at_once(int rows) { return dot_lines(rows, true); }
  template <int>
  QUIRE_INLINE U32x16 cells(U32x16 line) { return line; }
  template <int>
  QUIRE_INLINE Sum dot(Sum sum, const char* x, U32x16 w) { return dot_pair(sum, load_cell(x), w); }
  QUIRE_INLINE void place(const uint16_t* x, int k, char* cells, float*, int) {
    for (int i = 0; i < k; i += 32) store_u32((uint32_t*)(cells + 2 * i), load_pairs_upto(x + i, k - i));
  }
#else
  static constexpr int kCellBytes = 8, kParts = 2;
  static constexpr int lines_at_once(int rows) { return dot_lines(rows, false); }
  template <int kPart>
  QUIRE_INLINE F32x16 cells(U32x16 line) { return kPart == 0 ? pair_low(line) : pair_high(line); }
  template <int kPart>
  QUIRE_INLINE Sum dot(Sum sum, const char* x, F32x16 w) { return fma(floats(load_cell(x + 4 * kPart)), w, sum); }
  QUIRE_INLINE void place(const uint16_t* x, int k, char* cells, float*, int) {
    for (int i = 0; i < k; i += 32)
      for (int j = i; j < i + 32; j += 16) store((float*)cells + j, widen_upto<WideBf16>(x + j, k - j));
  }
#endif
  QUIRE_INLINE Sum begin(const DotArgs&, int) { return zero(); }
  QUIRE_INLINE void add_to(const DotArgs& a, Sum sum, int r, int column) { add_block(a.sums + r * kWide + column, sum, a.first); }
  template <int R, bool kOpened>
  static void dots(const DotArgs& a, Ahead& asked) { dots_in_registers<PairDots, R, kOpened>(a, asked); }
};

template <bool kVnni>
struct ByteDots {
  using Format = PackedInt8;
  using Sum = U32x16;
  static constexpr int kRows = kDotRows, kCellK = 4, kCellBytes = kVnni ? 4 : 8, kExtra = sizeof(float) + sizeof(int32_t), kAsks = kBlockSteps / kStepsAtOnce;
  static constexpr double kReadNs = 0.05;
  static constexpr int kParts = kVnni ? 1 : 2;
  static constexpr int lines_at_once(int rows) { return dot_lines(rows, kVnni); }
  // Bytes, or words: of k 0 and 2, then of 1 and 3, as a mask and a shift make them.
  template <int kPart>
  QUIRE_INLINE U32x16 cells(U32x16 line) { return kVnni ? line : kPart == 0 ? and_(line, set1_u32(0x00ff00ffu)) : shr_words<8>(line); }
  QUIRE_INLINE Sum begin(const DotArgs& a, int r) { return set1_u32(((const uint32_t*)a.extra)[a.next + r]); }
  template <int kPart, class Cells>
  QUIRE_INLINE Sum dot(Sum sum, const char* x, Cells w) {
    if constexpr (kVnni) return dot_bytes(sum, w, load_cell(x));
    else return settled(add(sum, dot_words(w, load_cell(x + 4 * kPart))));
  }
  QUIRE_INLINE void add_to(const DotArgs& a, Sum sum, int r, int column) {
    float* const to = a.sums + r * kWide + column;
    store(to, fma(to_f32(sum), mul(load_bf16((const uint16_t*)a.w + column), set1(a.extra[r])), a.first ? zero() : load(to)));
  }
  QUIRE_INLINE void place(const uint16_t* x, int k, char* cells, float* extra, int next) {
    static const uint8_t even_then_odd[16] = {0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15};
    U32x16 sum = set1_u32(0);
    *extra = one_byte(x, k, [&](int i, U32x16 words) {
      if constexpr (kVnni) store_bytes(cells + i, words);
      else store_u32((uint32_t*)(cells + 2 * i), shuffle16(words, even_then_odd));
      sum = add(sum, sum_words(words));
    });
    ((uint32_t*)extra)[next] = 0u - 128u * sum_lanes(sum);
  }
  template <int R, bool>
  static void dots(const DotArgs& a, Ahead& asked) { dots_in_registers<ByteDots, R, false>(a, asked); }
};

// Cells that are taken apart meet all rows before the others are made, so that there are registers enough for them.
template <class P, int kPart, int R, int N>
QUIRE_INLINE void part_of_a_step(const U32x16 (&lines)[N], const char* x, typename P::Sum (&sum)[R][N]) {
  decltype(P::template cells<kPart>(U32x16{})) cells[N];
  QUIRE_UNROLL for (int j = 0; j < N; ++j) cells[j] = P::template cells<kPart>(lines[j]);
  QUIRE_UNROLL for (int r = 0; r < R; ++r)
    QUIRE_UNROLL for (int j = 0; j < N; ++j) sum[r][j] = P::template dot<kPart>(sum[r][j], x + r * kBlockSteps * P::kCellBytes, cells[j]);
}

// R rows with N lines of a block, from the first one on, as `walk` brings them.
template <class P, int R, int N, class Walk>
QUIRE_INLINE void dots_of_lines(const DotArgs& a, Walk walk, int first, Ahead& ahead) {
  typename P::Sum sum[R][N];
  QUIRE_UNROLL for (int r = 0; r < R; ++r)
    QUIRE_UNROLL for (int j = 0; j < N; ++j) sum[r][j] = P::begin(a, r);
  const char* x = a.x;
  for (int s = a.steps; s > 0; s -= kStepsAtOnce) {
    ask(ahead);
    QUIRE_UNROLL for (int u = 0; u < kStepsAtOnce; ++u) {
      U32x16 lines[N];
      walk.next(lines);
      part_of_a_step<P, 0>(lines, x + u * P::kCellBytes, sum);
      if constexpr (P::kParts == 2) part_of_a_step<P, 1>(lines, x + u * P::kCellBytes, sum);
    }
    x += kStepsAtOnce * P::kCellBytes;
  }
  QUIRE_UNROLL for (int r = 0; r < R; ++r)
    QUIRE_UNROLL for (int j = 0; j < N; ++j) P::add_to(a, sum[r][j], r, 16 * (first + j));
}

template <class P, int R, bool kOpened>
void dots_in_registers(const DotArgs& a, Ahead& asked) {
  using Format = typename P::Format;
  constexpr int kAtOnce = P::lines_at_once(R);
  Ahead ahead = asked;
  for (int first = 0; first < kLines; first += kAtOnce) {
#if defined(QUIRE_SHORT_EXPONENTS)
    if constexpr (kShort<Format> && !kOpened) dots_of_lines<P, R, kAtOnce>(a, ShortSteps<kAtOnce>(a.w, first), first, ahead);
    else
#endif
      dots_of_lines<P, R, kAtOnce>(a, Steps<Format, kAtOnce>(a.w, first), first, ahead);
  }
  asked = ahead;
}

template <class P>
struct DotProduct {
  using Format = typename P::Format;
  static constexpr int kBlockK = kBlockSteps * P::kCellK, kXBlock = kBlockSteps * P::kCellBytes;
  static constexpr int64_t kBytes = kShort<Format> ? kMostlyShortBytes : kBlockK / Format::kSpan * kSpanBytes<Format>;  // of a block of a panel
  static_assert(kBlockK % Format::kSpan == 0 && Format::kPad % (P::kCellK * kStepsAtOnce) == 0);
  static constexpr bool kOpens = kShort<Format> && kMostShortRows < P::kRows;
  static constexpr int64_t kRoom = kOpens ? kShortSteps * kWholeStep : 0;
  typedef void (*Dots)(const DotArgs&, Ahead&);
  template <int R, bool kOpened>
  static constexpr Dots of() {
    if constexpr (R <= P::kRows && (kOpened ? kOpens : !kOpens || R <= kMostShortRows)) return &P::template dots<R, kOpened>;
    return nullptr;
  }
  template <bool kOpened>
  static constexpr Dots rows[] = {nullptr, of<1, kOpened>(), of<2, kOpened>(), of<3, kOpened>(), of<4, kOpened>(), of<5, kOpened>(), of<6, kOpened>()};

  static int64_t blocks(const LinearArgs& g) { return ceil_div(g.k, kBlockK); }
  static TilePlan plan(const LinearArgs& g) { return tile_plan(g, P::kReadNs, blocks(g) * (kXBlock + P::kExtra), kRoom, true); }
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
    // The CPU follows one walk through a panel by itself; with more than one it must be asked for the next block before it is wanted. Where lines come into the
    // first cache one walk reads up to a quarter more that way, too.
    // One walk over 12 bits waits for decoding in between, and reads a tenth more where it asks, too (docs/speed-record.md, Zen 3).
    const int at_once = P::lines_at_once(int(smaller(p.tile_rows, P::kRows)));
    const bool opens = kOpens && rows_of_all > kMostShortRows;
    const int64_t walks = ceil_div(p.tile_rows, P::kRows) * (kLines / at_once) * count;
    // But for a sixteenth, which may come late: a fourth line each time, where three are nearly all, comes in a burst and costs up to a tenth with AVX2.
    const int64_t each = walks > 1 || kOpens || ask_near() ? round_up(ceil_div(kBytes / 16 * 15, walks * P::kAsks), 64) : 0;
    auto* const sums = (float*)(own + kRoom);
    const char *w = panel_at<Format>(g.w, panel, g.k), *next;
    for (int64_t block = 0; block < blocks(g); ++block, w = next) {
      const int steps = int(round_up(smaller(g.k - block * kBlockK, kBlockK), Format::kPad)) / P::kCellK;
      next = block_end<Format>(w, steps, kBytes);
      Ahead ahead{next, each};
#if defined(QUIRE_SHORT_EXPONENTS)
      if (opens) open_block(w, steps, own);
#endif
      for (int t = 0; t < count; ++t) {
        const char* const tile = x + t * p.tile_bytes;
        const int first = t * p.tile_rows, rows_here = int(smaller(rows_of_all - first, p.tile_rows)), groups = int(ceil_div(rows_here, P::kRows));
        for (int i = 0; i < groups; ++i) {
          const int r0 = rows_here * i / groups, r1 = rows_here * (i + 1) / groups;
          const char* const cells = tile + (block * p.tile_rows + r0) * kXBlock;
          const DotArgs args{cells, opens ? own : w, sums + (first + r0) * kWide, steps, block == 0, extra(p, g, tile, block) + r0, p.tile_rows};
          (opens ? rows<true> : rows<false>)[r1 - r0](args, ahead);
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
