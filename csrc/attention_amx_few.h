// Up to sixteen query rows of one work item on AMX: decoding above all, where keys and values are met once and what each costs counts.
//
//   scores [key, row]  =  K [16 keys, 32 d]  x  Q [16 pairs of d, 16 rows]           K where it lies, as in attention_amx_group.h
//   turned [row, key]                                                                a row's keys are lanes: no lane without a row costs anything
//   out    [row, d]   +=  P [16 rows, 32 keys]  x  V [16 pairs of keys, 16 d]        V zipped, two keys' rows at a time: a fifth of transposing it
//
// Zipping goes by quarters of a register, so of 32 dimensions the first tile has 0-3, 8-11, 16-19, 24-27 and the second has those between. Outputs
// stay in that order until they are written.
#pragma once
#include "attention_amx_block.h"

#if defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace tiles {

constexpr int kZipped = kSteps * 2 * kTileFloats;  // floats of a tile's values, 32 dimensions of them

// The next tile's rows, whose lines are asked for while this one is computed: of keys and of values, of two sixteens each, in turn. A CPU goes on by
// itself where it sees memory read in order; with four such places in turn it gets ahead of what is asked for, with one it does not (docs/speed.md).
struct RowsAhead {
  const Rows* rows;  // null once all is asked for
  int64_t bytes;     // of a row
  int row = 0;
  int64_t at = 0;
};
QUIRE_INLINE void ask(RowsAhead& a) {
  if (!a.rows) return;
  const char *const *const k = a.rows->k + a.row, *const *const v = a.rows->v + a.row;
  prefetch_l2(k[0] + a.at);
  prefetch_l2(v[0] + a.at);
  prefetch_l2(k[16] + a.at);
  prefetch_l2(v[16] + a.at);
  a.at += kLine;
  if (a.at < a.bytes) return;
  a.at = 0;
  if (++a.row % 16 != 0) return;
  a.row += 16;
  if (a.row == 48) a.rows = nullptr;
}

struct Few {
  Item& item;
  Scratch& s;
  int k_steps, v_dims;  // v_dims: a multiple of 32
  float factor;
  Sums part, total;

  float* row(int r) { return s.scores + kScores + r * kTile; }
  float* sums(int r) { return s.sums + r * kLanes; }
  uint16_t* probabilities(int r) { return (uint16_t*)s.pairs + r * kTile; }
};

// [keys][kLanes] of a tile's steps, to a row of kTile for each query row.
inline void turn_scores(Few& f, Span span) {
  for (int r = 0; r < f.item.rows(); r += 4) {
    for (int key = span.first * kTileK; key < span.end * kTileK; key += 16) {
      const float* const from = f.s.scores + key * kLanes + r;
      __m512 x[4];  // in its quarter q: key 4 q + i of four rows
      for (int i = 0; i < 4; ++i) {
        x[i] = _mm512_castps128_ps512(_mm_loadu_ps(from + i * kLanes));
        x[i] = _mm512_mask_broadcast_f32x4(x[i], 0x00f0, _mm_loadu_ps(from + (4 + i) * kLanes));
        x[i] = _mm512_mask_broadcast_f32x4(x[i], 0x0f00, _mm_loadu_ps(from + (8 + i) * kLanes));
        x[i] = _mm512_mask_broadcast_f32x4(x[i], 0xf000, _mm_loadu_ps(from + (12 + i) * kLanes));
      }
      const __m512d low = _mm512_castps_pd(_mm512_unpacklo_ps(x[0], x[1])), low2 = _mm512_castps_pd(_mm512_unpacklo_ps(x[2], x[3]));
      const __m512d high = _mm512_castps_pd(_mm512_unpackhi_ps(x[0], x[1])), high2 = _mm512_castps_pd(_mm512_unpackhi_ps(x[2], x[3]));
      store(f.row(r) + key, {_mm512_castpd_ps(_mm512_unpacklo_pd(low, low2))});
      store(f.row(r + 1) + key, {_mm512_castpd_ps(_mm512_unpackhi_pd(low, low2))});
      store(f.row(r + 2) + key, {_mm512_castpd_ps(_mm512_unpacklo_pd(high, high2))});
      store(f.row(r + 3) + key, {_mm512_castpd_ps(_mm512_unpackhi_pd(high, high2))});
    }
  }
}

