// Weights packed for the products: how W [N, K] lies in memory, so that reading it is one walk and no column is transposed.
//
//   panels of 64 columns, one after the other
//   panel:  k in spans of kSpan:  [scales: 64 bf16]  units
//   unit:   kUnit of k:           four lines of 64 bytes, each 16 columns x kUnit of k
//
//   line    fp32  16 floats                          int8  16 lanes of 4 bytes of k, the operand of dot products of bytes: code + 128, on AMX the code
//           fp16  2 k x 16 halves                    int4  16 lanes of 32 bits, 8 nibbles (code + 8) each, k ascending from the lowest
//           bf16  16 pairs of k, the operand of a bf16 dot instruction; without one, a shift and a mask make two vectors of fp32
//
// Columns and k are filled up with zeros, k to a multiple of kPad. Codes have one scale for a column and a span of k, which may be
// several blocks of it; only they have scales.
#pragma once
#include "kernels.h"
#include "linear_tiles.h"

namespace quire {
namespace QUIRE_ISA {
namespace {
namespace product {

constexpr int kWide = 64, kLines = kWide / 16;  // columns of a panel, lines of a unit

struct PackedF32 {
  static constexpr int kUnit = 1, kSpan = kBlock, kPad = 16;
  static constexpr bool kScaled = false;
  using Raw = F32x16;
  QUIRE_INLINE Raw raw(const char* line) { return load((const float*)line); }
  template <int>
  QUIRE_INLINE F32x16 cell(Raw raw) { return raw; }
  QUIRE_INLINE float element(const char* line, int column, int) { return ((const float*)line)[column]; }
};

struct PackedF16 {
  static constexpr int kUnit = 2, kSpan = kBlock, kPad = 16;
  static constexpr bool kScaled = false;
  using Raw = const char*;
  QUIRE_INLINE Raw raw(const char* line) { return line; }
  template <int I>
  QUIRE_INLINE F32x16 cell(Raw line) { return load_f16((const uint16_t*)line + 16 * I); }
  QUIRE_INLINE float element(const char* line, int column, int k) {
    float all[16];
    store(all, load_f16_n((const uint16_t*)line + 16 * k + column, 1));
    return all[0];
  }
};

struct PackedBf16 {
  static constexpr int kUnit = 2, kSpan = kBlock, kPad = 32;
  static constexpr bool kScaled = false;
  using Raw = U32x16;
  QUIRE_INLINE Raw raw(const char* line) { return load_u32((const uint32_t*)line); }
  template <int I>
  QUIRE_INLINE F32x16 cell(Raw pairs) { return I == 0 ? pair_low(pairs) : pair_high(pairs); }
  QUIRE_INLINE float element(const char* line, int column, int k) { return bf16_to_f32(((const uint16_t*)line)[2 * column + k]); }
};

struct PackedInt8 {
  static constexpr int kUnit = 4, kSpan = 256, kPad = 16;
  static constexpr bool kScaled = true;
#if defined(QUIRE_AMX)
  static constexpr uint32_t kFlipped = 0;
#else
  static constexpr uint32_t kFlipped = 0x80;  // bits of a code as it is stored: 128 added, so that it is unsigned, as linear_dots.h wants it
#endif
  using Raw = U32x16;
  QUIRE_INLINE Raw raw(const char* line) { return xor_(load_u32((const uint32_t*)line), set1_u32(0x01010101u * (0x80 ^ kFlipped))); }
  template <int I>
  QUIRE_INLINE F32x16 cell(Raw lanes) { return sub(to_f32(and_(shr<8 * I>(lanes), set1_u32(0xff))), set1(128.0f)); }
  QUIRE_INLINE int place(int column, int k) { return 4 * column + k; }
  QUIRE_INLINE float element(const char* line, int column, int k) { return float(int8_t(line[place(column, k)] ^ kFlipped)); }
};

struct PackedInt4 {
  static constexpr int kUnit = 8, kSpan = 32, kPad = 16;
  static constexpr bool kScaled = true;
  using Raw = U32x16;
  QUIRE_INLINE Raw raw(const char* line) { return load_u32((const uint32_t*)line); }
  template <int I>
  QUIRE_INLINE F32x16 cell(Raw lanes) {
#if defined(QUIRE_AVX512)
    const __m512 codes = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm512_permutexvar_ps(_mm512_srli_epi32(lanes.v, 4 * I), codes)};  // looks at the lowest nibble of a lane alone
#else
    return sub(to_f32(and_(shr<4 * I>(lanes), set1_u32(0xf))), set1(8.0f));
#endif
  }
  QUIRE_INLINE float element(const char* line, int column, int k) {
    return float(int(((const uint32_t*)line)[column] >> 4 * k & 0xfu) - 8);
  }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The cells of a line, k ascending.
template <class P, int I = 0>
QUIRE_INLINE void decode(typename P::Raw raw, F32x16* cells) {
  if constexpr (I < P::kUnit) {
    cells[I] = P::template cell<I>(raw);
    decode<P, I + 1>(raw, cells);
  }
}

// Where things are in a panel, in bytes.
template <class P>
constexpr int64_t kScaleBytes = P::kScaled ? 2 * kWide : 0;
template <class P>
constexpr int64_t kSpanBytes = kScaleBytes<P> + P::kSpan / P::kUnit * 64 * kLines;
template <class P>
constexpr int64_t kBlockBytes = kBlock * kSpanBytes<P> / P::kSpan;  // of a block of k, with its share of scales
template <class P>
constexpr int kPart = P::kSpan < kBlock ? P::kSpan : kBlock;  // of k, that is summed before it is scaled
struct PartPlace {
  const char *scales, *units;
};
template <class P>
int64_t panel_bytes(int64_t k) {
  return round_up(k, P::kPad) / P::kUnit * 64 * kLines + ceil_div(k, P::kSpan) * kScaleBytes<P>;
}

// k and on, a multiple of kPart, of a panel.
template <class P>
QUIRE_INLINE PartPlace part_at(const char* panel, int64_t k) {
  const char* const span = panel + k / P::kSpan * kSpanBytes<P>;
  return {span, span + kScaleBytes<P> + k % P::kSpan / P::kUnit * 64 * kLines};
}

// f(P{}) for the struct P of a packed format.
template <class Function>
void with_packed(int32_t format, const Function& f) {
  switch (format) {
    case kPackedF32: return f(PackedF32{});
    case kPackedBF16: return f(PackedBf16{});
    case kPackedF16: return f(PackedF16{});
    case kPackedInt8: return f(PackedInt8{});
    default: return f(PackedInt4{});
  }
}

}  // namespace product
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
