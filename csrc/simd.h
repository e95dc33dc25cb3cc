// Sixteen fp32 lanes, whatever the CPU: one register of AVX-512, two of AVX2, four of SSE or NEON. Kernels are written
// once against these types, so every instruction set runs the same algorithm in the same order.
//
//   F32x16   load load_n store store_n set1 zero  add sub mul div fma fnma max min  round_nearest scale_pow2
//   U32x16   load_u32 store_u32 set1_u32 load_cell (one for all lanes) add mul xor_ and_ or_ shl<n> shr<n> to_f32 to_i32  bits(F32x16) floats(U32x16)
//   Mask16   lt gt eq lanes_between  lanes_of(16 bits)  select(mask, if_set, if_clear)  mask_bits
//   16 bit   load_pairs[_n] store_pairs_n make_pairs pair_low pair_high  store_upper (the upper half of each lane)
//            load_bf16[_n] store_bf16[_n] load_f16[_n] store_f16[_n]   (stores round to nearest even, NaN stays NaN)
//   bytes    load_bytes[_n] (64, four to a lane)  load_u8[_n] (16, one to a lane)  load_int8[_n] (16, as fp32)
//            shuffle16 (bytes within each 16 of them, in an order)
//            with AVX2 or AVX-512, for packed_short.h: load_16_for_all  low_words high_words (of each 16 bytes of two vectors, byte beside byte)
//            bytes_of_words (the way back)  sub_bytes min_bytes max_bytes (unsigned)  same
//   words    32 of 16 bits: max_halves (unsigned) add_words  dot_words (signed pairs, to a lane)  words_of_bytes (unsigned bytes times signed ones,
//            in pairs, which must not be more than a word)  shr_words<n>  sum_words  store_bytes (the lower byte of each)
//   settled  of integer sums: GCC 12 would add up what several steps give first, for which there are not registers enough
//   in order sum_lanes max_lanes   exp exp2 tanh (simd_math.h)   transpose16   dot_pair prefetch prefetch_l2
//
// `_n` loads read only the first n elements (the other lanes are zero), `_n` stores write only those.
// fma(a, b, c) = a * b + c with one rounding where the CPU has it; max and min return the second operand on NaN.
#pragma once
#include "isa.h"
#include "simd_avx2.h"
#include "simd_avx512.h"
#include "simd_plain_words.h"

namespace quire {
namespace QUIRE_ISA {
namespace {

QUIRE_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
QUIRE_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

QUIRE_INLINE float bf16_to_f32(uint16_t h) {
  const uint32_t u = uint32_t(h) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

// The two bf16 halves of each 32-bit lane as fp32: the even element sits in the low half.
QUIRE_INLINE F32x16 pair_low(U32x16 pairs) { return floats(shl<16>(pairs)); }
QUIRE_INLINE F32x16 pair_high(U32x16 pairs) { return floats(and_(pairs, set1_u32(0xffff0000u))); }

#if !defined(QUIRE_AVX512)
// fp32 rounded to bf16 in the upper half of each lane; the lower half is rubbish.
QUIRE_INLINE U32x16 round_bf16(F32x16 x) {
  const U32x16 u = bits(x), odd = and_(shr<16>(u), set1_u32(1));
  return bits(select(eq(x, x), floats(add(add(u, set1_u32(0x7fff)), odd)), floats(or_(u, set1_u32(0x400000)))));
}
#endif
QUIRE_INLINE U32x16 make_pairs(F32x16 low, F32x16 high) {
  return or_(shr<16>(round_bf16(low)), and_(round_bf16(high), set1_u32(0xffff0000u)));
}

// The two words of each lane, added up.
QUIRE_INLINE U32x16 sum_words(U32x16 words) { return dot_words(words, set1_u32(0x00010001u)); }

#if !defined(QUIRE_BF16_DOT)
// acc + a.even * b.even + a.odd * b.odd, in that order.
QUIRE_INLINE F32x16 dot_pair(F32x16 acc, U32x16 a, U32x16 b) {
  acc = fma(pair_low(a), pair_low(b), acc);
  return fma(pair_high(a), pair_high(b), acc);
}
#endif

// Stores the lanes of the mask next to each other at p, which has room for 16, and returns how many they are.
QUIRE_INLINE int compress(float* p, F32x16 x, Mask16 m) {
  const uint32_t lanes = mask_bits(m);
#if defined(QUIRE_AVX512)
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps(m.m, x.v));
  return __builtin_popcount(lanes);
#else
  float all[16];
  store(all, x);
  int kept = 0;
  for (int i = 0; i < 16; ++i) {
    p[kept] = all[i];
    kept += int(lanes >> i & 1u);
  }
  return kept;
#endif
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
