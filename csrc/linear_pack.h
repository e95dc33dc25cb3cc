// Weights to their packed form (packed_formats.h), and rows of it back to elements.
//
// A scale is rounded to bf16 before codes are chosen. int8: largest magnitude / 127. int4: extreme / -8, so that all 16 codes are of use and the
// extreme, whichever its sign, is one of them (of two that are equal, the positive one).
// No code stands for an element that is not finite: its span's scale is NaN.
#pragma once
#include "linear_packed.h"
#include "thread_memory.h"

namespace quire {
namespace QUIRE_ISA {
namespace {
namespace product {

constexpr int kStep = 64 * kLines;  // bytes of a unit

// 16 columns of W [N, K] to lines of elements. Only for a format of the same dtype.
template <class F>
void pack_lines(const PackArgs& g, int64_t n, int64_t k0, int64_t k1, char* out) {
  const auto* w = (const typename F::Elem*)g.w + n * g.stride;
  const int columns = n < g.n ? int(smaller(g.n - n, 16)) : 0;
  for (int64_t k = k0; k < k1; k += F::kPerLoad) {
    F32x16 r[16];
    load_transposed<F>(r, w + k, g.stride, columns, int(smaller(g.k - k, F::kPerLoad)));
    if constexpr (sizeof(typename F::Elem) == 2 && F::kPerLoad == 16) {  // halves, two of k to a line
      for (int i = 0; i < 16; ++i) F::narrow((typename F::Elem*)(out + i / 2 * kStep) + i % 2 * 16, r[i]);
      out += 8 * kStep;
    } else {
      for (int i = 0; i < 16; ++i) store((float*)(out + i * kStep), r[i]);
      out += 16 * kStep;
    }
  }
}

QUIRE_INLINE F32x16 clamped(F32x16 x, float low, float high) { return min(max(x, set1(low)), set1(high)); }

// cells [k, 16] of one span and 16 columns to a scale and codes.
template <class P>
void encode_span(const float* cells, int k, char* scales, char* out) {
  F32x16 high = zero(), low = zero(), none = zero();  // NaN where an element is not finite: no code can stand for it, so the scale says so
  for (int i = 0; i < k; ++i) {
    const F32x16 x = load(cells + 16 * i);
    high = max(x, high);
    low = min(x, low);
    none = fma(x, zero(), none);
  }
  const F32x16 negative = sub(zero(), low);
  F32x16 scale;
  if constexpr (P::kUnit == 4) {
    scale = div(max(high, negative), set1(127.0f));
  } else {
    scale = div(select(gt(negative, high), low, high), set1(-8.0f));
  }
  store_bf16((uint16_t*)scales, add(scale, none));
  scale = load_bf16((const uint16_t*)scales);
  const F32x16 divisor = select(eq(scale, zero()), set1(1.0f), scale);
  for (int at = 0; at < k; at += P::kUnit, out += kStep) {
    U32x16 nibbles = set1_u32(0);
    for (int i = P::kUnit - 1; i >= 0; --i) {
      const F32x16 code = round_nearest(div(load(cells + 16 * (at + i)), divisor));
      if constexpr (P::kUnit == 4) {
        float all[16];
        store(all, clamped(code, -127, 127));
        for (int j = 0; j < 16; ++j) out[P::place(j, i)] = char(int8_t(all[j]) ^ P::kFlipped);
      } else {
        nibbles = or_(shl<4>(nibbles), and_(bits(add(clamped(code, -8, 7), set1(0x1p23f + 8))), set1_u32(0xf)));
      }
    }
    if constexpr (P::kUnit == 8) store_u32((uint32_t*)out, nibbles);
  }
}

// 16 columns to their lines of a panel.
template <class F, class P>
void pack_group(const PackArgs& g, int64_t group, char* out) {
  const int64_t n = group * 16;
  const int line = int(group % kLines);
  for (int64_t k = 0; k < g.k; k += P::kSpan, out += kSpanBytes<P>) {
    char* codes = out + kScaleBytes<P> + 64 * line;
    if constexpr (P::kScaled) {
      alignas(64) float cells[P::kSpan * 16];
      const int columns = n < g.n ? int(smaller(g.n - n, 16)) : 0, here = int(smaller(g.k - k, P::kSpan));
      for (float& cell : cells) cell = 0;
      pack_nk<F>((const typename F::Elem*)g.w + n * g.stride + k, g.stride, columns, here, cells, 16);
      encode_span<P>(cells, int(round_up(here, P::kPad)), out + 32 * line, codes);
    } else {
      pack_lines<F>(g, n, k, smaller(k + P::kSpan, round_up(g.k, P::kPad)), codes);
    }
  }
}

#if defined(QUIRE_SHORT_EXPONENTS)
// Panels of 12 bits. Each thread packs a stretch of them as if those before took the most they can; then the stretches are moved together.
template <class F>
int64_t pack_short(const PackArgs& g) {
  using P = PackedBf16;
  auto* const begins = (int64_t*)g.packed + g.first / kWide;
  if (g.first == 0) {
    memset(begins, 0, size_t(lead_bytes<P>(g.total)));
    begins[0] = lead_bytes<P>(g.total);
  }
  char* const out = (char*)g.packed + begins[0];
  const int64_t panels = ceil_div(g.n, kWide), parts = smaller(g.num_threads, panels), steps = panel_bytes<P>(g.k) / kWholeStep;
  const auto first_of = [&](int64_t part) { return panels * part / parts; };
  parallel_for(g.num_threads, parts, [&](int64_t part, int) {
    static thread_local ThreadMemory memory;
    char *const lines = (char*)memory.get(panel_bytes<P>(g.k) / 4), *const from = out + first_of(part) * most_panel_bytes<P>(g.k), *at = from;
    for (int64_t panel = first_of(part); panel < first_of(part + 1); ++panel) {
      for (int64_t group = panel * kLines; group < (panel + 1) * kLines; ++group) pack_group<F, P>(g, group, lines);
      for (int64_t s = 0; s < steps; s += kShortSteps) at = close_block(lines + kWholeStep * s, int(smaller(steps - s, kShortSteps)), at);
      begins[panel + 1] = at - from;
    }
  });
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t to = begins[first_of(part)];
    memmove((char*)g.packed + to, out + first_of(part) * most_panel_bytes<P>(g.k), size_t(begins[first_of(part + 1)]));
    for (int64_t panel = first_of(part); panel < first_of(part + 1); ++panel) begins[panel + 1] += to;
  }
  return begins[panels];
}
#endif

template <class F, class P>
int64_t pack_as(const PackArgs& g) {
#if defined(QUIRE_SHORT_EXPONENTS)
  if constexpr (kShort<P>) return pack_short<F>(g);
#endif
  const int64_t bytes = panel_bytes<P>(g.k), before = g.first / kWide, panels = ceil_div(g.n, kWide);
  char* const out = (char*)g.packed + before * bytes;
  parallel_for(g.num_threads, panels * kLines, [&](int64_t group, int) { pack_group<F, P>(g, group, out + group / kLines * bytes); });
  return (before + panels) * bytes;
}

inline int64_t pack(const PackArgs* g) {
  if (g->format == kPackedF32) return pack_as<Fp32, PackedF32>(*g);
  if (g->format == kPackedBF16) return pack_as<WideBf16, PackedBf16>(*g);
  if (g->format == kPackedF16) return pack_as<Fp16, PackedF16>(*g);
  int64_t bytes = 0;
  with_packed(g->format, [&](auto packed) {
    using P = decltype(packed);
    if constexpr (P::kScaled) bytes = g->dtype == kF32 ? pack_as<Fp32, P>(*g) : g->dtype == kBF16 ? pack_as<WideBf16, P>(*g) : pack_as<Fp16, P>(*g);
  });
  return bytes;
}

template <class P>
float scale_of(const char* span, int64_t column) {
  return P::kScaled ? bf16_to_f32(((const uint16_t*)span)[column]) : 1.0f;
}

// 16 whole columns of a panel, one after the other, to 16 rows of elements.
template <class F, class P>
void whole_group(const UnpackArgs& g, const char* span, int line, typename F::Elem* out) {
  for (int64_t k = 0; k < g.k; k += P::kSpan, span += kSpanBytes<P>) {
    const char* w = span + kScaleBytes<P> + 64 * line;
    F32x16 scale = set1(1.0f);
    if constexpr (P::kScaled) scale = load_bf16((const uint16_t*)span + 16 * line);
    const int here = int(smaller(g.k - k, P::kSpan));
    for (int i = 0; i < here; i += 16, w += 16 / P::kUnit * kStep) {
      F32x16 r[16];
      for (int j = 0; j < 16; j += P::kUnit) decode<P>(P::raw(w + j / P::kUnit * kStep), r + j);
      if constexpr (P::kScaled)
        for (int j = 0; j < 16; ++j) r[j] = mul(r[j], scale);
      transpose16(r);
      for (int j = 0; j < 16; ++j) F::narrow_n(out + j * g.k + k + i, r[j], here - i < 16 ? here - i : 16);
    }
  }
}

template <class F, class P>
void one_row(const UnpackArgs& g, const char* span, int64_t n, typename F::Elem* out) {
  const int line = int(n / 16 % kLines), column = int(n % 16);
  for (int64_t k = 0; k < g.k; k += P::kSpan, span += kSpanBytes<P>) {
    const char* w = span + kScaleBytes<P> + 64 * line;
    const float scale = scale_of<P>(span, n % kWide);
    for (int64_t i = 0; i < smaller(g.k - k, P::kSpan); i += 16) {
      alignas(64) float row[16];
      const int here = int(smaller(g.k - k - i, 16));
      for (int j = 0; j < here; ++j) row[j] = P::element(w + (i + j) / P::kUnit * kStep, column, int((i + j) % P::kUnit)) * scale;
      F::narrow_n(out + k + i, load_n(row, here), here);
    }
  }
}

// Panels for one thread, the last one kept open.
template <class P>
struct Opened {
  const UnpackArgs& g;
  int64_t panel = -1;
  const char* open = nullptr;

