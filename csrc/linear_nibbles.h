// Products of bf16 rows with int4 weights by dot products of bytes (VPDPBUSD): the law of linear_codes.h over spans of 32 of k, one for x and the
// weight. A line has 8 k of 16 columns, two to a byte: its low nibbles meet the even k of x, its high ones the odd, so x is placed in that order.
//
//   line      k 1,0  3,2  5,4  7,6      one lane of 16
//   & 0x0f    k 0    2    4    6        <- cell of x: k 0 2 4 6
//   >> 4      k 1    3    5    7        <- the next:  k 1 3 5 7
//
// Nibbles are unsigned, code + 8, as the instruction takes them; a sum begins with what that is too much.
#pragma once
#include "linear_dots.h"

#if defined(QUIRE_VECTOR_DOTS)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace product {

struct NibbleDots {
  using Format = PackedInt4;
  static constexpr int kCellK = 4, kSpans = kBlockSteps * kCellK / Format::kSpan, kExtra = kSpans * (sizeof(float) + sizeof(int32_t));
  static constexpr int kSpanSteps = Format::kSpan / kCellK, kSpanCells = kSpanSteps * kCellBytes;
  static constexpr int kAsks = kSpans;
  template <int R>
  static constexpr int kWalks = R <= 3 ? 1 : 2;  // sums, in integers and in floats, of so many rows by two lines fill the registers
  static int walks(int rows) { return rows <= 3 ? 1 : 2 * int(ceil_div(rows, kDotRows)); }
  static constexpr double kReadNs = 0.03;

  // Behind a row's cells: the scale of each span and, kSpans later, what its sums begin with, each `next` apart.
  static void place(const uint16_t* x, int k, char* cells, float* extra, int next) {
    const __m256i even_then_odd = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    for (int i = 0; i < k; i += Format::kSpan, cells += kSpanCells, extra += next) {
      const U32x16 pairs = load_pairs_upto(x + i, k - i);
      const OneByte one = one_byte_by(magnitudes(pairs));
      const __m256i codes = _mm256_shuffle_epi8(_mm512_cvtepi16_epi8(code_words(pairs, one.up)), even_then_odd);
      _mm256_storeu_si256((__m256i*)cells, codes);
      const __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), _mm512_zextsi256_si512(codes));
      *extra = one.t;
      ((int32_t*)extra)[kSpans * next] = -8 * _mm512_reduce_add_epi32(sums);
    }
  }

  template <int R>
  static void dots(const DotArgs& a, Ahead& asked) {
    constexpr int kAtOnce = kLines / kWalks<R>;
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
        U32x16 sum[R][kAtOnce];
        QUIRE_UNROLL for (int r = 0; r < R; ++r)
          QUIRE_UNROLL for (int j = 0; j < kAtOnce; ++j) sum[r][j] = set1_u32(((const uint32_t*)extra)[kSpans * a.next + r]);
        const char *cells = x, *line = span + kScaleBytes<Format> + 64 * first;
        for (int i = int(smaller(steps, kSpanSteps)); i > 0; i -= 2, cells += 2 * kCellBytes, line += 64 * kLines)
          QUIRE_UNROLL for (int j = 0; j < kAtOnce; ++j) {
            const U32x16 raw = load_u32((const uint32_t*)(line + 64 * j)), even = and_(raw, low), odd = and_(shr<4>(raw), low);
            QUIRE_UNROLL for (int r = 0; r < R; ++r) sum[r][j] = dot_bytes(sum[r][j], even, cells + r * kXBlock);
            QUIRE_UNROLL for (int r = 0; r < R; ++r) sum[r][j] = dot_bytes(sum[r][j], odd, cells + r * kXBlock + kCellBytes);
          }
        QUIRE_UNROLL for (int j = 0; j < kAtOnce; ++j) {
          const F32x16 scale = load_bf16((const uint16_t*)span + 16 * (first + j));
          QUIRE_UNROLL for (int r = 0; r < R; ++r) total[r][j] = fma(to_f32(sum[r][j]), mul(scale, set1(extra[r])), total[r][j]);
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
