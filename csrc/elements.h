// How rows are read and results written, one struct per format (kernels.h).
//
// Keys go by `lanes`, a vector of kSpan elements of one row, kPer to a 32-bit lane. Of sixteen keys' vectors transposed, a
// column holds kPer elements of each key; `pick` takes the p-th of them out, decoded by the `Scale` of its keys.
// Values go by units of kVecs vectors; a unit of two holds the even elements in one and the odd ones in the other, which costs
// no shuffle either way.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace quire {
namespace QUIRE_ISA {
namespace {

struct NoScale {};

// Rows of plain elements have no scales.
struct Plain {
  using Scale = NoScale;
  static constexpr int kScaleColumns = 0;
};

struct Single : Plain {
  static constexpr int kPer = 1, kSpan = 16, kVecs = 1;
  struct Row {
    const float* at;
  };
  QUIRE_INLINE F32x16 lanes(const char* p, int d, int n) { return n == 16 ? load((const float*)p + d) : load_n((const float*)p + d, n); }
  QUIRE_INLINE F32x16 pick(F32x16 column, const NoScale&, int) { return column; }
  QUIRE_INLINE Row row(const char* p, int, int d) { return {(const float*)p + d}; }
  QUIRE_INLINE void read(const Row& r, int j, F32x16* x) { x[0] = load(r.at + 16 * j); }
  QUIRE_INLINE void read_n(const Row& r, F32x16* x, int n) { x[0] = load_n(r.at, n); }
};

struct Half : Plain {
  static constexpr int kPer = 1, kSpan = 16, kVecs = 1;
  struct Row {
    const uint16_t* at;
  };
  QUIRE_INLINE F32x16 lanes(const char* p, int d, int n) {
    const uint16_t* from = (const uint16_t*)p + d;
    return n == 16 ? load_f16(from) : load_f16_n(from, n);
  }
  QUIRE_INLINE F32x16 pick(F32x16 column, const NoScale&, int) { return column; }
  QUIRE_INLINE Row row(const char* p, int, int d) { return {(const uint16_t*)p + d}; }
  QUIRE_INLINE void read(const Row& r, int j, F32x16* x) { x[0] = load_f16(r.at + 16 * j); }
  QUIRE_INLINE void read_n(const Row& r, F32x16* x, int n) { x[0] = load_f16_n(r.at, n); }
};

struct Brain : Plain {
  static constexpr int kPer = 2, kSpan = 32, kVecs = 2;
  struct Row {
    const uint16_t* at;
  };
  QUIRE_INLINE F32x16 lanes(const char* p, int d, int n) {
    const uint16_t* from = (const uint16_t*)p + d;
    return floats(n == 32 ? load_pairs(from) : load_pairs_n(from, n));
  }
  QUIRE_INLINE F32x16 pick(F32x16 column, const NoScale&, int p) { return p == 0 ? pair_low(bits(column)) : pair_high(bits(column)); }
  QUIRE_INLINE void split(U32x16 pairs, F32x16* x) {
    x[0] = pair_low(pairs);
    x[1] = pair_high(pairs);
  }
  QUIRE_INLINE Row row(const char* p, int, int d) { return {(const uint16_t*)p + d}; }
  QUIRE_INLINE void read(const Row& r, int j, F32x16* x) { split(load_pairs(r.at + 16 * j), x); }
  QUIRE_INLINE void read_n(const Row& r, F32x16* x, int n) { split(load_pairs_n(r.at, n), x); }
};

// Scales of codes (kernels.h): a byte is the upper bits of a float without its sign, of an exponent that begins at kScaleBase.
constexpr uint32_t kScaleBase = 105u << 3, kNoScale = 0xff;
QUIRE_INLINE float scale_of_byte(uint32_t byte) {
  const uint32_t u = byte == kNoScale ? 0x7fc00000u : (byte + kScaleBase) << 20;
  float scale;
  memcpy(&scale, &u, 4);
  return scale;
}
QUIRE_INLINE float scale_at(const char* p) { return scale_of_byte(uint8_t(*p)); }
QUIRE_INLINE F32x16 scales_of_bytes(U32x16 bytes) {
  constexpr float kPastLast = 960.0f;  // what kNoScale would be as a number
  const F32x16 scales = floats(add(shl<20>(bytes), set1_u32(kScaleBase << 20)));
  return select(eq(scales, set1(kPastLast)), set1(__builtin_nanf("")), scales);
}

// A code is decoded where it lies in its lane: one byte further up it counts 256 times as much, which its scale makes good.
// Raised by half their range, codes have no sign to extend; the last step takes that off again, exactly.
struct Int8 {
  static constexpr int kPer = 4, kSpan = 64, kVecs = 1;
  static constexpr int kScaleColumns = 16;  // columns that share a scale
  struct Scale {
    F32x16 by[3], raised;
  };
  struct Row {
    const char* codes;
    F32x16 scale;
  };
  QUIRE_INLINE int64_t scales(int dim, int) { return dim; }
  QUIRE_INLINE Scale spread(F32x16 scale) {
    return {{scale, mul(scale, set1(0x1p-8f)), mul(scale, set1(0x1p-16f))}, mul(scale, set1(-128.0f))};
  }
  QUIRE_INLINE F32x16 lanes(const char* p, int d, int n) {
    return floats(xor_(n == 64 ? load_bytes(p + d) : load_bytes_n(p + d, n), set1_u32(0x80808080u)));
  }
  QUIRE_INLINE F32x16 pick(F32x16 column, const Scale& s, int p) {
    const U32x16 code = p == 3 ? shr<24>(bits(column)) : and_(bits(column), set1_u32(0xffu << 8 * p));
    return fma(to_f32(code), s.by[p % 3], s.raised);
  }
  QUIRE_INLINE Row row(const char* p, int dim, int d) { return {p + d, set1(scale_at(p + dim))}; }
  QUIRE_INLINE void read(const Row& r, int j, F32x16* x) { x[0] = mul(load_int8(r.codes + 16 * j), r.scale); }
  QUIRE_INLINE void read_n(const Row& r, F32x16* x, int n) { x[0] = mul(load_int8_n(r.codes, n), r.scale); }
};

struct Int4 {
  static constexpr int kPer = 8, kSpan = 128, kVecs = 2;
  static constexpr int kScaleColumns = 4;
  static_assert(kInt4Group == 32, "a unit of values and four columns of keys have one scale");
  static constexpr float kStep = 16.0f;  // a nibble is the upper half of a byte
  struct Scale {
    F32x16 by[7], raised;
  };
  struct Row {
    const char *codes, *scales;
  };
  QUIRE_INLINE int64_t scales(int dim, int d) { return (dim + 1) / 2 + d / kInt4Group; }
  QUIRE_INLINE Scale spread(F32x16 scale) {
    Scale s;
    s.by[0] = mul(scale, set1(kStep));
    for (int i = 1; i < 7; ++i) s.by[i] = mul(s.by[i - 1], set1(0x1p-4f));
    s.raised = mul(scale, set1(-8.0f * kStep));
    return s;
  }
  QUIRE_INLINE F32x16 lanes(const char* p, int d, int n) {
    return floats(n == 128 ? load_bytes(p + d / 2) : load_bytes_n(p + d / 2, (n + 1) / 2));
  }
  QUIRE_INLINE F32x16 pick(F32x16 column, const Scale& s, int p) {
    const U32x16 code = p == 7 ? shr<28>(bits(column)) : and_(bits(column), set1_u32(0xfu << 4 * p));
    return fma(to_f32(code), s.by[p % 7], s.raised);
  }
  QUIRE_INLINE void split(U32x16 bytes, float scale, F32x16* x) {
    const F32x16 s = set1(kStep * scale), raised = set1(-8.0f * kStep * scale);
    x[0] = fma(to_f32(and_(bytes, set1_u32(0x0f))), s, raised);
    x[1] = fma(to_f32(and_(bytes, set1_u32(0xf0))), set1(kStep * 0x1p-4f * scale), raised);
  }
  QUIRE_INLINE Row row(const char* p, int dim, int d) { return {p + d / 2, p + scales(dim, d)}; }
  QUIRE_INLINE void read(const Row& r, int j, F32x16* x) { split(load_u8(r.codes + 8 * j), scale_at(r.scales + j / kVecs), x); }
  QUIRE_INLINE void read_n(const Row& r, F32x16* x, int n) { split(load_u8_n(r.codes, (n + 1) / 2), scale_at(r.scales), x); }
};

// n <= 16 elements of a dtype, in order; zeros after them.
QUIRE_INLINE F32x16 load_elements_n(int32_t dtype, const char* p, int n) {
  if (dtype == kF32) return load_n((const float*)p, n);
  return dtype == kBF16 ? load_bf16_n((const uint16_t*)p, n) : load_f16_n((const uint16_t*)p, n);
}
QUIRE_INLINE void store_elements_n(int32_t dtype, char* p, F32x16 x, int n) {
  if (dtype == kF32) return store_n((float*)p, x, n);
  dtype == kBF16 ? store_bf16_n((uint16_t*)p, x, n) : store_f16_n((uint16_t*)p, x, n);
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
