// A tile's values: used where they lie for few query rows, copied to scratch for many, and what goes with each format.
#pragma once
#include "attention_pairs.h"
#include "attention_softmax.h"

namespace quire {
namespace QUIRE_ISA {
namespace {

// A tile's values as panels, by units (see elements.h), filled up to whole ones. False if one is not finite.
template <class E, bool kPairs>
bool copy_values(const Rows& rows, int v_dim, float* panels) {
  constexpr int kUnit = 16 * E::kVecs;
  U32x16 zeros = set1_u32(0);  // +0 and -0 only, as long as all values are finite
  for (int d = 0; d < v_dim; d += kUnit) {
    const int n = v_dim - d < kUnit ? v_dim - d : kUnit;
    for (int key = rows.lo; key < rows.hi; ++key) {
      F32x16 x[E::kVecs];
      if constexpr (kPairs) {
        const uint16_t* from = (const uint16_t*)rows.v[key] + d;
        const U32x16 pairs = n == kUnit ? load_pairs(from) : load_pairs_n(from, n);
        store(panels + PanelValues<true>::place(key, d), floats(pairs));
        E::split(pairs, x);
      } else {
        const typename E::Row from = E::row(rows.v[key], v_dim, d);
        if (n == kUnit)
          E::read(from, 0, x);
        else
          E::read_n(from, x, n);
        for (int i = 0; i < E::kVecs; ++i) store(panels + PanelValues<false>::place(key, d + 16 * i), x[i]);
      }
      for (int i = 0; i < E::kVecs; ++i) zeros = or_(zeros, bits(mul(x[i], zero())));
    }
  }
  return mask_bits(eq(floats(zeros), zero())) == 0xffff;
}

struct ValueFormat {
  using Softmax = void (*)(int rows, int groups, const int* lo, const int* hi, float scale, float softcap, const float* value_scales, float* scores, float* max,
                           float* sums, float* alpha);
  using Scales = void (*)(const Rows& rows, int v_dim, float* to);
  using Copy = bool (*)(const Rows& rows, int v_dim, float* panels);
  using OutputFew = void (*)(int rows, const float* p, const char* const* values, int lo, int hi, int v_dim, const float* alpha, float* out,
                             int64_t out_stride, Fetcher& fetcher);
  using OutputPanel = void (*)(int rows, const Terms* terms, int count, int d, int vecs, float* out, int64_t out_stride);
  Softmax softmax;
  Copy copy;
  OutputFew output_few;
  OutputPanel output_panel;
  int vecs;      // of a unit: outputs come in the order of values (see elements.h)
  int together;  // keys that one instruction multiplies
  Scales scales;  // of a tile's values, for those whose weights have them in; or null
  bool whole;     // outputs want all keys of a tile at once: weights of those that a row does not see are zero, whatever the values
};

template <class E, bool kPairs = false>
constexpr ValueFormat value_format() {
  return {&softmax_rows, &copy_values<E, kPairs>, &output_few<E, kDirectRows>, &output_panel<kPairs, kMaxRows>, E::kVecs, 1, nullptr, false};
}

#if defined(QUIRE_VECTOR_DOTS)
constexpr ValueFormat kBrainValues = {&softmax_pairs, &copy_pairs, &output_pairs_few<kDirectRows>, &output_pairs_panel<kMaxRows>, Brain::kVecs, 2, nullptr, false};
#else
constexpr ValueFormat kBrainValues = value_format<Brain, (kPanel >= 2)>();
#endif

// By DType and Format.
constexpr ValueFormat kValueFormats[] = {
    value_format<Single>(), kBrainValues, value_format<Half>(), value_format<Int8>(), value_format<Int4>(),
};

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
