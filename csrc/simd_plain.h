// simd.h for any CPU: four GCC/Clang vectors of four lanes, which every target lowers to its 128-bit registers or to scalars.
#pragma once
#include "isa.h"

#if defined(QUIRE_PLAIN)
namespace quire {
namespace QUIRE_ISA {
namespace {

typedef float f32x4 __attribute__((vector_size(16)));
typedef uint32_t u32x4 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));

struct F32x16 {
  f32x4 v[4];
};
struct U32x16 {
  u32x4 v[4];
};
struct Mask16 {
  i32x4 v[4];
};

#define QUIRE_EACH for (int i = 0; i < 4; ++i)

QUIRE_INLINE F32x16 set1(float x) {
  const f32x4 v = {x, x, x, x};
  return {{v, v, v, v}};
}
QUIRE_INLINE F32x16 zero() { return set1(0.0f); }
QUIRE_INLINE F32x16 load(const float* p) {
  F32x16 r;
  memcpy(&r, p, 64);
  return r;
}
QUIRE_INLINE F32x16 load_n(const float* p, int n) {
  F32x16 r = zero();
  memcpy(&r, p, size_t(n) * 4);
  return r;
}
QUIRE_INLINE void store(float* p, F32x16 x) { memcpy(p, &x, 64); }
QUIRE_INLINE void store_n(float* p, F32x16 x, int n) { memcpy(p, &x, size_t(n) * 4); }

#define QUIRE_BINARY(name, type, expression) \
  QUIRE_INLINE type name(type a, type b) {   \
    type r;                                  \
    QUIRE_EACH r.v[i] = expression;          \
    return r;                                \
  }
QUIRE_BINARY(add, F32x16, a.v[i] + b.v[i])
QUIRE_BINARY(sub, F32x16, a.v[i] - b.v[i])
QUIRE_BINARY(mul, F32x16, a.v[i] * b.v[i])
QUIRE_BINARY(div, F32x16, a.v[i] / b.v[i])
QUIRE_BINARY(max, F32x16, a.v[i] > b.v[i] ? a.v[i] : b.v[i])
QUIRE_BINARY(min, F32x16, a.v[i] < b.v[i] ? a.v[i] : b.v[i])
QUIRE_BINARY(add, U32x16, a.v[i] + b.v[i])
QUIRE_BINARY(mul, U32x16, a.v[i] * b.v[i])
QUIRE_BINARY(xor_, U32x16, a.v[i] ^ b.v[i])
QUIRE_BINARY(and_, U32x16, a.v[i] & b.v[i])
QUIRE_BINARY(or_, U32x16, a.v[i] | b.v[i])
#undef QUIRE_BINARY

QUIRE_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  F32x16 r;
#if defined(__FP_FAST_FMAF)
  for (int i = 0; i < 16; ++i) r.v[i / 4][i % 4] = __builtin_fmaf(a.v[i / 4][i % 4], b.v[i / 4][i % 4], c.v[i / 4][i % 4]);
#else
  QUIRE_EACH r.v[i] = a.v[i] * b.v[i] + c.v[i];
#endif
  return r;
}
QUIRE_INLINE F32x16 fnma(F32x16 a, F32x16 b, F32x16 c) {
  QUIRE_EACH a.v[i] = -a.v[i];
  return fma(a, b, c);
}
// Adding and taking away 1.5 * 2^23 leaves no fraction bits; |x| < 2^22.
QUIRE_INLINE F32x16 round_nearest(F32x16 a) {
  const F32x16 big = set1(12582912.0f);
  return sub(add(a, big), big);
}

QUIRE_INLINE U32x16 load_u32(const uint32_t* p) {
  U32x16 r;
  memcpy(&r, p, 64);
  return r;
}
QUIRE_INLINE void store_u32(uint32_t* p, U32x16 x) { memcpy(p, &x, 64); }
QUIRE_INLINE U32x16 set1_u32(uint32_t x) {
  const u32x4 v = {x, x, x, x};
  return {{v, v, v, v}};
}
QUIRE_INLINE U32x16 load_cell(const void* p) {
  uint32_t x;
  memcpy(&x, p, sizeof(x));
  return set1_u32(x);
}
template <int N>
QUIRE_INLINE U32x16 shl(U32x16 a) {
  QUIRE_EACH a.v[i] <<= N;
  return a;
}
template <int N>
QUIRE_INLINE U32x16 shr(U32x16 a) {
  QUIRE_EACH a.v[i] >>= N;
  return a;
}
// The lanes as signed integers.
QUIRE_INLINE F32x16 to_f32(U32x16 a) {
  F32x16 r;
  QUIRE_EACH r.v[i] = __builtin_convertvector((i32x4)a.v[i], f32x4);
  return r;
}
QUIRE_INLINE U32x16 to_i32(F32x16 a) {
  const F32x16 whole = round_nearest(a);
  U32x16 r;
  QUIRE_EACH r.v[i] = (u32x4)__builtin_convertvector(whole.v[i], i32x4);
  return r;
}
QUIRE_INLINE U32x16 bits(F32x16 a) {
  U32x16 r;
  QUIRE_EACH r.v[i] = (u32x4)a.v[i];
  return r;
}
QUIRE_INLINE F32x16 floats(U32x16 a) {
  F32x16 r;
  QUIRE_EACH r.v[i] = (f32x4)a.v[i];
  return r;
}