  const char* at(int64_t wanted) {
    if (wanted == panel) return open;
    static thread_local ThreadMemory memory;
    panel = wanted;
    return open = opened<P>(g.packed, wanted, g.k, kShort<P> ? (char*)memory.get(panel_bytes<P>(g.k) / 4) : nullptr);
  }
};

template <class F>
void rows_as(const UnpackArgs& g) {
  with_packed(g.format, [&](auto packed) {
    using P = decltype(packed);
    const int64_t parts = smaller(g.num_threads, ceil_div(g.count, 16));
    parallel_for(g.num_threads, parts, [&](int64_t part, int) {
      Opened<P> panels{g};
      const int64_t groups = ceil_div(g.count, 16), last = smaller(groups * (part + 1) / parts * 16, g.count);
      for (int64_t first = groups * part / parts * 16; first < last; first += 16) {
        auto* out = (typename F::Elem*)g.out + first * g.k;
        const int64_t n = g.ids[first];
        bool whole = first + 16 <= g.count && n % 16 == 0;
        for (int i = 1; whole && i < 16; ++i) whole = g.ids[first + i] == n + i;
        if (whole) {
          whole_group<F, P>(g, panels.at(n / kWide), int(n / 16 % kLines), out);
        } else {
          for (int64_t i = 0; i < smaller(last - first, 16); ++i) one_row<F, P>(g, panels.at(g.ids[first + i] / kWide), g.ids[first + i], out + i * g.k);
        }
      }
    });
  });
}

inline void rows(const UnpackArgs* g) { g->dtype == kF32 ? rows_as<Fp32>(*g) : g->dtype == kBF16 ? rows_as<WideBf16>(*g) : rows_as<Fp16>(*g); }

inline int64_t packed_bytes(int32_t format, int64_t n, int64_t k) {
  int64_t bytes = 0;
  with_packed(format, [&](auto packed) { bytes = most_bytes<decltype(packed)>(n, k); });
  return bytes;
}

}  // namespace product
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
