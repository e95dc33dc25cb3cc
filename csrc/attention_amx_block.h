// More than sixteen query rows of one work item on AMX: groups of sixteen, a row in each lane, pass parts of 512 keys two by two. A part's keys and
// values are placed once for all of them. What is common to all formats of keys and values.
#pragma once
#include "attention_amx_rows.h"
#include "thread_memory.h"

#if defined(QUIRE_AMX)
namespace quire {
namespace QUIRE_ISA {
namespace {
namespace tiles {

constexpr int kMostRows = 1536, kGroups = kMostRows / kLanes;  // query rows of one work item: many, since its values are transposed for it alone

// A thread's working memory, in floats.
struct Scratch {
  float *queries, *keys, *values, *scores, *pairs, *sums, *out, *total, *apart, *zeros;
  float *query_scales, *key_scales, *value_scales, *integers;  // of codes alone
};

inline bool carve_scratch(const AttendArgs& args, Scratch& s) {
  static thread_local ThreadMemory memory;
  const bool codes = args.layout.k.format != kBF16;
  const int64_t unit = codes ? 64 : 32, k_row = round_up(args.layout.k.dim, unit), out = round_up(args.layout.v.dim, unit) * kLanes;  // elements
  const Wanted wanted[] = {{&s.queries, kGroups * k_row / 2 * kLanes},
                           {&s.keys, kPartKeys * k_row / 2},
                           {&s.values, out * kPartSteps},
                           {&s.scores, 4 * kScores},
                           {&s.pairs, 2 * kPartTiles * kPairs},
                           {&s.sums, 4 * kLanes * kLanes},
                           {&s.out, 2 * out},
                           {&s.total, kGroups * out},
                           {&s.apart, out},
                           {&s.zeros, zero_floats(args)},
                           {&s.query_scales, codes ? kMostRows : 0},
                           {&s.key_scales, codes ? kPartKeys : 0},
                           {&s.value_scales, codes ? kPartKeys : 0},
                           {&s.integers, codes ? 6 * kScores : 0}};
  if (!carve(memory, wanted)) return false;
  memset(s.zeros, 0, size_t(zero_floats(args)) * 4);
  return true;
}

struct Group {
  int first_token, last_token;
  Sums total;
};

struct Block {
  Item& item;
  Scratch& s;
  Operands x;
  float factor;
  float* states;  // of a shared item's rows, where they are left; else null
  int num_groups;
  Group groups[kGroups];

