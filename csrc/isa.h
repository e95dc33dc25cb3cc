// What an object of kernels is compiled for: QUIRE_ISA_<name>, which the build sets, as what kernels ask about; intrinsics; what compilers are told.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(QUIRE_ISA_amx)
#define QUIRE_AMX 1
#endif
#if defined(QUIRE_ISA_avx512bf16) || defined(QUIRE_AMX)
#define QUIRE_BF16_DOT 1
#endif
#if defined(QUIRE_BF16_DOT) && !defined(QUIRE_AMX)
#define QUIRE_VECTOR_DOTS 1  // of pairs of bf16 and of fours of bytes (AVX512-VNNI), and no tiles
#endif
#if defined(QUIRE_ISA_avx512) || (defined(QUIRE_ISA_avx2) && defined(QUIRE_AVX_VNNI))
#define QUIRE_MAYBE_VNNI 1  // CPUs with and without dot products of bytes, and a table of kernels for either
#endif
#if defined(QUIRE_ISA_avx512) || defined(QUIRE_BF16_DOT)
#define QUIRE_AVX512 1
#include <immintrin.h>
#elif defined(QUIRE_ISA_avx2)
#define QUIRE_AVX2 1
#include <immintrin.h>
#else
#define QUIRE_PLAIN 1
#endif

#if !defined(QUIRE_PLAIN) && !defined(QUIRE_AMX)
#define QUIRE_SHORT_EXPONENTS 1  // bf16 is packed in 12 bits (packed_short.h)
#endif

#define QUIRE_INLINE static inline __attribute__((always_inline))
// Before loops over sums that are to stay in registers: GCC 12 unrolls others too late to keep an array of them out of memory.
#if defined(__clang__)
#define QUIRE_UNROLL _Pragma("unroll")
#else
#define QUIRE_UNROLL _Pragma("GCC unroll 32")
#endif
