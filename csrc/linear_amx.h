// bf16 products on AMX (tiles_amx.h), for every way a weight may lie: packed, as codes, or as the model has it. The law:
//
//   step s of k = [32 s, 32 s + 32):  e_s, o_s = sums of x[k] * W[k, n] over its even and its odd k, ascending, from 0
//   y[m, n] = rounded((((e_0 + o_0) + (e_1 + o_1)) + ...) + bias[n]),  fp32 throughout, denormal numbers as zero, rounded once
//
// for every number of rows. A code's element is bf16(code * scale): a quantised weight is a bf16 weight that takes less memory, and has
// the bits of the product with its own rows.
//
// A panel of 64 columns is made of lines of pairs (packed_formats.h), 4 KB for a step; where the weight lies in that form it is read in place,
// where not, blocks of it are decoded or transposed to scratch. Up to 16 rows of x pass a panel once, more of them in pairs of tiles of 16:
//
//            B 6  B 7            x is copied to tiles: [tile of rows][step][rows of the tile][64 bytes]
//      A 4 | C 0  C 1
//      A 5 | C 2  C 3            while they pass, the next panel is asked for, evenly
#pragma once
#include "linear_packed.h"
#include "tiles_amx.h"

#if defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace product {

constexpr int kStepLines = kTileK / 2 * kLines, kStepLineBytes = 64 * kStepLines;  // of a panel, for one step of k
constexpr int64_t kTileXBytes = 1 << 20;                                           // of x at once: it stays in the second cache
constexpr int kStepsOfBlock = kBlock / kTileK;

QUIRE_INLINE int64_t steps_of(int64_t k) { return ceil_div(k, kTileK); }

// fp32 rounded to bf16, by the CPU's own instruction: 16 of them, or pairs of them.
QUIRE_INLINE void store_brain_n(uint16_t* p, F32x16 x, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), (__m256i)_mm512_cvtneps_pbh(x.v));
}
QUIRE_INLINE U32x16 brain_pairs(F32x16 low, F32x16 high) {
  const __m256i a = (__m256i)_mm512_cvtneps_pbh(low.v), b = (__m256i)_mm512_cvtneps_pbh(high.v);
  return or_({_mm512_cvtepu16_epi32(a)}, shl<16>(U32x16{_mm512_cvtepu16_epi32(b)}));
}

// How a weight gives a panel's lines: `block` those of `steps` steps from k0 on, in place or in `scratch` (64 bytes of slack are not needed), and
// `ahead` where the bytes of the next panel begin and how many they are, if they lie in a row.
struct InPlace {
  static constexpr bool kInPlace = true;
  QUIRE_INLINE int64_t bytes(const LinearArgs& g) { return panel_bytes<PackedBf16>(g.k); }
  QUIRE_INLINE const char* block(const LinearArgs& g, int64_t panel, int64_t k0, int, char*) {
    return (const char*)g.w + panel * bytes(g) + k0 / kTileK * kStepLineBytes;
  }
};

template <class P>
struct Decoded {
  static constexpr bool kInPlace = false;
  QUIRE_INLINE int64_t bytes(const LinearArgs& g) { return panel_bytes<P>(g.k); }
  static const char* block(const LinearArgs& g, int64_t panel, int64_t k0, int steps, char* scratch) {
    const char* span = (const char*)g.w + panel * bytes(g) + k0 / kBlock * kBlockBytes<P>;
    const int64_t end = smaller(k0 + steps * kTileK, round_up(g.k, P::kPad));
    char* out = scratch;
    for (; k0 < end; k0 += P::kSpan, span += kSpanBytes<P>) {
      const int units = int(smaller(end - k0, P::kSpan)) / P::kUnit;
      for (int line = 0; line < kLines; ++line) {
        const F32x16 scale = load_bf16((const uint16_t*)span + 16 * line);
        const char* w = span + kScaleBytes<P> + 64 * line;
        char* to = out + 64 * line;
        for (int u = 0; u < units; ++u, w += 64 * kLines) {
          __builtin_prefetch(w + kAhead, 0, 2);
          F32x16 cells[P::kUnit];
          decode<P>(P::raw(w), cells);
          QUIRE_UNROLL for (int i = 0; i < P::kUnit; i += 2, to += 64 * kLines)
            store_u32((uint32_t*)to, brain_pairs(mul(cells[i], scale), mul(cells[i + 1], scale)));
        }
      }
      out += units * P::kUnit / 2 * 64 * kLines;
    }
    // k is filled up to 16, a step is 32.
    if (char* const last = scratch + steps * kStepLineBytes; out < last) memset(out, 0, size_t(last - out));
    return scratch;
  }
};

