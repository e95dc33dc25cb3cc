// Keys that several sequences of a step have in the same pages are met once for all of their rows, as far as these are few in each sequence: decoding a
// batch with a common prompt, or samples of one prompt, reads that prompt once (after Juravsky et al., "Hydragen", 2024; Ye et al., "FlashInfer", 2025).
//
//   part 0       part 1       part 2
//   ━━━━━━━━━━━━ ━━━━━━━┐                   sequences 0..3: a shared item of part 0, one of the beginning of part 1
//                       ├──── ━━━━┬─ 0      sequences 0, 1: one of the beginning of part 2
//                       │         └─ 1
//                       ├── 2               what is left is each sequence's own
//                       └── 3
//
// A row's arithmetic stays what it is: its parts are summed up by themselves anyway, and where only some tiles of a part are shared it goes on from the
// state it has after them.
#include <algorithm>

#include "schedule.h"

namespace quire {
namespace {

constexpr int32_t kTileKeys = 64;  // what a row's state can stand between (attention_rows.h)

// A block of few rows that is all of its sequence's.
struct Candidate {
  size_t item;
  int32_t keys;  // that it has in common with the one it is compared with, of the part at hand
};

int32_t page_at(const AttendArgs& args, const WorkItem& item, int64_t key) {
  return args.page_ids[args.page_start[item.seq] + key / args.layout.page_size];
}

// Whole tiles of committed keys from `begin` on, up to `end`, that two sequences have in the same pages.
int32_t keys_in_common(const AttendArgs& args, const WorkItem& a, const WorkItem& b, int64_t begin, int64_t end) {
  end = std::min<int64_t>({end, args.num_committed[a.seq], args.num_committed[b.seq]});
  const int64_t size = args.layout.page_size;
  int64_t same = begin;
  while (same < end && page_at(args, a, same) == page_at(args, b, same)) same = (same / size + 1) * size;
  return int32_t(std::max<int64_t>(0, std::min(same, end) - begin) / kTileKeys * kTileKeys);
}

}  // namespace

int64_t share_keys(AttendArgs& args, const Kernels& kernels, Schedule& schedule) {
  const int32_t group = args.num_heads / args.layout.num_kv_heads, most_tokens = kernels.block_rows(&args) / group;
  auto& [items, costs, shared, tokens, begun, states, partials, counters] = schedule;
  shared.clear();
  tokens.clear();
  begun.clear();
  int64_t cost = 0, num_states = 0;
  std::vector<Candidate> open;
  for (size_t i = 0; i < items.size() && args.window == 0 && args.chunk == 0; ++i) {
    const WorkItem& item = items[i];
    const bool whole = item.num_tokens == args.query_start[item.seq + 1] - args.query_start[item.seq];
    if (whole && item.num_tokens * group <= kernels.split_rows && args.num_committed[item.seq] >= kTileKeys) open.push_back({i, 0});
  }
  for (int32_t part = 0; open.size() > 1; ++part) {
    const int64_t first_key = int64_t(part) * kPartKeys;
    const auto short_of_it = [&](const Candidate& c) { return args.num_committed[items[c.item].seq] < first_key + kTileKeys; };
    open.erase(std::remove_if(open.begin(), open.end(), short_of_it), open.end());
    std::stable_sort(open.begin(), open.end(), [&](const Candidate& a, const Candidate& b) {
      return page_at(args, items[a.item], first_key) < page_at(args, items[b.item], first_key);
    });
    std::vector<Candidate> next;  // who may share keys of the next part
    for (auto from = open.begin(); from != open.end();) {
      const WorkItem& first = items[from->item];
      auto to = from;
      for (; to != open.end() && page_at(args, items[to->item], first_key) == page_at(args, first, first_key); ++to)
        to->keys = to == from ? kPartKeys : keys_in_common(args, first, items[to->item], first_key, first_key + kPartKeys);
      std::stable_sort(from, to, [](const Candidate& a, const Candidate& b) { return a.keys > b.keys; });
      // As many as save most, and the others among themselves.
      auto best = from;
      int64_t saved = 0;
      int32_t num_tokens = 0;
      for (auto c = from; c != to && (num_tokens += items[c->item].num_tokens) <= most_tokens; ++c) {
        if ((c - from) * c->keys > saved) {
          saved = (c - from) * c->keys;
          best = c;
        }
      }
      if (saved == 0) {
        ++from;
        continue;
      }
      const int32_t keys = best->keys;
      SharedItem item{first.seq, part, keys, int32_t(tokens.size()), 0, num_states};
      for (; from <= best; ++from) {
        WorkItem& own = items[from->item];
        if (own.begun < 0) {
          own.begun = int64_t(begun.size());
          begun.insert(begun.end(), size_t(own.num_parts), Begun{-1, 0});
        }
        begun[size_t(own.begun + part - own.block_first_part)] = {int32_t(shared.size()), item.num_tokens};
        for (int32_t t = 0; t < own.num_tokens; ++t) tokens.push_back(args.query_start[own.seq] + t);
        item.num_tokens += own.num_tokens;
        costs[from->item] -= cost_of(keys, own.num_tokens * group);
        if (keys == kPartKeys) next.push_back(*from);
      }
      shared.push_back(item);
      cost += cost_of(keys, item.num_tokens * group);
      num_states += int64_t(args.num_heads) * item.num_tokens * state_floats(args.layout.v.dim);
    }
    open.swap(next);
  }
  if (int64_t(states.size()) < num_states) states.resize(size_t(num_states));
  args.shared = shared.data();
  args.num_shared = int64_t(shared.size());
  args.shared_tokens = tokens.data();
  args.begun = begun.data();
  args.states = states.data();
  return cost;
}

}  // namespace quire
