// Products of bf16 rows with int4 weights by dot products of bytes (VPDPBUSD, or VPMADDUBSW where the CPU lacks it): the law of linear_codes.h over
// spans of 32 of k, one for x and the weight. A line has 8 k of 16 columns, two to a byte: its low nibbles meet the even k of x, its high ones the odd,
// so x is placed in that order.
//
//   line      k 1,0  3,2  5,4  7,6      one lane of 16
//   & 0x0f    k 0    2    4    6        <- cell of x: k 0 2 4 6
//   >> 4      k 1    3    5    7        <- the next:  k 1 3 5 7
//
// Nibbles are unsigned, code + 8, as the instruction takes them; a sum begins with what that is too much. Without VPDPBUSD a span's sums are words, two
// to a lane: eight times two products of at most 15 * 127 fit in one.
#pragma once
#include "linear_dots.h"

#if !defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace product {

template <bool kVnni>
struct NibbleDots {
  using Format = PackedInt4;
  static constexpr int kCellK = 4, kCellBytes = 4, kXBlock = kBlockSteps * kCellBytes;
  static constexpr int kSpans = kBlockSteps * kCellK / Format::kSpan, kExtra = kSpans * (sizeof(float) + sizeof(int32_t));
  static constexpr int kSpanSteps = Format::kSpan / kCellK, kSpanCells = kSpanSteps * kCellBytes;
  static constexpr int kAsks = kSpans;
  // Sums, in integers and in floats, of so many rows by so many lines fill the registers.
#if defined(QUIRE_AVX512)
  static constexpr int kRows = 6;
  static constexpr int lines_at_once(int rows) { return rows <= 3 ? kLines : 2; }
#else
  static constexpr int kRows = 4;
  static constexpr int lines_at_once(int rows) { return rows == 1 ? kLines : 1; }
#endif
  static constexpr double kReadNs = 0.03;

  // Behind a row's cells: the scale of each span and, kSpans later, what its sums begin with, each `next` apart.
  static void place(const uint16_t* x, int k, char* cells, float* extra, int next) {
    static const uint8_t even_then_odd[16] = {0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15};
    for (int i = 0; i < k; i += Format::kSpan, cells += kSpanCells, extra += next) {
      const U32x16 pairs = load_pairs_upto(x + i, k - i);
      const OneByte one = one_byte_by(magnitudes(pairs));
      const U32x16 words = code_words(pairs, one.up);
      store_bytes(cells, shuffle16(words, even_then_odd));
      *extra = one.t;
      ((uint32_t*)extra)[kSpans * next] = 0u - 8u * sum_lanes(sum_words(words));
    }
  }

  QUIRE_INLINE U32x16 begin(uint32_t from) { return set1_u32(kVnni ? from : 0); }
  template <class Nibbles>  // U32x16, but that dot_bytes is looked for only where it is used
  QUIRE_INLINE U32x16 dot(U32x16 sum, Nibbles nibbles, const char* x) {
    if constexpr (kVnni) return dot_bytes(sum, nibbles, x);
    else return settled(add_words(sum, words_of_bytes(nibbles, load_cell(x))));
  }
  QUIRE_INLINE U32x16 end(U32x16 sum, uint32_t from) { return kVnni ? sum : add(sum_words(sum), set1_u32(from)); }

  template <int R, bool>
  static void dots(const DotArgs& a, Ahead& asked) {
    constexpr int kAtOnce = lines_at_once(R);
    const U32x16 low = set1_u32(0x0f0f0f0fu);
    Ahead ahead = asked;
    for (int first = 0; first < kLines; first += kAtOnce) {
      F32x16 total[R][kAtOnce];
      QUIRE_UNROLL for (int r = 0; r < R; ++r)
        QUIRE_UNROLL for (int j = 0; j < kAtOnce; ++j) total[r][j] = a.first ? zero() : load(a.sums + r * kWide + 16 * (first + j));
      const char *x = a.x, *span = a.w;
      const float* extra = a.extra;
      for (int steps = a.steps; steps > 0; steps -= kSpanSteps, x += kSpanCells, span += kSpanBytes<Format>, extra += a.next) {
        ask(ahead);
        const auto* const from = (const uint32_t*)extra + kSpans * a.next;
        U32x16 sum[R][kAtOnce];
        QUIRE_UNROLL for (int r = 0; r < R; ++r)
          QUIRE_UNROLL for (int j = 0; j < kAtOnce; ++j) sum[r][j] = begin(from[r]);
        const char *cells = x, *line = span + kScaleBytes<Format> + 64 * first;
        for (int i = int(smaller(steps, kSpanSteps)); i > 0; i -= 2, cells += 2 * kCellBytes, line += 64 * kLines)
          QUIRE_UNROLL for (int j = 0; j < kAtOnce; ++j) {
            const U32x16 raw = load_u32((const uint32_t*)(line + 64 * j)), even = and_(raw, low), odd = and_(shr<4>(raw), low);
            QUIRE_UNROLL for (int r = 0; r < R; ++r) sum[r][j] = dot(sum[r][j], even, cells + r * kXBlock);
            QUIRE_UNROLL for (int r = 0; r < R; ++r) sum[r][j] = dot(sum[r][j], odd, cells + r * kXBlock + kCellBytes);
          }
        QUIRE_UNROLL for (int j = 0; j < kAtOnce; ++j) {
          const F32x16 scale = load_bf16((const uint16_t*)span + 16 * (first + j));
          QUIRE_UNROLL for (int r = 0; r < R; ++r) total[r][j] = fma(to_f32(end(sum[r][j], from[r])), mul(scale, set1(extra[r])), total[r][j]);
        }
      }
      QUIRE_UNROLL for (int r = 0; r < R; ++r)
        QUIRE_UNROLL for (int j = 0; j < kAtOnce; ++j) store(a.sums + r * kWide + 16 * (first + j), total[r][j]);
    }
    asked = ahead;
  }
};

}  // namespace product
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
