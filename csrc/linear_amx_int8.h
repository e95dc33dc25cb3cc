// Products of bf16 rows with weights of int8 codes, in integers, on AMX. The law, for any number of rows, over spans of 128 of k:
//
//   x      is q * 2^(e - 13), as integers of two bytes have it (codes_amx.h); a span that is not finite is NaN
//   s      = the sum of q * code, exact
//   y[m]   = rounded(fma(float(s_0), t_0, 0), fma(float(s_1), t_1, .), ... + bias),  t = the weight's scale * 2^(e - 13), fp32, rounded once
//
// Tiles multiply bytes, so q = 256 high + low, and either has rows of its own in x's tiles: of up to 8 rows both are in one.
//
//   x          a tile of R rows: [step of 64 k][R rows of high, R of low][64], then its scales [span][R]
//   R up to 8  A 4: high over low        C 0..3: four lines of columns
//   beyond     A 4: high, A 5: low       C 0, 1: two lines of high, C 2, 3: of low; the other two lines come after
//
// While tiles are multiplied, the sums of those before are turned into floats: a store of tiles takes its time to be seen.
#pragma once
#include "codes_amx.h"
#include "linear_amx_plan.h"

#if defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace product {

constexpr int kCodeSpan = PackedInt8::kSpan, kJoined = 8;
constexpr int kPanelStep = kCodeK * kWide, kPanelRow = 64 * kLines;  // bytes of a panel: a step's, and those of four of k
constexpr int64_t kUnitBytes = 4 * kTileBytes;                       // sums of tiles that wait to be added

QUIRE_INLINE int64_t spans_of(int64_t k) { return ceil_div(k, kCodeSpan); }
QUIRE_INLINE int64_t code_bytes(int64_t k) { return ceil_div(k, kCodeK) * 2 * kCodeK; }  // of a row of x, without its scales

// Rows first..last-1 of x, from row m0 on, to tiles and their scales. Rows that a last tile lacks hold anything: no other row meets them.
inline void codes_of_x(const LinearArgs& g, const TilePlan& p, int64_t m0, int first, int last, char* out) {
  const int64_t half = p.tile_rows * kCodeK;
  for (int r = first; r < last && m0 + r < g.m; ++r) {
    const int row = r % p.tile_rows;
    char *const tile = out + r / p.tile_rows * p.tile_bytes, *to = tile + row * kCodeK;
    auto* scale = (float*)(tile + p.tile_rows * code_bytes(g.k)) + row;
    const auto* x = (const uint16_t*)g.x + (m0 + r) * g.x_stride;
    for (int64_t k = 0; k < g.k; k += kCodeSpan, scale += p.tile_rows, to += kCodeSpan / kCodeK * 2 * half)
      *scale = two_bytes(x + k, int(smaller(g.k - k, kCodeSpan)), to, to + half, 2 * half);
  }
}

// Sums of one span, for one tile of x and all lines (kFew) or two.
struct Unit {
  const char* tiles;
  float* sums;            // [rows][64], from the first of its lines on
  const float* x_scales;  // [rows]
  const float* scales;    // [line][16]
  bool first;
};

template <bool kFew>
QUIRE_INLINE void add_unit(const Unit& u, int rows) {
  constexpr int kHere = kFew ? 4 : 2;
  const int64_t low = kFew ? 64 * rows : 2 * kTileBytes;
  F32x16 scales[kHere];
  QUIRE_UNROLL for (int j = 0; j < kHere; ++j) scales[j] = load(u.scales + 16 * j);
  for (int r = 0; r < rows; ++r) {
    const F32x16 x_scale = set1(u.x_scales[r]);
    QUIRE_UNROLL for (int j = 0; j < kHere; ++j) {
      const char* const at = u.tiles + j * kTileBytes + 64 * r;
      const __m512i s = _mm512_add_epi32(_mm512_slli_epi32(_mm512_load_si512(at), 8), _mm512_load_si512(at + low));
      float* const sums = u.sums + r * kWide + 16 * j;
      store(sums, fma({_mm512_cvtepi32_ps(s)}, mul(scales[j], x_scale), u.first ? zero() : load(sums)));
    }
  }
}

