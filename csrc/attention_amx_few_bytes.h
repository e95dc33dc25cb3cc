// Up to sixteen query rows against int8 keys and values: both are multiplied where they lie, neither turned nor decoded.
//
//   scores [key, column]  =  K [16 keys, 64 d]  x  Q [16 fours of d, 16 columns]      a query row's upper bytes are a column, its lower ones the next
//   out    [row, 16]     +=  M [16 rows, 64]    x  V [16 keys, 16 fours of d]         a row of M for remainder j has the weight of key i at 4 i + j and
//                                                                                     zeros else, so what it sums up are dimensions 4 c + j
//
// A query row thus has eight rows of M, four remainders of two bytes each, and two query rows, as decoding often has, fill a tile. Of 64 dimensions
// outputs are kept remainder by remainder.
#pragma once
#include "attention_amx_bytes.h"
#include "attention_amx_few.h"

#if defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace tiles {

constexpr int kColumnRows = kLanes / 2, kTileRows = 2;        // query rows of a tile of Q, and of one of M
constexpr int kMostTiles = 4;                                 // of M that are multiplied together
constexpr int kWeightBytes = kSixteens * kTileBytes;          // of a tile of M for all keys

inline void load_query_bytes(Few& f) {
  const int rows = f.item.rows(), bytes = f.k_steps * kCodeK;
  char* const columns = (char*)f.s.pairs;
  for (int first = 0; first < rows; first += kColumnRows) {
    memset(columns, 0, size_t(kLanes * bytes));
    for (int r = first; r < rows && r < first + kColumnRows; ++r) {
      char* const high = columns + (r - first) * 2 * bytes;
      f.s.query_scales[r] = two_bytes((const uint16_t*)f.item.query(r), f.item.args.layout.k.dim, high, high + bytes, kCodeK);
    }
    columns_of_bytes(columns, f.k_steps, (char*)f.s.queries + first / kColumnRows * f.k_steps * kTileBytes);
  }
}

// The next tile's lines, asked for while this one is computed: of eight of its runs in turn, which is all of them where a page has sixteen rows. They
// fit the first cache, since codes take no scratch.
struct LinesAhead {
  const Run *run = nullptr, *end_run = nullptr;
  int64_t at = 0;
};
QUIRE_INLINE void ask(LinesAhead& a) {
  constexpr int kInTurn = 8;
  int64_t longest = 0;
  for (const Run* r = a.run; r < a.end_run && r < a.run + kInTurn; ++r) {
    const char* const line = (const char*)(uintptr_t(r->at) & ~uintptr_t(kLine - 1)) + a.at;
    if (line < r->end) prefetch(line);
    longest = r->end - line > longest ? r->end - line : longest;
  }
  a.at += kLine;
  if (longest > kLine) return;
  a.at = 0;
  a.run = a.end_run - a.run > kInTurn ? a.run + kInTurn : a.end_run;
}

// Dot products of the columns of one tile of Q, [kTile][kLanes].
inline void multiply_keys(const Few& f, const char* const* keys, const char* queries, LinesAhead& ahead) {
  const int64_t apart = codes_apart(f.item.args.layout.k);
  zero_sums();
  for (int s = 0; s < f.k_steps; ++s, queries += kTileBytes) {
    tile_load<6>(queries, 64);
    tile_load<4>(keys[0] + s * kCodeK, apart);
    tile_dot_bytes<0, 4, 6>();
    ask(ahead);
    tile_load<5>(keys[1] + s * kCodeK, apart);
    tile_dot_bytes<1, 5, 6>();
    ask(ahead);
    tile_load<4>(keys[2] + s * kCodeK, apart);
    tile_dot_bytes<2, 4, 6>();
    ask(ahead);
    tile_load<5>(keys[3] + s * kCodeK, apart);
    tile_dot_bytes<3, 5, 6>();
    ask(ahead);
  }
  store_sums((char*)f.s.integers);
}