// Scores of the tile at `base` to probabilities. Where a row's base has to follow them, what it has so far shrinks.
inline void settle_rows(Few& f, Span span, int64_t base) {
  const Item& item = f.item;
  const F32x16 none = set1(-__builtin_inff()), factor = set1(f.factor == 0.0f ? 1.0f : f.factor);
  alignas(64) float top[kLanes], minus_base[kLanes], shrink[kLanes];
  store(top, none);
  for (int r = 0; r < item.rows(); ++r) {
    const Seen seen = seen_by(item, r / item.heads, base);
    F32x16 high = none;  // max() gives its second operand where the first is NaN, so this never is
    for (int key = span.first * kTileK; key < span.end * kTileK; key += 16) {
      F32x16 x = load(f.row(r) + key);
      if (f.factor == 0.0f) x = shape_score(x, item.args.scale, item.args.softcap);
      if (seen.lo > key || seen.hi < key + 16) x = select(lanes_between(clip(seen.lo - key, 16), clip(seen.hi - key, 16)), x, none);
      store(f.row(r) + key, x);
      high = max(x, high);
    }
    top[r] = max_lanes(high);
  }
  const Follow now = follow(load(top), factor, load(f.part.base));
  store(f.part.base, now.base);
  store(minus_base, sub(zero(), now.finite));
  store(shrink, now.shrink);
  for (int r = 0; r < item.rows(); ++r) {
    F32x16 sum = load(f.sums(r));
    if (mask_bits(now.grown) >> r & 1u) {
      sum = mul(sum, set1(shrink[r]));
      float* const out = f.s.out + r * f.v_dims;
      for (int d = 0; d < (f.part.fresh ? 0 : f.v_dims); d += 16) store(out + d, mul(load(out + d), set1(shrink[r])));
    }
    for (int key = span.first * kTileK; key < span.end * kTileK; key += 16) {
      const F32x16 p = rounded_exp2(load(f.row(r) + key), factor, set1(minus_base[r]));
      sum = add(sum, p);
      _mm256_storeu_si256((__m256i*)(f.probabilities(r) + key), _mm512_cvtepi32_epi16(shr<16>(bits(p)).v));
    }
    store(f.sums(r), sum);
  }
}

// Values d..d+31 of 32 keys, two keys together in a pair.
QUIRE_INLINE void zip_values(const char* const* from, int d, int v_dim, uint32_t* to, RowsAhead& ahead) {
  for (int i = 0; i < 16; ++i) {
    ask(ahead);
    const U32x16 even = bits(pairs_of_row(from[2 * i], d, v_dim)), odd = bits(pairs_of_row(from[2 * i + 1], d, v_dim));
    store_u32(to + i * 16, zip_low(even, odd));
    store_u32(to + kTileFloats + i * 16, zip_high(even, odd));
  }
}

// Adds 32 dimensions of a tile's values to `out`, in tiles C and C + 1.
template <int C>
void output_rows(const uint32_t* zipped, Span span, float* out, int64_t row_bytes, bool fresh) {
  if (fresh) {
    tile_zero<C>();
    tile_zero<C + 1>();
  } else {
    tile_load<C>(out, row_bytes);
    tile_load<C + 1>(out + 16, row_bytes);
  }
  if (span.first == 0) {
    tile_load<6>(zipped, 64);
    tile_dot<C, 4, 6>();
    tile_load<7>(zipped + kTileFloats, 64);
    tile_dot<C + 1, 4, 7>();
  }
  if (span.end == 2) {
    tile_load<6>(zipped + 2 * kTileFloats, 64);
    tile_dot<C, 5, 6>();
    tile_load<7>(zipped + 3 * kTileFloats, 64);
    tile_dot<C + 1, 5, 7>();
  }
  tile_store<C>(out, row_bytes);
  tile_store<C + 1>(out + 16, row_bytes);
}

