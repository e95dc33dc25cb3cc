// What tiles_amx.h asks of AMX, computed in vectors with the same bits: for tests of its kernels on a CPU that has AVX512-BF16 and no tiles
// (-DQUIRE_EMULATED_TILES=ON). Tens of times as slow.
#pragma once
#include "simd.h"

namespace quire {
namespace QUIRE_ISA {
namespace {

struct EmulatedTiles {
  alignas(64) char tile[8][16][64];
  int rows[8];
};

// Of this thread, while it has shapes for them.
inline EmulatedTiles& emulated_tiles() {
  static thread_local EmulatedTiles own;
  return own;
}

// Denormal operands and results are zero while one lives.
struct WithoutDenormals {
  const uint32_t before = _mm_getcsr();
  WithoutDenormals() { _mm_setcsr(before | 0x8040u); }
  ~WithoutDenormals() { _mm_setcsr(before); }
};

template <int T>
void tile_zero() { memset(emulated_tiles().tile[T], 0, sizeof emulated_tiles().tile[T]); }
template <int T>
void tile_load(const void* p, int64_t stride) {
  tile_zero<T>();
  for (int r = 0; r < emulated_tiles().rows[T]; ++r) memcpy(emulated_tiles().tile[T][r], (const char*)p + r * stride, 64);
}
template <int T>
void tile_load_once(const void* p, int64_t stride) { tile_load<T>(p, stride); }
template <int T>
void tile_store(void* p, int64_t stride) {
  for (int r = 0; r < emulated_tiles().rows[T]; ++r) memcpy((char*)p + r * stride, emulated_tiles().tile[T][r], 64);
}

template <int C, int A, int B>
__attribute__((noinline)) void tile_dot() {
  EmulatedTiles& t = emulated_tiles();
  const WithoutDenormals flushed;
  for (int m = 0; m < t.rows[C]; ++m) {
    F32x16 even = zero(), odd = zero();
    for (int pair = 0; pair < 16; ++pair) {
      const U32x16 a = load_cell(t.tile[A][m] + 4 * pair), b = load_u32((const uint32_t*)t.tile[B][pair]);
      even = fma(pair_low(a), pair_low(b), even);
      odd = fma(pair_high(a), pair_high(b), odd);
    }
    auto* const sums = (float*)t.tile[C][m];
    store(sums, add(load(sums), add(even, odd)));
  }
}

template <int C, int A, int B>
__attribute__((noinline)) void tile_dot_bytes() {
  EmulatedTiles& t = emulated_tiles();
  for (int m = 0; m < t.rows[C]; ++m) {
    auto* const sums = (int32_t*)t.tile[C][m];
    const auto* const a = (const int8_t*)t.tile[A][m];
    for (int four = 0; four < 16; ++four)
      for (int n = 0; n < 16; ++n)
        for (int i = 0; i < 4; ++i) sums[n] += a[4 * four + i] * ((const int8_t*)t.tile[B][four])[4 * n + i];
  }
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
