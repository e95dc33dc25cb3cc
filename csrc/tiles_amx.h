// AMX: eight registers t0..t7 of up to 16 rows of 64 bytes, and one instruction that multiplies two of them into a third.
//
//   C [M, 16] fp32  +=  A [M, 32] bf16  x  B [16 pairs of k, 16 columns] bf16 pairs,   M <= 16
//
// In what order it adds (Intel's manual, TDPBF16PS): for each m and n, e = fma(A[m, k], B[k, n], e) over even k ascending, from 0, and o
// likewise over odd k; then C[m, n] += e + o. Denormal numbers count as zero. So an output's bits depend on nothing but its row and its column.
//
//   C [M, 16] int32 +=  A [M, 64] int8  x  B [16 fours of k, 16 columns] fours of int8, exact (TDPBSSD)
#pragma once
#include "simd.h"
#if defined(QUIRE_AMX) && defined(QUIRE_EMULATED_TILES)
#include "tiles_emulated.h"
#endif

#if defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {

constexpr int kTileK = 32, kTileBytes = 1024;  // k of one multiplication; a whole tile

// Shapes of a thread's tiles from here on, until it ends: whoever else uses them on this thread (oneDNN) sets its own.
struct TileShapes {
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  // `few`: the tiles, as bits, that have only `few_rows` rows.
  explicit TileShapes(int few_rows = 16, uint32_t few = 0) {
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = uint8_t(few >> i & 1u ? few_rows : 16);
    }
#if defined(QUIRE_EMULATED_TILES)
    for (int i = 0; i < 8; ++i) emulated_tiles().rows[i] = config.rows[i];
  }
#else
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  ~TileShapes() { asm volatile("tilerelease" ::: "memory"); }
#endif
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;
};

// While one lives, what its thread computes in vectors and is below the smallest normal number is zero, as tiles have it: keeping it takes a CPU 50 ns.
struct FlushedSmall {
  const uint32_t before = _mm_getcsr();
  FlushedSmall() { _mm_setcsr(before | 0x8000u); }
  ~FlushedSmall() { _mm_setcsr(before); }
  FlushedSmall(const FlushedSmall&) = delete;
  FlushedSmall& operator=(const FlushedSmall&) = delete;
};

#if !defined(QUIRE_EMULATED_TILES)
// Written out, since GCC's intrinsics do not say that they read and write memory, and their order against plain loads and stores is lost.
template <int T>
QUIRE_INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T>
QUIRE_INLINE void tile_load(const void* p, int64_t stride) { asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory"); }
// The same for what passes by, and is not to take the place of what stays in the first cache.
template <int T>
QUIRE_INLINE void tile_load_once(const void* p, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
QUIRE_INLINE void tile_store(void* p, int64_t stride) { asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory"); }
template <int C, int A, int B>
QUIRE_INLINE void tile_dot() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B)); }
template <int C, int A, int B>
QUIRE_INLINE void tile_dot_bytes() { asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B)); }
#endif

// C 0..3, which hold sums; in memory they lie one after the other.
QUIRE_INLINE void zero_sums() {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
}
QUIRE_INLINE void load_sums(const char* from) {
  tile_load<0>(from, 64);
  tile_load<1>(from + kTileBytes, 64);
  tile_load<2>(from + 2 * kTileBytes, 64);
  tile_load<3>(from + 3 * kTileBytes, 64);
}
QUIRE_INLINE void store_sums(char* to) {
  tile_store<0>(to, 64);
  tile_store<1>(to + kTileBytes, 64);
  tile_store<2>(to + 2 * kTileBytes, 64);
  tile_store<3>(to + 3 * kTileBytes, 64);
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