// Adds a tile's values to `out` [rows][v_dims]. 32 dimensions are multiplied while the next are zipped.
inline void add_values(Few& f, const char* const* values, Span span, float* out, RowsAhead& ahead) {
  const int v_dim = f.item.args.layout.v.dim;
  const int64_t row_bytes = f.v_dims * 4;
  if (span.first == 0) tile_load<4>(f.probabilities(0), kTile * 2);
  if (span.end == 2) tile_load<5>(f.probabilities(0) + kTileK, kTile * 2);
  for (int d = 0; d <= f.v_dims; d += 32) {
    uint32_t* const zipped = (uint32_t*)f.s.values;
    for (int step = span.first; d < f.v_dims && step < span.end; ++step)
      zip_values(values + step * kTileK, d, v_dim, zipped + d / 32 % 2 * kZipped + step * 2 * kTileFloats, ahead);
    if (d == 0) continue;
    const int before = d - 32;
    if (before / 32 % 2 == 0)
      output_rows<0>(zipped, span, out + before, row_bytes, f.part.fresh);
    else
      output_rows<2>(zipped + kZipped, span, out + before, row_bytes, f.part.fresh);
  }
}

// Where tokens see different keys of the tile, values may be among those hidden that are not finite: for each token the others are zeros.
inline void add_apart(Few& f, const Rows& rows, Span span) {
  RowsAhead nothing{};
  const int64_t token_floats = int64_t(f.item.heads) * f.v_dims, size = f.item.num_tokens * token_floats;
  float* const collected = f.s.out + kLanes * f.v_dims;
  for (int token = 0; token < f.item.num_tokens; ++token) {
    Rows own = rows;
    hide_values(own, seen_by(f.item, token, rows.base), (const char*)f.s.zeros);
    if (!f.part.fresh) memcpy(f.s.apart, f.s.out, size_t(size) * 4);
    add_values(f, own.v, span, f.s.apart, nothing);
    memcpy(collected + token * token_floats, f.s.apart + token * token_floats, size_t(token_floats) * 4);
  }
  memcpy(f.s.out, collected, size_t(size) * 4);
}

inline void run_tile(Few& f, int64_t base) {
  Item& item = f.item;
  const PageLayout& at = item.args.layout;
  const char* const zeros = (const char*)f.s.zeros;
  Rows &rows = item.tiles[base / kTile % 2], &next = item.tiles[base / kTile % 2 ^ 1];
  if (!locate_tile(item, base, zeros, rows)) return;
  RowsAhead ahead{};
  if (locate_tile(item, base + kTile, zeros, next)) {
    for (int j = 0; j < kTile; ++j)
      if (j < next.lo || j >= next.hi) next.k[j] = next.v[j] = zeros;
    ahead = {&next, at.k.bytes > at.v.bytes ? at.k.bytes : at.v.bytes};
  }
  const Span span{rows.lo / kTileK, (rows.hi + kTileK - 1) / kTileK};
  const char* keys[kTile / 16];
  place_keys(rows, at.k.dim, f.k_steps, (char*)f.s.keys, keys);
  score_one(f.k_steps, keys, span, (const char*)f.s.queries, f.s.scores, [&] { ask(ahead); });
  turn_scores(f, span);
  settle_rows(f, span, base);
  const Seen first = seen_by(item, 0, base), last = seen_by(item, item.num_tokens - 1, base);
  if (first.lo == last.lo && first.hi == last.hi)
    add_values(f, rows.v, span, f.s.out, ahead);
  else
    add_apart(f, rows, span);
  f.part.fresh = false;
}

// A part from its first key on, or from the states that rows have of it.
inline void begin_part(Few& f, const float* states) {
  f.part.fresh = !states;
  store(f.part.base, set1(-__builtin_inff()));
  for (int r = 0; r < f.item.rows(); ++r) {
    store(f.sums(r), states ? load(states + f.v_dims) : zero());
    if (!states) continue;
    memcpy(f.s.out + r * f.v_dims, states, size_t(f.v_dims) * 4);
    f.part.base[r] = states[f.v_dims + kLanes];
    states += state_floats(f.v_dims);
  }
}

inline void save_part(Few& f, float* states) {
  for (int r = 0; r < f.item.rows(); ++r, states += state_floats(f.v_dims)) {
    memcpy(states, f.s.out + r * f.v_dims, size_t(f.v_dims) * 4);
    store(states + f.v_dims, load(f.sums(r)));
    states[f.v_dims + kLanes] = f.part.base[r];
  }
}

