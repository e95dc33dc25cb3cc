// One tile of a sequence's keys and values: where its rows lie (pages or this step's staged tensors), and its copies in
// scratch, transposed for scores and widened for the output.
#pragma once
#include "attention_micro.h"
#include "kernels.h"
#include "simd.h"

namespace quire {
namespace QUIRE_ISA {
namespace {

// The dtypes. `widen` reads 16 elements in order. Values and outputs go by units of kVecs vectors instead: a unit of bf16 is
// 32 elements, the even ones in one vector and the odd ones in the next, which costs no shuffle either way.
struct Single {
  using Element = float;
  static constexpr bool kPairs = false;
  static constexpr int kVecs = 1;
  QUIRE_INLINE F32x16 widen(const float* p) { return load(p); }
  QUIRE_INLINE F32x16 widen_n(const float* p, int n) { return load_n(p, n); }
  QUIRE_INLINE void read(const float* p, F32x16* x) { x[0] = load(p); }
  QUIRE_INLINE void read_n(const float* p, F32x16* x, int n) { x[0] = load_n(p, n); }
  QUIRE_INLINE void write_n(float* p, const F32x16* x, int n) { store_n(p, x[0], n); }
};
struct Half {
  using Element = uint16_t;
  static constexpr bool kPairs = false;
  static constexpr int kVecs = 1;
  QUIRE_INLINE F32x16 widen(const uint16_t* p) { return load_f16(p); }
  QUIRE_INLINE F32x16 widen_n(const uint16_t* p, int n) { return load_f16_n(p, n); }
  QUIRE_INLINE void read(const uint16_t* p, F32x16* x) { x[0] = load_f16(p); }
  QUIRE_INLINE void read_n(const uint16_t* p, F32x16* x, int n) { x[0] = load_f16_n(p, n); }
  QUIRE_INLINE void write_n(uint16_t* p, const F32x16* x, int n) { store_f16_n(p, x[0], n); }
};
struct Brain {
  using Element = uint16_t;
  static constexpr bool kPairs = true;
  static constexpr int kVecs = 2;
  QUIRE_INLINE F32x16 widen(const uint16_t* p) { return load_bf16(p); }
  QUIRE_INLINE F32x16 widen_n(const uint16_t* p, int n) { return load_bf16_n(p, n); }
  QUIRE_INLINE void split(U32x16 pairs, F32x16* x) {
    x[0] = pair_low(pairs);
    x[1] = pair_high(pairs);
  }
  QUIRE_INLINE void read(const uint16_t* p, F32x16* x) { split(load_pairs(p), x); }
  QUIRE_INLINE void read_n(const uint16_t* p, F32x16* x, int n) { split(load_pairs_n(p, n), x); }
  QUIRE_INLINE void write_n(uint16_t* p, const F32x16* x, int n) { store_pairs_n(p, make_pairs(x[0], x[1]), n); }
};

// One sequence seen from one KV head.
template <class D>
struct History {
  using Element = typename D::Element;
  const PageLayout* layout;
  const Element *staged_k, *staged_v;  // of the sequence's first token in this step
  int64_t k_token_stride, v_token_stride;
  const int32_t* page_ids;
  int32_t num_committed, head;
};

// Where a tile's rows lie: entries lo..hi-1, and zeros for the rest of the groups of 16 keys that these begin and end.
template <class E>
struct Rows {
  const E* k[kTile];
  const E* v[kTile];
  int64_t base = -1;  // of the tile these are of
  int lo, hi;
  int first_token, end_token;  // of the block's query tokens, those that see the tile
};

template <class D>
void locate(const History<D>& from, int64_t base, int lo, int hi, const typename D::Element* zeros, Rows<typename D::Element>& rows) {
  using Element = typename D::Element;
  const PageLayout& at = *from.layout;
  rows.lo = lo;
  rows.hi = hi;
  for (int j = lo; j < hi;) {
    const int64_t position = base + j;
    const Element *k, *v;
    int64_t run, k_step, v_step;
    if (position < from.num_committed) {
      const int32_t entry = int32_t(position) / at.page_size, place = int32_t(position) % at.page_size;
      const Element* page = (const Element*)at.pages + from.page_ids[entry] * at.page_elems;
      run = at.page_size - place < from.num_committed - position ? at.page_size - place : from.num_committed - position;
      k = page + at.k_offset + (from.head * int64_t(at.page_size) + place) * at.k_dim;
      v = page + at.v_offset + (from.head * int64_t(at.page_size) + place) * at.v_dim;
      k_step = at.k_dim;
      v_step = at.v_dim;
    } else {
      run = hi - j;
      k = from.staged_k + (position - from.num_committed) * from.k_token_stride;
      v = from.staged_v + (position - from.num_committed) * from.v_token_stride;
      k_step = from.k_token_stride;
      v_step = from.v_token_stride;
    }
    for (const int64_t end = j + run < hi ? j + run : hi; j < end; ++j, k += k_step, v += v_step) {
      rows.k[j] = k;
      rows.v[j] = v;
    }
  }
  for (int j = lo & ~15; j < lo; ++j) rows.k[j] = zeros;
  for (int j = hi; j & 15; ++j) rows.k[j] = zeros;
}

// 16 keys, `n` head dimensions from d on, as columns of `to`. kWiden turns the pairs into two fp32 columns.
template <class D, Keys F, bool kWiden>
QUIRE_INLINE void transpose_patch(const typename D::Element* const* rows, int d, int n, float* to) {
  F32x16 r[16];
  for (int i = 0; i < 16; ++i) {
    if constexpr (F != Keys::kFloat || kWiden)
      r[i] = floats(n == 32 ? load_pairs((const uint16_t*)rows[i] + d) : load_pairs_n((const uint16_t*)rows[i] + d, n));
    else
      r[i] = n == 16 ? D::widen(rows[i] + d) : D::widen_n(rows[i] + d, n);
  }
  transpose16(r);
  const int columns = F != Keys::kFloat || kWiden ? (n + 1) / 2 : n;
  for (int i = 0; i < columns; ++i) {
    if constexpr (kWiden) {
      store(to + 2 * i * kPanelLanes, pair_low(bits(r[i])));
      store(to + (2 * i + 1) * kPanelLanes, pair_high(bits(r[i])));
    } else {
      store(to + i * kPanelLanes, r[i]);
    }
  }
}

// A tile's keys as columns of panels (an odd Dk gets one more row of zeros); columns outside the groups of 16 that hold
// keys stay as they are.
template <class D, Keys F>
void transpose_keys(const Rows<typename D::Element>& rows, int k_dim, float* panels, int64_t panel_stride, Fetcher& fetcher) {
  constexpr bool kWiden = F == Keys::kFloat && D::kPairs;
  constexpr int kSpan = D::kPairs ? 32 : 16;  // head dimensions in one vector of a row
  for (int key = rows.lo & ~15; key < rows.hi; key += 16) {
    float* to = panels + key / kPanelLanes * panel_stride + key % kPanelLanes;
    int d = 0;
    for (; d + kSpan <= k_dim; d += kSpan, to += (F == Keys::kFloat ? kSpan : kSpan / 2) * kPanelLanes) {
      fetch(fetcher, fetcher.per_patch);
      transpose_patch<D, F, kWiden>(rows.k + key, d, kSpan, to);
    }
    if (d < k_dim) transpose_patch<D, F, kWiden>(rows.k + key, d, k_dim - d, to);
  }
}

// A tile's values as panels, by units (see Brain), filled up with zeros to whole ones. False if one is not finite.
template <class D>
bool copy_values(const Rows<typename D::Element>& rows, int v_dim, float* panels) {
  constexpr int kUnit = 16 * D::kVecs;
  U32x16 zeros = set1_u32(0);  // +0 and -0 only, as long as all values are finite
  for (int d = 0; d < v_dim; d += kUnit) {
    for (int key = rows.lo; key < rows.hi; ++key) {
      const typename D::Element* from = rows.v[key] + d;
      F32x16 x[D::kVecs];
      if constexpr (PanelValues<D>::kPacked) {
        const U32x16 pairs = d + kUnit <= v_dim ? load_pairs(from) : load_pairs_n(from, v_dim - d);
        store(panels + ((d / kPanelLanes * kTile + key) * kPanelLanes + d % kPanelLanes) / 2, floats(pairs));
        D::split(pairs, x);
      } else {
        if (d + kUnit <= v_dim)
          D::read(from, x);
        else
          D::read_n(from, x, v_dim - d);
        for (int i = 0; i < D::kVecs; ++i) {
          const int at = d + 16 * i;
          store(panels + (at / kPanelLanes * kTile + key) * kPanelLanes + at % kPanelLanes, x[i]);
        }
      }
      for (int i = 0; i < D::kVecs; ++i) zeros = or_(zeros, bits(mul(x[i], zero())));
    }
  }
  return mask_bits(eq(floats(zeros), zero())) == 0xffff;
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