inline void score_bytes(Few& f, const char* const* keys, LinesAhead& ahead) {
  const int rows = f.item.rows();
  for (int first = 0; first < rows; first += kColumnRows) {
    multiply_keys(f, keys, (const char*)f.s.queries + first / kColumnRows * f.k_steps * kTileBytes, ahead);
    for (int r = first; r < rows && r < first + kColumnRows; r += 2) {
      for (int key = 0; key < kTile; key += 16) {
        F32x16 x[4];
        turn_four(f.s.integers + key * kLanes + (r - first) * 2, x);
        const F32x16 scale = load(f.s.key_scales + key);
        store(f.row(r) + key, score_of(bits(x[0]), bits(x[1]), scale, set1(f.s.query_scales[r])));
        store(f.row(r + 1) + key, score_of(bits(x[2]), bits(x[3]), scale, set1(f.s.query_scales[r + 1])));
      }
    }
  }
}

// Scores to weights, in scores' place, as tiles of M. Returns what sums of them are multiplied by.
inline F32x16 weigh_rows(Few& f, F32x16 minus_base) {
  const F32x16 factor = set1(f.factor == 0.0f ? 1.0f : f.factor);
  alignas(64) float added[kLanes], up[kLanes];
  alignas(64) uint32_t most[kLanes] = {};
  store(added, minus_base);
  for (int r = 0; r < f.item.rows(); ++r) {
    F32x16 sum = load(f.sums(r));
    U32x16 top = set1_u32(0);
    for (int key = 0; key < kTile; key += 16) {
      const F32x16 score = load(f.row(r) + key), p = exp2_of<false>(score, factor, set1(added[r]));
      const F32x16 w = weight_of(score, p, load(f.s.value_scales + key));
      sum = add(sum, p);
      top = largest(top, w);
      store(f.row(r) + key, w);
    }
    store(f.sums(r), sum);
    most[r] = _mm512_reduce_max_epu32(top.v);
  }
  const Grid grid = grid_of(load_u32(most));
  store(up, grid.up);
  const U32x16 byte = set1_u32(0xff);
  for (int r = 0; r < f.item.rows(); ++r) {
    uint32_t* to = (uint32_t*)((char*)f.s.pairs + r / kTileRows * kWeightBytes + r % kTileRows * kTileBytes / kTileRows);
    for (int key = 0; key < kTile; key += 16, to += kTileFloats) {
      const Weight m = integer_weight(load(f.row(r) + key), set1(up[r]));
      const U32x16 high = and_(m.high, byte), low = and_(m.whole, byte);
      store_u32(to, high);
      store_u32(to + 16, shl<8>(high));
      store_u32(to + 32, shl<16>(high));
      store_u32(to + 48, shl<24>(high));
      store_u32(to + 64, low);
      store_u32(to + 80, shl<8>(low));
      store_u32(to + 96, shl<16>(low));
      store_u32(to + 112, shl<24>(low));
    }
  }
  return grid.down;
}

// Sums of 64 dimensions and N tiles of M over a tile's keys.
template <int N>
void multiply_values(const char* weights, const char* const* values, int64_t apart, char* to, LinesAhead& ahead) {
  tile_zero<0>();
  if constexpr (N > 1) tile_zero<1>();
  if constexpr (N > 2) tile_zero<2>();
  if constexpr (N > 3) tile_zero<3>();
  for (int i = 0; i < kSixteens; ++i, weights += kTileBytes) {
    tile_load<4>(values[i], apart);
    tile_load<5>(weights, 64);
    tile_dot_bytes<0, 5, 4>();
    if constexpr (N > 1) tile_load<6>(weights + kWeightBytes, 64);
    if constexpr (N > 1) tile_dot_bytes<1, 6, 4>();
    if constexpr (N > 2) tile_load<7>(weights + 2 * kWeightBytes, 64);
    if constexpr (N > 2) tile_dot_bytes<2, 7, 4>();
    if constexpr (N > 3) tile_load<5>(weights + 3 * kWeightBytes, 64);
    if constexpr (N > 3) tile_dot_bytes<3, 5, 4>();
    ask(ahead);
  }
  tile_store<0>(to, 64);
  if constexpr (N > 1) tile_store<1>(to + kTileBytes, 64);
  if constexpr (N > 2) tile_store<2>(to + 2 * kTileBytes, 64);
  if constexpr (N > 3) tile_store<3>(to + 3 * kTileBytes, 64);
}

