// Products of bf16 rows with weights of int8 codes, in integers, on AMX. The law, for any number of rows, over spans of 128 of k:
//
//   x      is q * 2^(e - 13), as integers of two bytes have it (codes_amx.h); a span that is not finite is NaN
//   s      = the sum of q * code, exact
//   y[m]   = rounded(fma(float(s_0), t_0, 0), fma(float(s_1), t_1, .), ... + bias),  t = the weight's scale * 2^(e - 13), fp32, rounded once
//
// Tiles multiply bytes, so q = 256 high + low, and either has rows of its own in x's tiles: of up to 8 rows both are in one.
//
//   x          [tile of R rows][step of 64 k][R rows of high, R of low][64]       its scales   [tile][span][R]
//   R up to 8  A 4: high over low        C 0..3: four lines of columns
//   beyond     A 4: high, A 5: low       C 0, 1: two lines of high, C 2, 3: of low; the other two lines come after
//
// While tiles are multiplied, the sums of those before are turned into floats: a store of tiles takes its time to be seen.
#pragma once
#include "codes_amx.h"
#include "linear_amx_weights.h"

#if defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace product {

constexpr int kCodeSpan = PackedInt8::kSpan, kJoined = 8;
constexpr int kPanelStep = kCodeK * kWide, kPanelRow = 64 * kLines;  // bytes of a panel: a step's, and those of four of k
constexpr int64_t kCodeXBytes = 3 << 19;                             // of x at once: it stays in the second cache

struct CodePlan {
  int threads, rows, tile_rows;  // rows of x at once, and of one of its tiles
  bool by_rows;                  // threads share the rows of x, not the columns
  int64_t spans, tile_bytes, x_bytes, scale_bytes, thread_bytes;
};

constexpr int64_t kUnitBytes = 4 * kTileBytes;  // sums of tiles that wait to be added

inline CodePlan code_plan(const LinearArgs& g) {
  CodePlan p{};
  const double read = 0.08, compute = 0.001 * double(g.m);  // nanoseconds on one thread, roughly
  p.threads = double(g.n) * double(g.k) * (read > compute ? read : compute) < 8000 ? 1 : g.num_threads;
  p.tile_rows = int(smaller(g.m, 16));
  p.spans = ceil_div(g.k, kCodeSpan);
  const int64_t row_bytes = ceil_div(g.k, kCodeK) * 2 * kCodeK, fitting = kCodeXBytes / (row_bytes + 1) / 16 * 16;
  p.tile_bytes = row_bytes * p.tile_rows;
  p.rows = int(smaller(round_up(g.m, p.tile_rows), fitting > 16 ? fitting : 16));
  p.by_rows = p.threads > 1 && ceil_div(g.n, kWide) < 2 * p.threads && g.m >= 32 * p.threads;
  p.x_bytes = row_bytes * p.rows;
  p.scale_bytes = round_up(p.spans * p.rows * 4, 64);
  p.thread_bytes = p.rows * kWide * 4 + 2 * kUnitBytes + kPanelStep;
  return p;
}