// Adds the part to the totals of those before it.
inline void merge_part(Few& f) {
  for (int r = 0; r < f.item.rows(); ++r) f.part.sum[r] = sum_lanes(load(f.sums(r)));
  const Merge m = merge_sums(load(f.part.base), load(f.part.sum), f.total);
  alignas(64) float shrink[kLanes], shrink_before[kLanes];
  store(shrink, m.shrink);
  store(shrink_before, m.shrink_before);
  for (int r = 0; r < f.item.rows(); ++r) {
    float* const to = f.s.total + r * f.v_dims;
    const float* const from = f.s.out + r * f.v_dims;
    for (int d = 0; d < f.v_dims; d += 16)
      store(to + d, m.first ? load(from + d) : fma(load(from + d), set1(shrink[r]), mul(load(to + d), set1(shrink_before[r]))));
  }
}

// Totals divided by their sums, in the order that dimensions have elsewhere.
inline void write_rows(const Few& f) {
  const int v_dim = f.item.args.layout.v.dim;
  alignas(64) float share[kLanes];
  store(share, div(set1(1.0f), load(f.total.sum)));
  for (int r = 0; r < f.item.rows(); ++r) {
    uint16_t* const to = (uint16_t*)f.item.args.out + f.item.out(r);
    for (int d = 0; d < v_dim; d += 32) {
      float ordered[32];
      for (int i = 0; i < 8; ++i) memcpy(ordered + 4 * i, f.s.total + r * f.v_dims + d + i % 2 * 16 + i / 2 * 4, 16);
      // -0 to +0: a tile multiplication that adds nothing makes that of it too.
      for (int i = 0; i < 32 && d + i < v_dim; i += 16)
        store_bf16_n(to + d + i, add(mul(load(ordered + i), set1(share[r])), zero()), v_dim - d - i < 16 ? v_dim - d - i : 16);
    }
  }
}

inline Few few_of(Item& item, Scratch& s) {
  const PageLayout& at = item.args.layout;
  Few f{item, s, int(round_up(at.k.dim, kTileK) / kTileK), int(state_outputs(at.v.dim)), score_factor(item.args), {}, {}};
  load_queries(item, f.k_steps, (uint32_t*)s.queries);
  return f;
}

inline void start_few(Few& f) {
  start_sums(f.item, 0, f.total);
  if (!f.total.fresh) memset(f.s.total, 0, size_t(kLanes * f.v_dims) * 4);
}

inline void run_keys(Few& f, KeyRange keys) {
  for (int64_t base = keys.begin / kTile * kTile; base < keys.end; base += kTile) run_tile(f, base);
}

inline void run_few(const AttendArgs& args, const WorkItem& work, const Heads& of, Scratch& s) {
  Item item = item_of(args, work, of);
  Few f = few_of(item, s);
  const int64_t stride = item.rows() * state_floats(f.v_dims);
  float* const partials = work.num_splits > 1 ? args.partials + work.partials + of.part * work.num_parts * stride : nullptr;
  if (!partials) start_few(f);
  for (int32_t part = work.first_part; part < work.end_part; ++part) {
    const Beginning begun = beginning_of(args, work, of, part);
    begin_part(f, begun.states);
    run_keys(f, keys_of_part(item, part, begun.keys));
    if (partials)
      save_part(f, partials + (part - work.block_first_part) * stride);
    else
      merge_part(f);
  }
  if (partials) {
    if (__atomic_add_fetch(args.counters + work.counter + of.part, 1, __ATOMIC_ACQ_REL) < work.num_splits) return;
    start_few(f);
    for (int32_t i = 0; i < work.num_parts; ++i) {
      begin_part(f, partials + i * stride);
      merge_part(f);
    }
  }
  write_rows(f);
}

inline void share_few(const AttendArgs& args, const SharedItem& work, const Heads& of, Scratch& s) {
  Item item = item_of(args, work, of);
  Few f = few_of(item, s);
  begin_part(f, nullptr);
  run_keys(f, keys_of_part(item, work.part));
  save_part(f, states_of(args, work, of));
}

}  // namespace tiles
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
