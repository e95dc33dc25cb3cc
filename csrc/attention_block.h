// One work item: a block of query rows (tokens x query heads of one KV head) of one sequence, against all its keys or some
// parts of them. Online softmax after Milakov & Gimelshein (2018), tiled as in FlashAttention (Dao et al., 2022).
#pragma once
#include "attention_tile.h"
#include "kernels.h"
#include "simd.h"

namespace quire {
namespace QUIRE_ISA {
namespace {

constexpr float kLog2E = 1.44269504088896341f;

// One thread's working memory, in floats, carved from one allocation.
struct Scratch {
  float *q, *kt, *v, *scores, *out, *total_out, *sums, *max, *total_max, *total_sum, *seen, *zeros;
};

template <class D>
struct Block {
  const AttendArgs& args;
  Scratch& s;
  History<D> from;
  int32_t first_position, num_tokens;  // absolute position of the first query token
  int32_t heads, first_head;           // query heads of this item
  int64_t q_stride, v_stride;          // of rows in scratch
  Fetcher fetcher;                     // of nothing, with its rates
  Rows<typename D::Element> tiles[2];  // this one and the next

  int rows() const { return num_tokens * heads; }
  int32_t position(int token) const { return first_position + token; }
  // The first key a token sees; never falls from one token to the next.
  int32_t first_key(int token) const {
    const int32_t at = position(token);
    int32_t first = args.window > 0 && at >= args.window ? at - args.window + 1 : 0;
    if (args.chunk > 0 && at / args.chunk * args.chunk > first) first = at / args.chunk * args.chunk;
    return first;
  }
};

QUIRE_INLINE int clip(int64_t x, int hi) { return x < 0 ? 0 : x > hi ? hi : int(x); }

// log2(e) times the score, scaled and softcapped.
QUIRE_INLINE F32x16 shape_score(F32x16 dot, float scale, float softcap) {
  if (softcap == 0.0f) return mul(dot, set1(scale * kLog2E));
  return mul(tanh(mul(dot, set1(scale / softcap))), set1(softcap * kLog2E));
}

// What a running maximum is subtracted as: a row whose scores are all -inf so far must give zeros, not NaN.
QUIRE_INLINE float finite_base(float max) { return max == -__builtin_inff() ? 0.0f : max; }

// Scores of `rows` rows to probabilities, in place; updates each row's maximum and sums, and gives the factor by which its
// former output shrinks. Lanes outside a row's keys lo..hi-1 become exactly zero.
inline void softmax_rows(int rows, int num_vecs, const int* lo, const int* hi, float scale, float softcap, float* scores, float* max, float* sums,
                         float* alpha) {
  float before[16], after[16];
  const F32x16 none = set1(-__builtin_inff());
  for (int r = 0; r < rows; ++r) {
    float* row = scores + r * kTile;
    F32x16 top = none;
    for (int j = 0; j < num_vecs; ++j) {
      F32x16 x = shape_score(load(row + 16 * j), scale, softcap);
      if (lo[r] > 16 * j || hi[r] < 16 * j + 16) x = select(lanes_between(clip(lo[r] - 16 * j, 16), clip(hi[r] - 16 * j, 16)), x, none);
      store(row + 16 * j, x);
      top = quire::QUIRE_ISA::max(top, x);
    }
    const float tile_max = max_lanes(top);
    before[r] = max[r];
    max[r] = tile_max > max[r] ? tile_max : max[r];
    after[r] = finite_base(max[r]);
  }
  store_n(alpha, exp2_nonpositive(sub(load_n(before, rows), load_n(after, rows))), rows);
  for (int r = 0; r < rows; ++r) {
    float* row = scores + r * kTile;
    const F32x16 base = set1(after[r]);
    F32x16 sum = zero();
    for (int j = 0; j < num_vecs; ++j) {
      const F32x16 p = exp2_nonpositive(sub(load(row + 16 * j), base));
      store(row + 16 * j, p);
      sum = add(sum, p);
    }
    store(sums + 16 * r, fma(load(sums + 16 * r), set1(alpha[r]), sum));
  }
}

// out = out * alpha + p . V for rows that see keys lo[r]..hi[r]-1: together over the keys all of them see, alone over the
// rest. Each row still meets its keys in ascending order, and never one that it does not see.
template <class V>
void accumulate_rows(int rows, const V& v, const int* lo, const int* hi, int v_dim, const float* p, float* alpha, float* out, int64_t out_stride,
                     Fetcher& fetcher) {
  int common_lo = lo[0], common_hi = hi[0];
  for (int r = 1; r < rows; ++r) {
    common_lo = lo[r] > common_lo ? lo[r] : common_lo;
    common_hi = hi[r] < common_hi ? hi[r] : common_hi;
  }
  if (common_hi < common_lo) common_hi = common_lo;
  for (int r = 0; r < rows; ++r) {
    const int end = hi[r] < common_lo ? hi[r] : common_lo;
    if (lo[r] >= end) continue;
    output<V>(1, p + r * kTile, v, lo[r], end, v_dim, alpha + r, out + r * out_stride, out_stride, fetcher);
    alpha[r] = 1.0f;
  }
  output<V>(rows, p, v, common_lo, common_hi, v_dim, alpha, out, out_stride, fetcher);
  for (int r = 0; r < rows; ++r) {
    const int begin = lo[r] > common_hi ? lo[r] : common_hi;
    if (begin >= hi[r]) continue;
    const float one = 1.0f;
    output<V>(1, p + r * kTile, v, begin, hi[r], v_dim, &one, out + r * out_stride, out_stride, fetcher);
  }
}

// Rows first_row..end_row-1 against the tile at `base`, whose keys lie transposed in s.kt.
template <class D, Keys F, class V>
void tile_rows(Block<D>& b, const V& v, int64_t base, int first_row, int end_row, Fetcher& fetcher) {
  const PageLayout& at = b.args.layout;
  const int count = (end_row - first_row + kMaxRows - 1) / kMaxRows, step = (end_row - first_row + count - 1) / count;
  for (int r0 = first_row; r0 < end_row; r0 += step) {
    const int rows = end_row - r0 < step ? end_row - r0 : step;
    int lo[kMaxRows], hi[kMaxRows];
    float alpha[kMaxRows];
    for (int r = 0; r < rows; ++r) {
      const int token = (r0 + r) / b.heads;
      lo[r] = clip(b.first_key(token) - base, kTile);
      hi[r] = clip(b.position(token) + 1 - base, kTile);
      b.s.seen[r0 + r] = 1.0f;
    }
    const int num_vecs = (hi[rows - 1] + 15) / 16;
    score<F>(rows, b.s.q + r0 * b.q_stride, b.q_stride, b.s.kt, at.k_dim, num_vecs, b.s.scores, fetcher);
    softmax_rows(rows, num_vecs, lo, hi, b.args.scale, b.args.softcap, b.s.scores, b.s.max + r0, b.s.sums + 16 * r0, alpha);
    accumulate_rows(rows, v, lo, hi, V::kDirect ? at.v_dim : int(b.v_stride), b.s.scores, alpha, b.s.out + r0 * b.v_stride, b.v_stride, fetcher);
  }
}

template <class D>
constexpr Keys few_rows_format() {
#if defined(QUIRE_ISA_avx512bf16)
  return D::kPairs ? Keys::kDotPairs : Keys::kFloat;
#else
  return D::kPairs ? Keys::kWidenPairs : Keys::kFloat;
#endif
}
template <class D>
constexpr Keys many_rows_format() {
  return few_rows_format<D>() == Keys::kDotPairs ? Keys::kDotPairs : Keys::kFloat;
}

// Finds the rows of the tile at `base` that some token of the block sees; false if there are none.
template <class D>
bool locate_tile(const Block<D>& b, int64_t base, Rows<typename D::Element>& rows) {
  if (rows.base == base) return rows.first_token < rows.end_token;
  const int first = clip(base - b.first_position, b.num_tokens);
  int end = b.num_tokens;
  while (end > first && b.first_key(end - 1) >= base + kTile) --end;
  rows.base = base;
  rows.first_token = first;
  rows.end_token = end;
  if (first >= end) return false;
  const int lo = clip(b.first_key(first) - base, kTile), hi = clip(b.position(end - 1) + 1 - base, kTile);
  locate(b.from, base, lo, hi, (const typename D::Element*)b.s.zeros, rows);
  return true;
}

template <class D>
void run_tile(Block<D>& b, int64_t base) {
  const PageLayout& at = b.args.layout;
  auto& rows = b.tiles[base / kTile % 2];
  auto& next = b.tiles[base / kTile % 2 ^ 1];
  if (!locate_tile(b, base, rows)) return;
  const int first_row = rows.first_token * b.heads, end_row = rows.end_token * b.heads;
  Fetcher fetcher = b.fetcher;
  if (end_row - first_row <= kDirectRows) {
    if (locate_tile(b, base + kTile, next)) {
      fetcher.rows = (const void* const*)next.k;
      fetcher.lo = next.lo;
      fetcher.hi = next.hi;
    }
    transpose_keys<D, few_rows_format<D>()>(rows, at.k_dim, b.s.kt, fetcher);
    tile_rows<D, few_rows_format<D>()>(b, DirectValues<D>{rows.v}, base, first_row, end_row, fetcher);
  } else {
    transpose_keys<D, many_rows_format<D>()>(rows, at.k_dim, b.s.kt, fetcher);
    widen_values<D>(rows, at.v_dim, b.s.v, b.v_stride);
    tile_rows<D, many_rows_format<D>()>(b, WidenedValues{b.s.v, b.v_stride}, base, first_row, end_row, fetcher);
  }
}

// One part of the keys: afterwards s.max, s.sums and s.out hold the block's state for this part alone, and s.seen says
// which rows saw any of its keys.
template <class D>
void run_part(Block<D>& b, int64_t part) {
  const int rows = b.rows();
  for (int r = 0; r < rows; ++r) {
    b.s.max[r] = -__builtin_inff();
    b.s.seen[r] = 0.0f;
  }
  memset(b.s.sums, 0, size_t(rows) * 64);
  memset(b.s.out, 0, size_t(rows * b.v_stride) * 4);
  const int64_t first = b.first_key(0), end = b.position(b.num_tokens - 1) + 1, part_end = (part + 1) * kPartKeys;
  const int64_t begin = first > part * kPartKeys ? first / kTile * kTile : part * kPartKeys;
  for (int64_t base = begin; base < (end < part_end ? end : part_end); base += kTile) run_tile(b, base);
}

// Adds one part's row (output, maximum, sum) to the row's total; parts come in ascending order.
inline void merge_row(const float* out, float max, float sum, float* total_out, float* total_max, float* total_sum, int64_t v_stride) {
  const float high = max > *total_max ? max : *total_max;
  const F32x16 base = set1(finite_base(high));
  const F32x16 shrink_total = exp2_nonpositive(sub(set1(*total_max), base)), shrink = exp2_nonpositive(sub(set1(max), base));
  for (int64_t d = 0; d < v_stride; d += 16) store(total_out + d, fma(load(out + d), shrink, mul(load(total_out + d), shrink_total)));
  float lanes[16];
  store(lanes, fma(set1(sum), shrink, mul(set1(*total_sum), shrink_total)));
  *total_sum = lanes[0];
  *total_max = high;
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