// x * 2^n for an integral n in [-126, 128]: two factors, since 2^128 is no float.
QUIRE_INLINE F32x16 scale_pow2(F32x16 x, F32x16 n) {
  QUIRE_EACH {
    const i32x4 whole = __builtin_convertvector(n.v[i], i32x4), half = whole >> 1;
    x.v[i] = x.v[i] * (f32x4)((half + 127) << 23) * (f32x4)((whole - half + 127) << 23);
  }
  return x;
}

#define QUIRE_COMPARE(name, op)               \
  QUIRE_INLINE Mask16 name(F32x16 a, F32x16 b) { \
    Mask16 r;                                 \
    QUIRE_EACH r.v[i] = a.v[i] op b.v[i];     \
    return r;                                 \
  }
QUIRE_COMPARE(lt, <)
QUIRE_COMPARE(gt, >)
QUIRE_COMPARE(eq, ==)
#undef QUIRE_COMPARE
// Lanes lo <= i < hi; 0 <= lo, hi <= 16.
QUIRE_INLINE Mask16 lanes_between(int lo, int hi) {
  Mask16 r;
  QUIRE_EACH {
    const i32x4 lane = {4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3};
    r.v[i] = (lane >= lo) & (lane < hi);
  }
  return r;
}
QUIRE_INLINE Mask16 lanes_of(uint32_t bits) {
  Mask16 r;
  QUIRE_EACH {
    const i32x4 lane = {1 << (4 * i), 2 << (4 * i), 4 << (4 * i), 8 << (4 * i)};
    r.v[i] = (lane & int32_t(bits)) != 0;
  }
  return r;
}
QUIRE_INLINE F32x16 select(Mask16 m, F32x16 yes, F32x16 no) {
  QUIRE_EACH yes.v[i] = (f32x4)(((i32x4)yes.v[i] & m.v[i]) | ((i32x4)no.v[i] & ~m.v[i]));
  return yes;
}
QUIRE_INLINE uint32_t mask_bits(Mask16 m) {
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= uint32_t(m.v[i / 4][i % 4] & 1) << i;
  return bits;
}