// A weight as the model has it.
template <bool kKN>
struct AsItLies {
  static constexpr bool kInPlace = false;
  QUIRE_INLINE int64_t bytes(const LinearArgs&) { return 0; }
  static const char* block(const LinearArgs& g, int64_t panel, int64_t k0, int steps, char* scratch) {
    for (int line = 0; line < kLines; ++line) {
      const int64_t n = panel * kWide + 16 * line;
      const int columns = n < g.n ? int(smaller(g.n - n, 16)) : 0;
      for (int s = 0; s < steps; ++s) {
        const int64_t k = k0 + s * kTileK;
        char* out = scratch + s * kStepLineBytes + 64 * line;
        if constexpr (kKN) {
          const auto* w = (const uint16_t*)g.w + k * g.w_stride + n;
          for (int i = 0; i < kTileK; i += 2, out += 64 * kLines)
            store((float*)out, k + i < g.k ? across<Bf16>(w + i * g.w_stride, g.w_stride, int(smaller(g.k - k - i, 2)), columns) : zero());
        } else {
          const auto* w = (const uint16_t*)g.w + n * g.w_stride + k;
          F32x16 r[16];
          for (int i = 0; i < columns; ++i) __builtin_prefetch(w + i * g.w_stride + kBlock, 0, 2);
          load_transposed<Bf16>(r, w, g.w_stride, columns, int(smaller(g.k - k, kTileK)));
          QUIRE_UNROLL for (int i = 0; i < 16; ++i) store((float*)(out + i * 64 * kLines), r[i]);
        }
      }
    }
    return scratch;
  }
};

struct TilePlan {
  int threads, rows, tile_rows;  // rows of x at once, and of one of its tiles
  bool by_rows;                  // threads share the rows of x, not the columns
  int64_t x_bytes, line_bytes, thread_bytes;
};
constexpr int64_t kSumBytes = 32 * kWide * 4;

template <class W>
TilePlan tile_plan(const LinearArgs& g) {
  TilePlan p{};
  const double read = 0.15, compute = 0.001 * double(g.m);  // nanoseconds on one thread, roughly; waking another costs microseconds
  p.threads = double(g.n) * double(g.k) * (read > compute ? read : compute) < 8000 ? 1 : g.num_threads;
  const int64_t row = steps_of(g.k) * 64 + 1, fitting = kTileXBytes / row / 32 * 32;
  p.tile_rows = int(smaller(g.m, 16));
  p.rows = int(smaller(round_up(g.m, p.tile_rows), fitting > 32 ? fitting : 32));
  p.by_rows = p.threads > 1 && ceil_div(g.n, kWide) < 2 * p.threads && g.m >= 32 * p.threads;
  p.x_bytes = steps_of(g.k) * 64 * p.rows;
  p.line_bytes = W::kInPlace ? 0 : (p.tile_rows < 16 || g.m == 16 ? kStepsOfBlock : steps_of(g.k)) * kStepLineBytes;
  p.thread_bytes = kSumBytes + p.line_bytes;
  return p;
}

// Rows first..last-1 of x, from row m0 on, to tiles; what is missing from a last tile is zero.
inline void tiles_of_x(const LinearArgs& g, const TilePlan& p, int64_t m0, int first, int last, char* out) {
  const int64_t steps = steps_of(g.k);
  for (int r = first; r < last; ++r) {
    char* to = out + (r / p.tile_rows * steps * p.tile_rows + r % p.tile_rows) * 64;
    const auto* x = (const uint16_t*)g.x + (m0 + r) * g.x_stride;
    for (int64_t s = 0; s < steps; ++s, to += p.tile_rows * 64) {
      const int64_t left = m0 + r < g.m ? g.k - s * kTileK : 0;
      store_u32((uint32_t*)to, left >= kTileK ? load_pairs(x + s * kTileK) : left > 0 ? load_pairs_n(x + s * kTileK, int(left)) : set1_u32(0));
    }
  }
}