// `steps` of a panel, from `w` on, times those of a tile of x, added to C 0..3. The next lines that memory is to bring are asked for meanwhile.
template <bool kFew>
QUIRE_INLINE void code_steps(const char* x, int rows, const char* w, int steps, const char*& ahead, int64_t share) {
  const int64_t low = rows * kCodeK;
  for (int s = 0; s < steps; ++s, x += 2 * low, w += kPanelStep) {
    tile_load<4>(x, kCodeK);
    if constexpr (!kFew) tile_load<5>(x + low, kCodeK);
    for (const char* const end = ahead + share; ahead < end; ahead += 64) __builtin_prefetch(ahead, 0, 2);
    tile_load<6>(w, kPanelRow);
    tile_dot_bytes<0, 4, 6>();
    if constexpr (!kFew) tile_dot_bytes<2, 5, 6>();
    tile_load<7>(w + 64, kPanelRow);
    tile_dot_bytes<1, 4, 7>();
    if constexpr (!kFew) tile_dot_bytes<3, 5, 7>();
    if constexpr (kFew) {
      tile_load<6>(w + 128, kPanelRow);
      tile_dot_bytes<2, 4, 6>();
      tile_load<7>(w + 192, kPanelRow);
      tile_dot_bytes<3, 4, 7>();
    }
  }
}

// A panel for `count` tiles of x, from row m of y on.
template <bool kFew>
void panel_of_codes(const LinearArgs& g, const TilePlan& p, const char* x, int64_t m, int count, int64_t panel, char* scratch) {
  constexpr int kHalves = kFew ? 1 : 2;
  char *const tiles = scratch, *const last_step = scratch + 2 * kUnitBytes;
  auto* const sums = (float*)(last_step + kPanelStep);
  const char* span = (const char*)g.w + panel * panel_bytes<PackedInt8>(g.k);
  const int64_t end = round_up(g.k, PackedInt8::kPad), half = p.tile_rows * kCodeK;
  alignas(64) float scales[2][kWide];
  Unit before{};
  int units = 0;
  for (int64_t k = 0; k < end; k += kCodeSpan, span += kSpanBytes<PackedInt8>) {
    const int here = int(smaller(end - k, kCodeSpan)), steps = here / kCodeK;
    float* const scale = scales[k / kCodeSpan % 2];
    for (int line = 0; line < kLines; ++line) store(scale + 16 * line, load_bf16((const uint16_t*)span + 16 * line));
    const char* const codes = span + kScaleBytes<PackedInt8>;
    if (const int rest = here % kCodeK) {  // an operand must not reach beyond the weight
      memcpy(last_step, codes + steps * kPanelStep, size_t(rest / 4 * kPanelRow));
      memset(last_step + rest / 4 * kPanelRow, 0, size_t((kCodeK - rest) / 4 * kPanelRow));
    }
    const char* ahead = codes + 2 * kAhead;
    const int64_t share = round_up(ceil_div(kSpanBytes<PackedInt8>, count * kHalves * 2), 64);
    for (int t = 0; t < count; ++t) {
      const char *const tile = x + t * p.tile_bytes, *const from = tile + k / kCodeK * 2 * half;
      const auto* const x_scales = (const float*)(tile + p.tile_rows * code_bytes(g.k)) + k / kCodeSpan * p.tile_rows;
      for (int h = 0; h < kHalves; ++h, ++units) {
        zero_sums();
        code_steps<kFew>(from, p.tile_rows, codes + 128 * h, steps, ahead, share);
        if (here % kCodeK) code_steps<kFew>(from + steps * 2 * half, p.tile_rows, last_step + 128 * h, 1, ahead, 0);
        if (units > 0) add_unit<kFew>(before, p.tile_rows);
        char* const to = tiles + units % 2 * kUnitBytes;
        store_sums(to);
        before = {to, sums + t * p.tile_rows * kWide + 32 * h, x_scales, scale + 32 * h, k == 0};
      }
    }
  }
  if (units > 0) add_unit<kFew>(before, p.tile_rows);
  sums_to_y(g, m, int(smaller(g.m - m, count * p.tile_rows)), panel * kWide, kLines, [&](int r, int line) { return sums + r * kWide + 16 * line; });
}

struct CodeProduct {
  static TilePlan plan(const LinearArgs& g) {
    return tile_plan(g, 0.08, code_bytes(g.k) + spans_of(g.k) * int64_t(sizeof(float)), 2 * kUnitBytes + kPanelStep);
  }
  static TileShapes shapes(const TilePlan& p) { return TileShapes(p.tile_rows <= kJoined ? 2 * p.tile_rows : p.tile_rows, 0x3f); }
  static void place(const LinearArgs& g, const TilePlan& p, int64_t m0, int first, int last, char* x) { codes_of_x(g, p, m0, first, last, x); }
  static void pass(const LinearArgs& g, const TilePlan& p, const char* x, int64_t m, int count, int64_t panel, bool, char* own) {
    p.tile_rows <= kJoined ? panel_of_codes<true>(g, p, x, m, count, panel, own) : panel_of_codes<false>(g, p, x, m, count, panel, own);
  }
};

}  // namespace product
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
