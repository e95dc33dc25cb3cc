// The noise of a draw: a function of (seed, position, token) alone, so a token is drawn alike in any company.
// Threefry-2x32 with 20 rounds (J. Salmon, M. Moraes, R. Dror, D. Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011):
// keyed by the seed, counting (token, position); it passes BigCrush, counters and keys that differ by one included.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace quire {
namespace QUIRE_ISA {
namespace {

// One counter gives two words: of each block of 32 tokens, the first 16 take the first word and the others the second, so
// that lanes stay in the order of tokens. A token's counter is (token / 32 * 16 + token % 16, position).
constexpr int kNoiseBlock = 32;

struct NoiseWords {
  U32x16 first, second;
};

struct NoiseKey {
  uint32_t k[3], position;
};

QUIRE_INLINE NoiseKey noise_key(uint64_t seed, int32_t position) {
  const uint32_t low = uint32_t(seed), high = uint32_t(seed >> 32);
  return {{low, high, 0x1bd11bdau ^ low ^ high}, uint32_t(position)};
}

template <int N>
QUIRE_INLINE void threefry_round(U32x16& a, U32x16& b) {
  a = add(a, b);
  b = xor_(or_(shl<N>(b), shr<32 - N>(b)), a);
}

QUIRE_INLINE NoiseWords noise_words(const NoiseKey& key, int64_t block) {
  alignas(64) static const uint32_t kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  U32x16 a = add(load_u32(kLane), set1_u32(uint32_t(block) * 16u + key.k[0]));
  U32x16 b = set1_u32(key.position + key.k[1]);
  for (uint32_t i = 1; i <= 5; ++i) {
    if (i % 2) {
      threefry_round<13>(a, b), threefry_round<15>(a, b), threefry_round<26>(a, b), threefry_round<6>(a, b);
    } else {
      threefry_round<17>(a, b), threefry_round<29>(a, b), threefry_round<16>(a, b), threefry_round<24>(a, b);
    }
    a = add(a, set1_u32(key.k[i % 3]));
    b = add(b, set1_u32(key.k[(i + 1) % 3] + i));
  }
  return {a, b};
}

// -log(-log(1 - v)) for v = (word + 1/2) / 2^32: a standard Gumbel variate, to full precision.
double gumbel(uint32_t word) { return -__builtin_log(-__builtin_log1p(-(double(word) + 0.5) * 0x1p-32)); }

// The least and the largest Gumbel variate there are, -log(33 log 2) and 33 log 2, each a little beyond.
constexpr float kLeastGumbel = -3.14f, kMostGumbel = 22.88f;

// A little more than the words' Gumbel variates, for a fraction of the price: they lie below -log(v), and a float read as an
// integer is its binary logarithm, a little too low (J. Mitchell, "Computer multiplication and division using binary logarithms",
// 1962). With this a scan passes over all tokens that cannot win, and a draw takes few logarithms.
QUIRE_INLINE F32x16 gumbel_bound(U32x16 words) {
  constexpr float kLog2 = 0.69314718f, kSlack = 1e-3f;  // wider than any rounding on the way
  const F32x16 v = to_f32(shr<1>(words));               // rounded down, times 2^31
  return fma(to_f32(bits(v)), set1(-kLog2 * 0x1p-23f), set1(kLog2 * (127 + 31) + kSlack));
}

void noise(uint64_t seed, int32_t position, int64_t count, uint32_t* out) {
  const NoiseKey key = noise_key(seed, position);
  for (int64_t block = 0; block < count / kNoiseBlock; ++block) {
    const NoiseWords words = noise_words(key, block);
    store_u32(out + block * kNoiseBlock, words.first);
    store_u32(out + block * kNoiseBlock + 16, words.second);
  }
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