// What is to be asked for while tiles are multiplied, so much with each step.
struct Ahead {
  const char *at, *end;
  int64_t each;
};

// Adds `steps` steps of MT tiles of rows times NT lines of columns to C 0..3.
template <int MT, int NT>
QUIRE_INLINE void tile_steps(const char* x, int64_t next_tile, int64_t x_step, const char* lines, int64_t steps, Ahead& ahead) {
  constexpr int kB = MT == 2 ? 6 : 5;
  for (int64_t s = 0; s < steps; ++s, x += x_step, lines += kStepLineBytes) {
    tile_load<4>(x, 64);
    if constexpr (MT == 2) tile_load<5>(x + next_tile, 64);
    for (const char* const end = ahead.at + ahead.each; ahead.at < end; ahead.at += 64) __builtin_prefetch(ahead.at, 0, 2);
    tile_load<kB>(lines, 64 * kLines);
    tile_dot<0, 4, kB>();
    if constexpr (MT == 2) tile_dot<2, 5, kB>();
    tile_load<kB + 1>(lines + 64, 64 * kLines);
    tile_dot<1, 4, kB + 1>();
    if constexpr (MT == 2) tile_dot<3, 5, kB + 1>();
    if constexpr (NT == 4) {
      tile_load<7>(lines + 128, 64 * kLines);
      tile_dot<2, 4, 7>();
      tile_load<5>(lines + 192, 64 * kLines);
      tile_dot<3, 4, 5>();
    }
  }
}

QUIRE_INLINE void clear_sums() {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
}

// C 0..3 to rows m.. of y, columns n.. of it.
template <int MT, int NT>
void store_sums(const LinearArgs& g, int64_t m, int rows, int64_t n, float* sums) {
  constexpr int kStride = 16 * NT * 4;
  tile_store<0>(sums, kStride);
  tile_store<1>(sums + 16, kStride);
  tile_store<2>(MT == 2 ? sums + 16 * 16 * NT : sums + 32, kStride);
  tile_store<3>(MT == 2 ? sums + 16 * 16 * NT + 16 : sums + 48, kStride);
  for (int r = 0; r < rows; ++r) {
    auto* y = (uint16_t*)g.y + (m + r) * g.n + n;
    for (int j = 0; j < 16 * NT && n + j < g.n; j += 16) {
      F32x16 v = load(sums + r * 16 * NT + j);
      const int left = int(smaller(g.n - n - j, 16));
      if (g.bias) v = add(v, load_bf16_n((const uint16_t*)g.bias + n + j, left));
      store_brain_n(y + j, v, left);
    }
  }
}

// Up to 16 rows of x and one panel.
template <class W>
void few_tiles(const LinearArgs& g, const TilePlan& p, const char* x, int64_t m0, int64_t panel, float* sums, char* scratch) {
  const int64_t steps = steps_of(g.k), x_step = p.tile_rows * 64;
  clear_sums();
  if constexpr (W::kInPlace) {
    const char* lines = W::block(g, panel, 0, 0, nullptr);
    Ahead ahead{lines + 2 * kAhead, nullptr, kStepLineBytes};
    tile_steps<1, 4>(x, 0, x_step, lines, steps, ahead);
  } else {
    Ahead nothing{};
    for (int64_t s = 0; s < steps; s += kStepsOfBlock) {
      const int here = int(smaller(steps - s, kStepsOfBlock));
      tile_steps<1, 4>(x + s * x_step, 0, x_step, W::block(g, panel, s * kTileK, here, scratch), here, nothing);
    }
  }
  store_sums<1, 4>(g, m0, p.tile_rows, panel * kWide, sums);
}

