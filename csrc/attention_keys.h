// A tile's keys, transposed to scratch: for few query rows a few columns at a time, scored at once; for many rows all of them,
// decoded, so that there are only fp32 columns and, for bf16 keys, columns of pairs. Both leave the same numbers and sum them
// up in the same order.
#pragma once
#include "attention_micro.h"

namespace quire {
namespace QUIRE_ISA {
namespace {

// 16 keys, n <= E::kSpan head dimensions from d on, as columns.
template <class E>
QUIRE_INLINE void transpose_lanes(const char* const* keys, int d, int n, F32x16* columns) {
  for (int i = 0; i < 16; ++i) columns[i] = E::lanes(keys[i], d, n);
  transpose16(columns);
}

// The scale that each of 16 keys has for head dimension d.
template <class E>
QUIRE_INLINE F32x16 scales_at(const char* const* keys, int k_dim, int d) {
  char bytes[16];
  for (int i = 0; i < 16; ++i) bytes[i] = keys[i][E::scales(k_dim, d)];
  return scales_of_bytes(load_u8(bytes));
}

// Query rows of one panel, and where their scores go.
struct QueryRows {
  const float* q;
  float* scores;
  int rows, groups;  // groups of 16 keys that they see any of
};

// All scores of a tile. Columns outside the groups of 16 that hold keys are rubbish.
template <class E, bool kDot = false>
void score_few(const Rows& tile, int k_dim, const QueryRows* queries, int num_queries, const Columns& to, Lines& lines) {
  for (int d = 0; d < k_dim; d += E::kSpan) {
    const int n = k_dim - d < E::kSpan ? k_dim - d : E::kSpan;
    for (int key = tile.lo & ~15; key < tile.hi; key += 16) {
      ask_together<kPatchLines>(lines);
      F32x16 columns[16];
      transpose_lanes<E>(tile.k + key, d, n, columns);
      for (int i = 0; i < 16; ++i) store(to.at + i * kTile + key, columns[i]);
      if constexpr (E::kScaleColumns > 0)
        for (int i = 0; i * E::kPer < n; i += E::kScaleColumns)
          store(to.scales + i / E::kScaleColumns * kTile + key, scales_at<E>(tile.k + key, k_dim, d + i * E::kPer));
    }
    for (int i = 0; i < num_queries; ++i) {
      const QueryRows& x = queries[i];
      add_scores<E, kDot>(x.rows, x.q + (kDot ? d / 2 : d) * kMaxRows, to, x.groups, n, d == 0, x.scores, lines);
    }
  }
}

// A tile's keys as panels of F; columns outside the groups of 16 that hold keys stay as they are.
template <class E, Keys F>
void transpose_keys(const Rows& tile, int k_dim, float* panels, int64_t panel_stride) {
  for (int key = tile.lo & ~15; key < tile.hi; key += 16) {
    float* to = panels + key / kPanelLanes * panel_stride + key % kPanelLanes;
    for (int d = 0; d < k_dim; d += E::kSpan) {
      const int n = k_dim - d < E::kSpan ? k_dim - d : E::kSpan;
      F32x16 columns[16];
      transpose_lanes<E>(tile.k + key, d, n, columns);
      typename E::Scale scale;
      for (int i = 0; i * E::kPer < n; ++i) {
        if constexpr (E::kScaleColumns > 0)
          if (i % E::kScaleColumns == 0) scale = E::spread(scales_at<E>(tile.k + key, k_dim, d + i * E::kPer));
        for (int p = 0; p < (F == Keys::kFloat ? E::kPer : 1); ++p, to += kPanelLanes)
          store(to, F == Keys::kFloat ? E::pick(columns[i], scale, p) : columns[i]);
      }
    }
  }
}

enum class Queries { kFloats, kPairs, kBytes };  // what queries are wanted as

// What there is to know of a format of keys. `score_few` serves blocks of up to kDirectRows rows, the other two the larger ones.
struct KeyFormat {
  void (*score_few)(const Rows& tile, int k_dim, const QueryRows* queries, int num_queries, const Columns& to, Lines& lines);
  void (*transpose)(const Rows& tile, int k_dim, float* panels, int64_t panel_stride);
  void (*score_panel)(int rows, const float* q, const KeyPanels& keys, int first, int groups, int k_dim, float* scores);
  Queries queries;
};

template <class E, bool kDot = false, Keys F = Keys::kFloat>
constexpr KeyFormat key_format() {
  return {&score_few<E, kDot>, &transpose_keys<E, F>, &score_panel<F, kMaxRows>, kDot ? Queries::kPairs : Queries::kFloats};
}

#if defined(QUIRE_BF16_DOT)
constexpr bool kBrainDot = true;
#else
constexpr bool kBrainDot = false;
#endif
constexpr Keys kBrainPanels = kPanel < 2 ? Keys::kFloat : kBrainDot ? Keys::kDotPairs : Keys::kWidenPairs;

// By DType and Format.
constexpr KeyFormat kKeyFormats[] = {
    key_format<Single>(), key_format<Brain, kBrainDot, kBrainPanels>(), key_format<Half>(), key_format<Int8>(), key_format<Int4>(),
};

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
