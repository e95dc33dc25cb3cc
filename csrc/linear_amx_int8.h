// Products of bf16 rows with weights of int8 codes, in integers (linear_codes.h tells the law), on AMX.
//
//   x      a tile of R rows: [step of 64 k][R rows][64], then its scales [span][R]
//
//   one tile of x    A 4       C 0..3: four lines of columns
//   two              A 4, 5    C 0, 1 and C 2, 3: two lines of either; the other two come after
//
// Sums of tiles become floats a unit (four tiles, one span) later, between the multiplications of the next, a tile a step: a store of tiles takes its
// time to be seen, and vectors work while tiles do. What memory is to bring is asked for in small parts as well: many lines at once stand in the way
// of those that are used.
#pragma once
#include "linear_codes.h"
#include "linear_panels.h"
#include "tiles_amx.h"
#include "two_bytes.h"

#if defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace product {

constexpr int kCodeSpan = PackedInt8::kSpan, kSpanSteps = kCodeSpan / kCodeK;
constexpr int kPartRows = 4;     // of a tile of sums, added between two multiplications
static_assert(kSpanSteps == 4);  // as many as a unit has tiles
constexpr int kPanelStep = kCodeK * kWide, kPanelRow = 64 * kLines;  // bytes of a panel: a step's, and those of four of k
constexpr int64_t kUnitBytes = 4 * kTileBytes;                       // sums of tiles that wait to be added

QUIRE_INLINE int64_t spans_of(int64_t k) { return ceil_div(k, kCodeSpan); }
QUIRE_INLINE int64_t code_bytes(int64_t k) { return round_up(k, kCodeK); }  // of a row of x, without its scales

// Rows first..last-1 of x, from row m0 on, to tiles and their scales. Rows that a last tile lacks have scales of 0 and any codes: no other row meets
// them, but scales that are left over may be denormal numbers, which are slow.
inline void codes_of_x(const LinearArgs& g, const TilePlan& p, int64_t m0, int first, int last, char* out) {
  const int64_t step = p.tile_rows * kCodeK;
  for (int r = first; r < last; ++r) {
    const int row = r % p.tile_rows;
    char *const tile = out + r / p.tile_rows * p.tile_bytes, *to = tile + row * kCodeK;
    auto* scale = (float*)(tile + p.tile_rows * code_bytes(g.k)) + row;
    const auto* x = (const uint16_t*)g.x + (m0 + r) * g.x_stride;
    const auto put = [&](int i, U32x16 words) { store_bytes(to + i / kCodeK * step + i % kCodeK, words); };
    for (int64_t k = 0; k < g.k; k += kCodeSpan, scale += p.tile_rows, to += kSpanSteps * step)
      *scale = m0 + r < g.m ? one_byte(x + k, int(smaller(g.k - k, kCodeSpan)), put) : 0.0f;
  }
}

// Sums of four tiles, of one span, that are yet to be added: of four lines of one tile of x, or of two lines of two.
struct Unit {
  const char* tiles;
  float* sums;            // [rows][64] of its first tile, from the first of its lines on
  const float* x_scales;  // [rows] of its first tile
  const float* scales;    // [line][16]
  int64_t next;           // bytes from tile to tile of x
  int rows;
  bool two, first;
};

template <bool kFirst>
QUIRE_INLINE void add_rows(const char* tile, float* sums, const float* x_scales, F32x16 scale, int begin, int end) {
  QUIRE_UNROLL for (int r = begin; r < end; ++r) {
    const F32x16 s = to_f32({_mm512_load_si512(tile + 64 * r)});
    store(sums + r * kWide, fma(s, mul(scale, set1(x_scales[r])), kFirst ? zero() : load(sums + r * kWide)));
  }
}

// Adds rows kPartRows * kQuarter and on of tile c of a unit.
template <int kQuarter>
QUIRE_INLINE void add_part(const Unit& u, int c) {
  const int second = u.two ? c / 2 : 0, line = u.two ? c % 2 : c, begin = kPartRows * kQuarter, end = int(smaller(u.rows, begin + kPartRows));
  float* const sums = u.sums + second * 16 * kWide + 16 * line;
  const auto* const x_scales = (const float*)((const char*)u.x_scales + second * u.next);
  const char* const tile = u.tiles + c * kTileBytes;
  const F32x16 scale = load(u.scales + 16 * line);
  if (u.first) return add_rows<true>(tile, sums, x_scales, scale, begin, end);
  if (end < begin + kPartRows) return add_rows<false>(tile, sums, x_scales, scale, begin, end);
  add_rows<false>(tile, sums, x_scales, scale, begin, begin + kPartRows);
}

QUIRE_INLINE void add_from(const Unit& u, int c) {
  for (; c < 4; ++c) {
    add_part<0>(u, c);
    add_part<1>(u, c);
    add_part<2>(u, c);
    add_part<3>(u, c);
  }
}