// `count` tiles of 16 rows of x, from row m0 of y on, and one panel.
template <class W>
void many_tiles(const LinearArgs& g, const char* x, int64_t m0, int count, int64_t panel, bool last, float* sums, char* scratch) {
  const int64_t steps = steps_of(g.k), x_tile = steps * kTileBytes;
  const char* lines;
  if constexpr (W::kInPlace) {
    lines = W::block(g, panel, 0, 0, nullptr);
  } else {
    for (int64_t s = 0; s < steps; s += kStepsOfBlock)
      W::block(g, panel, s * kTileK, int(smaller(steps - s, kStepsOfBlock)), scratch + s * kStepLineBytes);
    lines = scratch;
  }
  const int64_t passes = (count / 2 * 2 + count % 2) * steps, bytes = last ? 0 : W::bytes(g);
  Ahead ahead{(const char*)g.w + (panel + 1) * W::bytes(g), nullptr, round_up(ceil_div(bytes, passes + 1), 64)};
  const auto rows_at = [&](int tile, int tiles) { return int(smaller(g.m - m0 - 16 * tile, 16 * tiles)); };
  for (int half = 0; half < kLines; half += 2) {
    for (int t = 0; t + 2 <= count; t += 2) {
      clear_sums();
      tile_steps<2, 2>(x + t * x_tile, x_tile, kTileBytes, lines + 64 * half, steps, ahead);
      store_sums<2, 2>(g, m0 + 16 * t, rows_at(t, 2), panel * kWide + 16 * half, sums);
    }
  }
  if (count % 2) {
    clear_sums();
    tile_steps<1, 4>(x + (count - 1) * x_tile, 0, kTileBytes, lines, steps, ahead);
    store_sums<1, 4>(g, m0 + 16 * (count - 1), rows_at(count - 1, 1), panel * kWide, sums);
  }
}

template <class W>
void part_tiles(const LinearArgs& g, const TilePlan& p, int id, int team) {
  char* const x = (char*)g.scratch;
  char* const mine = x + p.x_bytes + id * p.thread_bytes;
  const int64_t panels = ceil_div(g.n, kWide), begin = p.by_rows ? 0 : panels * id / team, end = p.by_rows ? panels : panels * (id + 1) / team;
  const TileShapes shapes(p.tile_rows, p.tile_rows < 16 ? 0x1fu : 0);  // all of C and A
  for (int64_t m0 = 0; m0 < g.m; m0 += p.rows) {
    const int rows = int(smaller(round_up(g.m - m0, p.tile_rows), p.rows)), tiles = rows / p.tile_rows;
    if (m0 > 0 && team > 1) {
#pragma omp barrier
    }
    tiles_of_x(g, p, m0, rows * id / team, rows * (id + 1) / team, x);
    if (team > 1) {
#pragma omp barrier
    }
    const int first = p.by_rows ? tiles * id / team : 0, last = p.by_rows ? tiles * (id + 1) / team : tiles;
    for (int64_t panel = begin; panel < end && first < last; ++panel) {
      if (g.m <= 16) {
        few_tiles<W>(g, p, x, m0, panel, (float*)mine, mine + kSumBytes);
      } else {
        many_tiles<W>(g, x + first * steps_of(g.k) * kTileBytes, m0 + 16 * first, last - first, panel, panel + 1 == end, (float*)mine, mine + kSumBytes);
      }
    }
  }
}

template <class W>
void run_tiles(const LinearArgs& g) {
  const TilePlan p = tile_plan<W>(g);
  if (p.threads == 1) return part_tiles<W>(g, p, 0, 1);
#pragma omp parallel num_threads(p.threads)
  part_tiles<W>(g, p, omp_get_thread_num(), omp_get_num_threads());
}

template <class W>
int64_t tile_scratch_floats(const LinearArgs& g) {
  const TilePlan p = tile_plan<W>(g);
  return (p.x_bytes + p.threads * p.thread_bytes) / 4;
}

// f(W{}) for the way a bf16 product's weight lies; false if tiles do not serve it.
template <class Function>
bool with_tiles(const LinearArgs& g, const Function& f) {
  if (g.dtype != kBF16) return false;
  switch (g.format) {
    case kRowsNK: f(AsItLies<false>{}); return true;
    case kRowsKN: f(AsItLies<true>{}); return true;
    case kPackedBF16: f(InPlace{}); return true;
    case kPackedInt8: f(Decoded<PackedInt8>{}); return true;
    case kPackedInt4: f(Decoded<PackedInt4>{}); return true;
    default: return false;
  }
}

}  // namespace product
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