// Rows first..last-1 of x, from row m0 on, to tiles and their scales. Rows that a last tile lacks hold anything: no other row meets them.
inline void codes_of_x(const LinearArgs& g, const CodePlan& p, int64_t m0, int first, int last, char* out, float* scales) {
  const int64_t half = p.tile_rows * kCodeK;
  for (int r = first; r < last && m0 + r < g.m; ++r) {
    const int row = r % p.tile_rows;
    char* to = out + r / p.tile_rows * p.tile_bytes + row * kCodeK;
    float* scale = scales + r / p.tile_rows * p.spans * p.tile_rows + row;
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

QUIRE_INLINE void store_unit(char* tiles) {
  tile_store<0>(tiles, 64);
  tile_store<1>(tiles + kTileBytes, 64);
  tile_store<2>(tiles + 2 * kTileBytes, 64);
  tile_store<3>(tiles + 3 * kTileBytes, 64);
}

// Sums [rows, 64] of a panel to rows m.. of y.
inline void code_sums_to_y(const LinearArgs& g, const float* sums, int64_t m, int rows, int64_t n) {
  for (int r = 0; r < rows; ++r, sums += kWide) {
    auto* y = (uint16_t*)g.y + (m + r) * g.n + n;
    for (int j = 0; j < kLines && n + 16 * j < g.n; ++j) {
      const int left = int(smaller(g.n - n - 16 * j, 16));
      const F32x16 v = load(sums + 16 * j);
      store_brain_n(y + 16 * j, g.bias ? add(v, load_bf16_n((const uint16_t*)g.bias + n + 16 * j, left)) : v, left);
    }
  }
}

// A panel for `count` tiles of x, from row m of y on.
template <bool kFew>
void panel_of_codes(const LinearArgs& g, const CodePlan& p, const char* x, const float* x_scales, int64_t m, int count, int64_t panel, char* scratch) {
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
      const char* const from = x + t * p.tile_bytes + k / kCodeK * 2 * half;
      for (int h = 0; h < kHalves; ++h, ++units) {
        tile_zero<0>();
        tile_zero<1>();
        tile_zero<2>();
        tile_zero<3>();
        code_steps<kFew>(from, p.tile_rows, codes + 128 * h, steps, ahead, share);
        if (here % kCodeK) code_steps<kFew>(from + steps * 2 * half, p.tile_rows, last_step + 128 * h, 1, ahead, 0);
        if (units > 0) add_unit<kFew>(before, p.tile_rows);
        char* const to = tiles + units % 2 * kUnitBytes;
        store_unit(to);
        before = {to, sums + t * p.tile_rows * kWide + 32 * h, x_scales + (t * p.spans + k / kCodeSpan) * p.tile_rows, scale + 32 * h, k == 0};
      }
    }
  }
  if (units > 0) add_unit<kFew>(before, p.tile_rows);
  code_sums_to_y(g, sums, m, int(smaller(g.m - m, count * p.tile_rows)), panel * kWide);
}

inline void part_codes(const LinearArgs& g, const CodePlan& p, const Member& me) {
  char* const x = (char*)g.scratch;
  auto* const scales = (float*)(x + p.x_bytes);
  char* const mine = x + p.x_bytes + p.scale_bytes + me.id * p.thread_bytes;
  const int64_t panels = ceil_div(g.n, kWide), begin = p.by_rows ? 0 : panels * me.id / me.count, end = p.by_rows ? panels : panels * (me.id + 1) / me.count;
  const bool few = p.tile_rows <= kJoined;
  const auto rows = uint8_t(few ? 2 * p.tile_rows : p.tile_rows);
  const TileShapes shapes(rows, 0x3f);
  for (int64_t m = 0; m < g.m; m += p.rows) {
    const int all = int(smaller(round_up(g.m - m, p.tile_rows), p.rows)), tiles = all / p.tile_rows;
    if (m > 0) me.meet();
    codes_of_x(g, p, m, all * me.id / me.count, all * (me.id + 1) / me.count, x, scales);
    me.meet();
    const int first = p.by_rows ? tiles * me.id / me.count : 0, count = (p.by_rows ? tiles * (me.id + 1) / me.count : tiles) - first;
    const char* const own_x = x + first * p.tile_bytes;
    const float* const own_scales = scales + first * p.spans * p.tile_rows;
    for (int64_t panel = begin; panel < end && count > 0; ++panel)
      few ? panel_of_codes<true>(g, p, own_x, own_scales, m, count, panel, mine)
          : panel_of_codes<false>(g, p, own_x, own_scales, m + first * p.tile_rows, count, panel, mine);
  }
}

inline bool is_of_codes(const LinearArgs& g) { return g.dtype == kBF16 && g.format == kPackedInt8; }

inline void run_codes(const LinearArgs& g) {
  const CodePlan p = code_plan(g);
  parallel(p.threads, [&](const Member& me) { part_codes(g, p, me); });
}

inline int64_t code_scratch_floats(const LinearArgs& g) {
  const CodePlan p = code_plan(g);
  return (p.x_bytes + p.scale_bytes + p.threads * p.thread_bytes) / 4;
}

}  // namespace product
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