// A step of 64 k: a tile of x, or two, times four lines of a panel, or two. Meanwhile tile c of `before` is added.
template <bool kTwo>
QUIRE_INLINE void code_step(const char* x, int64_t next, const char* w, Ahead& ahead, const Unit& before, int c) {
  tile_load<4>(x, kCodeK);
  if constexpr (kTwo) tile_load<5>(x + next, kCodeK);
  ask(ahead);
  tile_load<6>(w, kPanelRow);
  tile_dot_bytes<0, 4, 6>();
  add_part<0>(before, c);
  if constexpr (kTwo) {
    tile_dot_bytes<2, 5, 6>();
    ask(ahead);
    tile_load<7>(w + 64, kPanelRow);
    add_part<1>(before, c);
    tile_dot_bytes<1, 4, 7>();
    add_part<2>(before, c);
    tile_dot_bytes<3, 5, 7>();
  } else {
    ask(ahead);
    tile_load<7>(w + 64, kPanelRow);
    tile_dot_bytes<1, 4, 7>();
    add_part<1>(before, c);
    ask(ahead);
    tile_load<6>(w + 128, kPanelRow);
    tile_dot_bytes<2, 4, 6>();
    add_part<2>(before, c);
    ask(ahead);
    tile_load<7>(w + 192, kPanelRow);
    tile_dot_bytes<3, 4, 7>();
  }
  add_part<3>(before, c);
}

// A span of a panel.
struct CodeSpan {
  const char *codes, *last_step;
  int steps;  // whole ones, in `codes`
  bool rest;  // and a last one
};

// Two lines of a span for two tiles of x, or all four for one, to C 0..3.
template <bool kTwo>
QUIRE_INLINE void code_unit(const CodeSpan& w, int half, const char* x, int64_t step, int64_t next, Ahead& ahead, const Unit& before) {
  const char* const codes = w.codes + 128 * half;
  zero_sums();
  if (w.steps == kSpanSteps) {
    QUIRE_UNROLL for (int s = 0; s < kSpanSteps; ++s) code_step<kTwo>(x + s * step, next, codes + s * kPanelStep, ahead, before, s);
    return;
  }
  for (int s = 0; s < w.steps; ++s) code_step<kTwo>(x + s * step, next, codes + s * kPanelStep, ahead, before, s);
  if (w.rest) code_step<kTwo>(x + w.steps * step, next, w.last_step + 128 * half, ahead, before, w.steps);
  add_from(before, w.steps + w.rest);
}

// A panel for `count` tiles of x, from row m of y on.
inline void panel_of_codes(const LinearArgs& g, const TilePlan& p, const char* x, int64_t m, int count, int64_t panel, char* scratch) {
  char *const tiles = scratch, *const last_step = scratch + 2 * kUnitBytes;
  auto* const sums = (float*)(last_step + kPanelStep);
  const char* span = (const char*)g.w + panel * panel_bytes<PackedInt8>(g.k);
  const int64_t end = round_up(g.k, PackedInt8::kPad), step = p.tile_rows * kCodeK;
  const int64_t each = part_ahead(kSpanBytes<PackedInt8>, kSpanSteps, count);
  alignas(64) float scales[2][kWide];
  Unit before{};
  before.scales = scales[0];
  int units = 0;
  for (int64_t k = 0; k < end; k += kCodeSpan, span += kSpanBytes<PackedInt8>) {
    const int here = int(smaller(end - k, kCodeSpan)), rest = here % kCodeK;
    float* const scale = scales[k / kCodeSpan % 2];
    for (int line = 0; line < kLines; ++line) store(scale + 16 * line, load_bf16((const uint16_t*)span + 16 * line));
    const CodeSpan w{span + kScaleBytes<PackedInt8>, last_step, here / kCodeK, rest > 0};
    if (w.rest) {  // an operand must not reach beyond the weight
      memcpy(last_step, w.codes + w.steps * kPanelStep, size_t(rest / 4 * kPanelRow));
      memset(last_step + rest / 4 * kPanelRow, 0, size_t((kCodeK - rest) / 4 * kPanelRow));
    }
    Ahead ahead{w.codes + 4 * kAhead, each};
    for (int t = 0; t < count; t += 2) {
      const bool two = t + 1 < count;
      const char *const tile = x + t * p.tile_bytes, *const from = tile + k / kCodeK * step;
      const auto* const x_scales = (const float*)(tile + p.tile_rows * code_bytes(g.k)) + k / kCodeSpan * p.tile_rows;
      for (int half = 0; half < 1 + two; ++half, ++units) {
        two ? code_unit<true>(w, half, from, step, p.tile_bytes, ahead, before) : code_unit<false>(w, 0, from, step, 0, ahead, before);
        char* const to = tiles + units % 2 * kUnitBytes;
        store_sums(to);
        before = {to, sums + t * p.tile_rows * kWide + 32 * half, x_scales, scale + 32 * half, p.tile_bytes, p.tile_rows, two, k == 0};
      }
    }
  }
  add_from(before, 0);
  sums_to_y(g, m, int(smaller(g.m - m, count * p.tile_rows)), panel * kWide, kLines, [&](int r, int line) { return sums + r * kWide + 16 * line; });
}

struct CodeProduct {
  static TilePlan plan(const LinearArgs& g) {
    return tile_plan(g, 0.08, code_bytes(g.k) + spans_of(g.k) * int64_t(sizeof(float)), 2 * kUnitBytes + kPanelStep);
  }
  static TileShapes shapes(const TilePlan& p) { return TileShapes(p.tile_rows, 0x3f); }
  static void place(const LinearArgs& g, const TilePlan& p, int64_t m0, int first, int last, char* x) { codes_of_x(g, p, m0, first, last, x); }
  static void pass(const LinearArgs& g, const TilePlan& p, const char* x, int64_t m, int count, int64_t panel, bool, char* own) {
    panel_of_codes(g, p, x, m, count, panel, own);
  }
};

}  // namespace product
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
