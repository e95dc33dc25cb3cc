// simd.h for any CPU: lanes as two words of 16 bits, or as four bytes.
#pragma once
#include "simd_plain.h"

#if defined(QUIRE_PLAIN)
namespace quire {
namespace QUIRE_ISA {
namespace {

typedef int16_t i16x8 __attribute__((vector_size(16)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));

QUIRE_INLINE U32x16 max_halves(U32x16 a, U32x16 b) {
  uint16_t x[32], y[32];
  memcpy(x, &a, 64);
  memcpy(y, &b, 64);
  for (int i = 0; i < 32; ++i) x[i] = x[i] > y[i] ? x[i] : y[i];
  memcpy(&a, x, 64);
  return a;
}
template <int N>
QUIRE_INLINE U32x16 shr_words(U32x16 a) {
  QUIRE_EACH a.v[i] = (u32x4)((u16x8)a.v[i] >> N);
  return a;
}
QUIRE_INLINE U32x16 add_words(U32x16 a, U32x16 b) {
  QUIRE_EACH a.v[i] = (u32x4)((i16x8)a.v[i] + (i16x8)b.v[i]);
  return a;
}
QUIRE_INLINE U32x16 dot_words(U32x16 a, U32x16 b) {
  QUIRE_EACH {
#if defined(__SSE2__)  // which has no multiplication of 32-bit lanes
    a.v[i] = (u32x4)__builtin_ia32_pmaddwd128((i16x8)a.v[i], (i16x8)b.v[i]);
#else
    const i32x4 x = (i32x4)a.v[i], y = (i32x4)b.v[i];
    a.v[i] = (u32x4)((x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16));
#endif
  }
  return a;
}
QUIRE_INLINE U32x16 words_of_bytes(U32x16 bytes, U32x16 by) {
  QUIRE_EACH {
    const i16x8 x = (i16x8)bytes.v[i], y = (i16x8)by.v[i];
    bytes.v[i] = (u32x4)((x & 0xff) * (y << 8 >> 8) + (x >> 8 & 0xff) * (y >> 8));
  }
  return bytes;
}
QUIRE_INLINE U32x16 shuffle16(U32x16 a, const uint8_t (&order)[16]) {
  char from[64], to[64];
  memcpy(from, &a, 64);
  for (int i = 0; i < 64; ++i) to[i] = from[i / 16 * 16 + order[i % 16]];
  memcpy(&a, to, 64);
  return a;
}
QUIRE_INLINE void store_bytes(char* p, U32x16 words) {
  for (int i = 0; i < 32; ++i) p[i] = char(words.v[i / 8][i / 2 % 4] >> (16 * (i % 2)));
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
