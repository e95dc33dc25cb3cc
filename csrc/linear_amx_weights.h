// How a weight gives the operands of products on AMX (linear_amx.h): a packed one of bf16 where it lies, any other through `block`, which writes those
// of `steps` steps of a panel, from k0 on, to scratch [step][line][1 KB], whether it is of codes or as the model has it. `at` is where a packed
// panel's bytes for k0 begin, `bytes` how many a panel has.
#pragma once
#include "linear_packed.h"
#include "tiles_amx.h"

#if defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace product {

constexpr int kStepBytes = kTileBytes * kLines;  // of a panel, for one step of k
constexpr int kInterleaved = 64 * kLines;       // from pair to pair of a line, as packed; in scratch they lie together

QUIRE_INLINE int64_t steps_of(int64_t k) { return ceil_div(k, kTileK); }

// A packed weight of bf16.
struct Packed {
  static constexpr bool kStreams = true;
  QUIRE_INLINE int64_t bytes(const LinearArgs& g) { return panel_bytes<PackedBf16>(g.k); }
  QUIRE_INLINE const char* at(const LinearArgs& g, int64_t panel, int64_t k0) { return (const char*)g.w + panel * bytes(g) + k0 / kTileK * kStepBytes; }
};

// A weight of codes.
template <class P>
struct Decoded {
  static constexpr bool kStreams = false;
  QUIRE_INLINE int64_t bytes(const LinearArgs& g) { return panel_bytes<P>(g.k); }
  QUIRE_INLINE const char* at(const LinearArgs& g, int64_t panel, int64_t k0) { return (const char*)g.w + panel * bytes(g) + k0 / kBlock * kBlockBytes<P>; }
  static void block(const LinearArgs& g, int64_t panel, int64_t k0, int steps, char* out) {
    const char* span = at(g, panel, k0);
    const int64_t end = smaller(k0 + steps * kTileK, round_up(g.k, P::kPad));
    if (end % kTileK) memset(out + (steps - 1) * kStepBytes, 0, kStepBytes);  // k is filled up to 16, a step is 32
    for (; k0 < end; k0 += P::kSpan, span += kSpanBytes<P>, out += P::kSpan / kTileK * kStepBytes) {
      F32x16 scales[kLines];
      QUIRE_UNROLL for (int line = 0; line < kLines; ++line) scales[line] = load_bf16((const uint16_t*)span + 16 * line);
      const char* w = span + kScaleBytes<P>;
      const int here = int(smaller(end - k0, P::kSpan));
      for (int k = 0; k < here; k += P::kUnit) {
        char* const to = out + k / kTileK * kStepBytes + k % kTileK * 32;
        QUIRE_UNROLL for (int line = 0; line < kLines; ++line, w += 64) {
          __builtin_prefetch(w + kAhead, 0, 2);
          F32x16 cells[P::kUnit];
          decode<P>(P::raw(w), cells);
          QUIRE_UNROLL for (int i = 0; i < P::kUnit; i += 2)
            store_u32((uint32_t*)(to + line * kTileBytes + 32 * i), brain_pairs(mul(cells[i], scales[line]), mul(cells[i + 1], scales[line])));
        }
      }
    }
  }
};

// A weight as the model has it.
template <bool kKN>
struct AsItLies {
  static constexpr bool kStreams = false;
  QUIRE_INLINE int64_t bytes(const LinearArgs&) { return 0; }
  QUIRE_INLINE const char* at(const LinearArgs& g, int64_t, int64_t) { return (const char*)g.w; }
  static void block(const LinearArgs& g, int64_t panel, int64_t k0, int steps, char* out) {
    for (int line = 0; line < kLines; ++line) {
      const int64_t n = panel * kWide + 16 * line;
      const int columns = n < g.n ? int(smaller(g.n - n, 16)) : 0;
      for (int s = 0; s < steps; ++s) {
        const int64_t k = k0 + s * kTileK;
        float* to = (float*)(out + s * kStepBytes + line * kTileBytes);
        if constexpr (kKN) {
          const auto* w = (const uint16_t*)g.w + k * g.w_stride + n;
          for (int i = 0; i < kTileK; i += 2, to += 16)
            store(to, k + i < g.k ? across<Bf16>(w + i * g.w_stride, g.w_stride, int(smaller(g.k - k - i, 2)), columns) : zero());
        } else {
          const auto* w = (const uint16_t*)g.w + n * g.w_stride + k;
          F32x16 r[16];
          for (int i = 0; i < columns; ++i) __builtin_prefetch(w + i * g.w_stride + kBlock, 0, 2);
          load_transposed<Bf16>(r, w, g.w_stride, columns, int(smaller(g.k - k, kTileK)));
          QUIRE_UNROLL for (int i = 0; i < 16; ++i) store(to + 16 * i, r[i]);
        }
      }
    }
  }
};

}  // namespace product
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