  const AttendArgs& args() const { return item.args; }
  int64_t out_floats() const { return int64_t(x.v_tiles) * kTileFloats; }
  const char* queries(int group) const { return (const char*)(s.queries + group * x.k_steps * kTileFloats); }
};

// The steps of the tile at `base` that any token of these groups sees.
QUIRE_INLINE Span span_of(const Block& b, int first_group, int last_group, int64_t base) {
  const Seen first = seen_by(b.item, b.groups[first_group].first_token, base), last = seen_by(b.item, b.groups[last_group].last_token, base);
  return {first.lo / kTileK, (last.hi + kTileK - 1) / kTileK};
}
QUIRE_INLINE bool all_seen(const Item& item, const Group& group, Span span, int64_t base) {
  return seen_by(item, group.last_token, base).lo <= span.first * kTileK && seen_by(item, group.first_token, base).hi >= span.end * kTileK;
}

// The largest of each row's scores; where they are not to be used as they are, shapes them first, and sets those of unseen keys to -inf.
inline F32x16 largest_scores(const Block& b, int group, Span span, int64_t base, float* scores) {
  const Group& g = b.groups[group];
  const F32x16 none = set1(-__builtin_inff());
  F32x16 top[2] = {none, none};  // max() gives its second operand where the first is NaN, so these never are
  if (b.factor != 0.0f && all_seen(b.item, g, span, base)) {
    for (int key = span.first * kTileK; key < span.end * kTileK; key += 2) {
      top[0] = max(load(scores + key * kLanes), top[0]);
      top[1] = max(load(scores + (key + 1) * kLanes), top[1]);
    }
    return max(top[0], top[1]);
  }
  float lo[kLanes], hi[kLanes];
  int token = g.first_token, left = (token + 1) * b.item.heads - group * kLanes;  // rows of this token
  Seen seen = seen_by(b.item, token, base);
  for (int r = 0; r < kLanes; ++r, --left) {
    if (left == 0 && token < g.last_token) {  // lanes without a row see what the last row sees
      seen = seen_by(b.item, ++token, base);
      left = b.item.heads;
    }
    lo[r] = float(seen.lo);
    hi[r] = float(seen.hi);
  }
  const F32x16 first = load(lo), last = load(hi);
  for (int key = span.first * kTileK; key < span.end * kTileK; ++key) {
    const F32x16 at = set1(float(key));
    F32x16 x = load(scores + key * kLanes);
    if (b.factor == 0.0f) x = shape_score(x, b.args().scale, b.args().softcap);
    x = select(gt(last, at), select(gt(first, at), none, x), none);
    store(scores + key * kLanes, x);
    top[0] = max(x, top[0]);
  }
  return top[0];
}

// Whether a tile's largest scores may wait until sums show that a base may have to follow (kMuch): each row has a base, and sees all keys.
inline bool may_wait(const Block& b, int group, const float* base, Span span, int64_t at) {
  return b.factor != 0.0f && mask_bits(eq(load(base), set1(-__builtin_inff()))) == 0 && all_seen(b.item, b.groups[group], span, at);
}

// Tiles of keys that are placed, from `base` on, and which of them have only finite values.
struct Placed {
  int64_t base;
  int tiles;
  uint32_t finite;
};

// Adds a part's outputs, and its base and sums, to the totals of a group, or leaves them as its states.
inline void end_group(Block& b, int group, const float* base, const float* sums, const float* out) {
  if (b.states) return save_group(b.item, group * kLanes, base, sums, out, b.x.v_tiles, b.states);
  const Merge m = merge_sums(load(base), sum_vectors(sums), b.groups[group].total);
  float* const to = b.s.total + group * b.out_floats();
  for (int64_t i = 0; i < b.out_floats(); i += kLanes)
    store(to + i, m.first ? load(out + i) : fma(load(out + i), m.shrink, mul(load(to + i), m.shrink_before)));
}

// Places the keys begin..end-1 of one part and lets all groups pass that see any of them. They ask for the lines of the next part meanwhile.
template <class Format>
void run_part(Block& b, int64_t begin, int64_t end) {
  Item& item = b.item;
  const PageLayout& at = b.args().layout;
  const char* const zeros = (const char*)b.s.zeros;
  Placed part{begin / kTile * kTile, 0, 0};
  part.tiles = int((end - part.base + kTile - 1) / kTile);
  int first = b.num_groups, last = -1;
  for (int tile = 0; tile < part.tiles; ++tile) {
    const int64_t base = part.base + tile * kTile;
    Rows& rows = item.tiles[base / kTile % 2];
    if (!locate_tile(item, base, zeros, rows)) continue;
    const int from = rows.first_token * item.heads / kLanes, to = (rows.end_token * item.heads - 1) / kLanes;
    first = from < first ? from : first;
    last = to > last ? to : last;
    if (Format::place(b, rows, tile)) part.finite |= 1u << tile;
  }
  if (last < first) return;
  const int64_t next = part.base + part.tiles * kTile, stop = next + part.tiles * kTile;
  TilesAhead ahead{item, nullptr, zeros, next, stop, stop, {}};
  const int calls = (last - first + 2) / 2 * kSteps * b.x.k_steps, share = 256 * tile_lines(at) / calls + 1;  // of fetch() for each tile
  for (int group = first; group <= last; group += 2) {
    if (group < last)
      typename Format::template Passing<2>{b, group, ahead}.pass(part, share);
    else
      typename Format::template Passing<1>{b, group, ahead}.pass(part, share);
  }
}

// The multiplications that a dot product of a query and a key takes.
template <class Format>
int steps_of(const PageLayout& at) { return int(round_up(at.k.dim, Format::kKeyDims) / Format::kKeyDims); }

template <class Format>
Block block_of(Item& item, Scratch& s, float* states) {
  const PageLayout& at = item.args.layout;
  const int rows = item.rows(), v_tiles = int(round_up(at.v.dim, Format::kOutputs) / 16);
  Block b{item, s, {{}, (const uint32_t*)s.values, steps_of<Format>(at), v_tiles}, score_factor(item.args.scale, item.args.softcap), states, (rows + kLanes - 1) / kLanes, {}};
  Format::load_block(b);
  for (int g = 0; g < b.num_groups; ++g) {
    b.groups[g].first_token = g * kLanes / item.heads;
    b.groups[g].last_token = ((rows < (g + 1) * kLanes ? rows : (g + 1) * kLanes) - 1) / item.heads;
  }
  return b;
}

template <class Format>
void run_block(const AttendArgs& args, const WorkItem& work, const Heads& of, Scratch& s) {
  Item item = item_of(args, work, of);
  Block b = block_of<Format>(item, s, nullptr);
  for (int g = 0; g < b.num_groups; ++g) {
    start_sums(item, g * kLanes, b.groups[g].total);
    if (!b.groups[g].total.fresh) memset(s.total + g * b.out_floats(), 0, size_t(b.out_floats()) * 4);
  }
  for (int32_t part = work.first_part; part < work.end_part; ++part) {
    const KeyRange keys = keys_of_part(item, part);
    run_part<Format>(b, keys.begin, keys.end);
  }
  for (int g = 0; g < b.num_groups; ++g) write_group(item, g * kLanes, b.groups[g].total, s.total + g * b.out_floats());
}

template <class Format>
void share_block(const AttendArgs& args, const SharedItem& work, const Heads& of, Scratch& s) {
  Item item = item_of(args, work, of);
  Block b = block_of<Format>(item, s, states_of(args, work, of));
  const KeyRange keys = keys_of_part(item, work.part);
  run_part<Format>(b, keys.begin, keys.end);
}

}  // namespace tiles
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
#endif