// Always in the order ((i, i+8), i+4, i+2, i+1).
QUIRE_INLINE float sum_lanes(F32x16 a) {
  const f32x4 q = (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
  return (q[0] + q[2]) + (q[1] + q[3]);
}
QUIRE_INLINE float max_lanes(F32x16 a) {
  float m = a.v[0][0];
  for (int i = 1; i < 16; ++i) m = a.v[i / 4][i % 4] > m ? a.v[i / 4][i % 4] : m;
  return m;
}

QUIRE_INLINE F32x16 load_bf16_n(const uint16_t* p, int n) {
  U32x16 r = set1_u32(0);
  for (int i = 0; i < n; ++i) r.v[i / 4][i % 4] = uint32_t(p[i]) << 16;
  return floats(r);
}
QUIRE_INLINE F32x16 load_bf16(const uint16_t* p) { return load_bf16_n(p, 16); }
QUIRE_INLINE void store_bf16_n(uint16_t* p, F32x16 x, int n) {
  for (int i = 0; i < n; ++i) {
    const float f = x.v[i / 4][i % 4];
    const uint32_t u = bits(x).v[i / 4][i % 4];
    p[i] = uint16_t((f != f ? u | 0x400000u : u + 0x7fffu + (u >> 16 & 1u)) >> 16);
  }
}
QUIRE_INLINE void store_bf16(uint16_t* p, F32x16 x) { store_bf16_n(p, x, 16); }
QUIRE_INLINE void store_upper(uint16_t* p, U32x16 u) {
  for (int i = 0; i < 16; ++i) p[i] = uint16_t(u.v[i / 4][i % 4] >> 16);
}

// Half to single by scaling with a power of two, which mends subnormals; infinity and NaN keep an exponent of all ones.
QUIRE_INLINE F32x16 load_f16_n(const uint16_t* p, int n) {
  F32x16 r = zero();
  for (int i = 0; i < n; ++i) {
    const uint32_t h = p[i], magnitude = (h & 0x7fffu) << 13;
    float f;
    memcpy(&f, &magnitude, 4);
    f *= 0x1p112f;
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((h & 0x7c00u) == 0x7c00u) u = magnitude | 0x7f800000u;
    u |= (h & 0x8000u) << 16;
    memcpy(&f, &u, 4);
    r.v[i / 4][i % 4] = f;
  }
  return r;
}
QUIRE_INLINE F32x16 load_f16(const uint16_t* p) { return load_f16_n(p, 16); }
QUIRE_INLINE uint16_t narrow_f16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  const uint16_t sign = uint16_t(u >> 16 & 0x8000u);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return uint16_t(sign | 0x7e00u | (u >> 13 & 0x1ffu));
  if (u >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
  if (u < 0x38800000u) {  // a subnormal half: adding 0.5 lets the FPU round at 2^-24
    float a;
    memcpy(&a, &u, 4);
    a += 0.5f;
    memcpy(&u, &a, 4);
    return uint16_t(sign | (u - 0x3f000000u));
  }
  return uint16_t(sign | ((u - 0x38000000u + 0xfffu + (u >> 13 & 1u)) >> 13));
}
QUIRE_INLINE void store_f16_n(uint16_t* p, F32x16 x, int n) {
  for (int i = 0; i < n; ++i) p[i] = narrow_f16(x.v[i / 4][i % 4]);
}
QUIRE_INLINE void store_f16(uint16_t* p, F32x16 x) { store_f16_n(p, x, 16); }

// n <= 32 elements of 16 bits as 16 pairs, the even one in the low half; elements past n are zero.
QUIRE_INLINE U32x16 load_pairs_n(const uint16_t* p, int n) {
  U32x16 r = set1_u32(0);
  for (int i = 0; i < (n < 32 ? n : 32); ++i) r.v[i / 8][i / 2 % 4] |= uint32_t(p[i]) << (16 * (i % 2));
  return r;
}
QUIRE_INLINE U32x16 load_pairs(const uint16_t* p) { return load_pairs_n(p, 32); }
QUIRE_INLINE void store_pairs_n(uint16_t* p, U32x16 x, int n) {
  for (int i = 0; i < (n < 32 ? n : 32); ++i) p[i] = uint16_t(x.v[i / 8][i / 2 % 4] >> (16 * (i % 2)));
}

QUIRE_INLINE U32x16 load_bytes_n(const char* p, int n) {
  U32x16 r = set1_u32(0);
  memcpy(&r, p, size_t(n < 64 ? n : 64));
  return r;
}
QUIRE_INLINE U32x16 load_bytes(const char* p) { return load_bytes_n(p, 64); }
QUIRE_INLINE U32x16 load_u8_n(const char* p, int n) {
  U32x16 r = set1_u32(0);
  for (int i = 0; i < n; ++i) r.v[i / 4][i % 4] = uint8_t(p[i]);
  return r;
}
QUIRE_INLINE U32x16 load_u8(const char* p) { return load_u8_n(p, 16); }
QUIRE_INLINE F32x16 load_int8_n(const char* p, int n) {
  F32x16 r = zero();
  for (int i = 0; i < n; ++i) r.v[i / 4][i % 4] = float(int8_t(p[i]));
  return r;
}
QUIRE_INLINE F32x16 load_int8(const char* p) { return load_int8_n(p, 16); }

QUIRE_INLINE U32x16 settled(U32x16 a) { return a; }
QUIRE_INLINE uint32_t max_lanes(U32x16 a) {
  uint32_t m = 0;
  for (int i = 0; i < 16; ++i) m = a.v[i / 4][i % 4] > m ? a.v[i / 4][i % 4] : m;
  return m;
}
QUIRE_INLINE uint32_t sum_lanes(U32x16 a) {
  uint32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += a.v[i / 4][i % 4];
  return sum;
}
// r[i] lane j <-> r[j] lane i.
QUIRE_INLINE void transpose16(F32x16 r[16]) {
  float m[16][16];
  for (int i = 0; i < 16; ++i) store(m[i], r[i]);
  for (int i = 0; i < 16; ++i) {
    float column[16];
    for (int j = 0; j < 16; ++j) column[j] = m[j][i];
    r[i] = load(column);
  }
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