// Adds sums of 64 dimensions, from tiles of M of the rows first..end-1, to their outputs.
inline void add_sums(Few& f, const float* integers, int first, int end, int d, const float* down) {
  for (int r = first; r < end; ++r, integers += kTileFloats / kTileRows) {
    float* const out = f.s.out + r * f.v_dims + d;
    for (int i = 0; i < kCodeK; i += 16) {
      const U32x16 sum = sum_of_bytes(bits(load(integers + i)), bits(load(integers + kCodeK + i)));
      store(out + i, fma(to_f32(sum), set1(down[r]), f.part.fresh ? zero() : load(out + i)));
    }
  }
}

// Adds a tile's values to the outputs. 64 dimensions are multiplied while sums of those before are added: a store of tiles takes its time to be seen.
template <int N>
void add_value_bytes(Few& f, const char* const* values, int first, int end, const float* down, LinesAhead& ahead) {
  const char* const weights = (const char*)f.s.pairs + first / kTileRows * kWeightBytes;
  const int64_t apart = codes_apart(f.item.args.layout.v);
  const auto integers = [&](int d) { return f.s.integers + d / kCodeK % 2 * kMostTiles * kTileFloats; };
  for (int d = 0; d <= f.v_dims; d += kCodeK) {
    if (d < f.v_dims) {
      const char* const from[kSixteens] = {values[0] + d, values[1] + d, values[2] + d, values[3] + d};
      multiply_values<N>(weights, from, apart, (char*)integers(d), ahead);
    }
    if (d > 0) add_sums(f, integers(d - kCodeK), first, end, d - kCodeK, down);
  }
}

inline void run_bytes_tile(Few& f, int64_t base) {
  Item& item = f.item;
  const PageLayout& at = item.args.layout;
  const char* const zeros = (const char*)f.s.zeros;
  Rows &rows = item.tiles[base / kTile % 2], &next = item.tiles[base / kTile % 2 ^ 1];
  if (!locate_tile(item, base, zeros, rows)) return;
  LinesAhead ahead{};
  if (locate_tile(item, base + kTile, zeros, next)) {
    fill_up(next, zeros);
    ahead.run = next.runs;
    ahead.end_run = next.runs + next.num_runs;
  }
  fill_up(rows, zeros);
  const char *keys[kSixteens], *values[kSixteens];
  for (int i = 0; i < kSixteens; ++i) {
    keys[i] = place_codes(rows.k + 16 * i, at.k, (char*)f.s.keys + 16 * i * codes_apart(at.k));
    values[i] = place_codes(rows.v + 16 * i, at.v, (char*)f.s.values + 16 * i * codes_apart(at.v));
    place_scales(rows.k + 16 * i, at.k.dim, f.s.key_scales + 16 * i);
    place_scales(rows.v + 16 * i, at.v.dim, f.s.value_scales + 16 * i);
  }
  score_bytes(f, keys, ahead);
  alignas(64) float down[kLanes];
  store(down, weigh_rows(f, settle_rows(f, {0, kSteps}, base)));
  for (int first = 0, end; first < item.rows(); first = end) {
    const int left = item.rows() - first;
    end = first + (left < kMostTiles * kTileRows ? left : kMostTiles * kTileRows);
    if (left <= kTileRows)
      add_value_bytes<1>(f, values, first, end, down, ahead);
    else if (left <= 2 * kTileRows)
      add_value_bytes<2>(f, values, first, end, down, ahead);
    else
      add_value_bytes<kMostTiles>(f, values, first, end, down, ahead);
  }
  while (ahead.run != ahead.end_run) ask(ahead);
  f.part.fresh = false;
}

// From remainder by remainder to the order of elements, and back.
inline void order_outputs(const float* from, int dims, float* to) {
  for (int d = 0; d < dims; d += kCodeK)
    for (int i = 0; i < kCodeK / 4; ++i)
      for (int j = 0; j < 4; ++j) to[d + 4 * i + j] = from[d + 16 * j + i];
}
inline void disorder_outputs(const float* from, int dims, float* to) {
  for (int d = 0; d < dims; d += kCodeK)
    for (int i = 0; i < kCodeK / 4; ++i)
      for (int j = 0; j < 4; ++j) to[d + 16 * j + i] = from[d + 4 * i + j];
}

}  // namespace tiles
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
