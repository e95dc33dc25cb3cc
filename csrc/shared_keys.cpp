// Keys that several sequences of a step have in the same pages are met once for all of their rows, as far as these are few in each sequence:
// decoding a batch with a common prompt, or samples of one prompt, reads that prompt once (after Juravsky et al., "Hydragen", 2024; Ye et al.,
// "FlashInfer", 2025).
//
//   part 0       part 1       part 2
//   ━━━━━━━━━━━━ ━━━━━━━┐                   sequences 0..3: a shared item of part 0, one of the beginning of part 1
//                       ├──── ━━━━┬─ 0      sequences 0, 1: one of the beginning of part 2
//                       │         └─ 1
//                       ├── 2               what is left is each sequence's own
//                       └── 3
//
// A row's arithmetic stays what it is: its parts are summed up by themselves anyway, and where only some tiles of a part are shared it goes on from
// the state it has after them.
#include <algorithm>

#include "schedule.h"

namespace quire {
namespace {

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

// Blocks whose rows may meet keys with those of others.
std::vector<Candidate> candidates(const AttendArgs& args, const Kernels& kernels, const std::vector<WorkItem>& items) {
  std::vector<Candidate> found;
  if (args.window > 0 || args.chunk > 0) return found;  // rows do not all see the same of a shared key
  const int32_t group = args.num_heads / args.layout.num_kv_heads;
  for (size_t i = 0; i < items.size(); ++i) {
    const WorkItem& item = items[i];
    const bool whole = item.num_tokens == args.query_start[item.seq + 1] - args.query_start[item.seq];
    if (whole && item.num_tokens * group <= kernels.split_rows) found.push_back({i, 0});
  }
  return found;
}

using Place = std::vector<Candidate>::iterator;

// Of the candidates from `from` on, those that are to share keys with the first: as many as save most. They come first afterwards; returns the last
// of them, which has the fewest keys in common with it, or `from` if nothing is saved.
Place partners(const AttendArgs& args, const std::vector<WorkItem>& items, Place from, Place end, int64_t first_key, int32_t most_tokens) {
  const WorkItem& first = items[from->item];
  Place to = from;
  for (; to != end && page_at(args, items[to->item], first_key) == page_at(args, first, first_key); ++to)
    to->keys = to == from ? kPartKeys : keys_in_common(args, first, items[to->item], first_key, first_key + kPartKeys);
  std::stable_sort(from, to, [](const Candidate& a, const Candidate& b) { return a.keys > b.keys; });
  Place best = from;
  int64_t saved = 0;
  int32_t num_tokens = 0;
  for (Place c = from; c != to && (num_tokens += items[c->item].num_tokens) <= most_tokens; ++c) {
    if ((c - from) * c->keys <= saved) continue;
    saved = (c - from) * c->keys;
    best = c;
  }
  return best;
}

// One more shared item, of the blocks from..last. Returns what it costs; they cost as much less as they would have read.
int64_t add_shared(const AttendArgs& args, Schedule& schedule, Place from, Place last, int32_t part, int64_t states) {
  const int32_t group = args.num_heads / args.layout.num_kv_heads, keys = last->keys;
  SharedItem item{schedule.items[from->item].seq, part, keys, int32_t(schedule.shared_tokens.size()), 0, states};
  for (; from <= last; ++from) {
    WorkItem& own = schedule.items[from->item];
    if (own.begun < 0) {
      own.begun = int64_t(schedule.begun.size());
      schedule.begun.insert(schedule.begun.end(), size_t(own.num_parts), Begun{-1, 0});
    }
    schedule.begun[size_t(own.begun + part - own.block_first_part)] = {int32_t(schedule.shared.size()), item.num_tokens};
    for (int32_t t = 0; t < own.num_tokens; ++t) schedule.shared_tokens.push_back(args.query_start[own.seq] + t);
    item.num_tokens += own.num_tokens;
    schedule.costs[from->item] -= cost_of(keys, own.num_tokens * group);
  }
  schedule.shared.push_back(item);
  return cost_of(keys, item.num_tokens * group);
}

}  // namespace

int64_t share_keys(AttendArgs& args, const Kernels& kernels, Schedule& schedule) {
  const int32_t most_tokens = kernels.block_rows(&args) / (args.num_heads / args.layout.num_kv_heads);
  schedule.shared.clear();
  schedule.shared_tokens.clear();
  schedule.begun.clear();
  int64_t cost = 0, num_states = 0;
  std::vector<Candidate> open = candidates(args, kernels, schedule.items);
  for (int32_t part = 0; open.size() > 1; ++part) {
    const int64_t first_key = int64_t(part) * kPartKeys;
    const auto page = [&](const Candidate& c) { return page_at(args, schedule.items[c.item], first_key); };
    const auto short_of_it = [&](const Candidate& c) { return args.num_committed[schedule.items[c.item].seq] < first_key + kTileKeys; };
    open.erase(std::remove_if(open.begin(), open.end(), short_of_it), open.end());
    std::stable_sort(open.begin(), open.end(), [&](const Candidate& a, const Candidate& b) { return page(a) < page(b); });
    std::vector<Candidate> whole;  // those who may share keys of the next part, since they share all of this one's
    for (Place from = open.begin(); from != open.end();) {
      const Place last = partners(args, schedule.items, from, open.end(), first_key, most_tokens);
      if (last != from) {
        cost += add_shared(args, schedule, from, last, part, num_states);
        num_states += int64_t(args.num_heads) * schedule.shared.back().num_tokens * state_floats(args.layout.v.dim);
        if (last->keys == kPartKeys) whole.insert(whole.end(), from, last + 1);
      }
      from = last + 1;
    }
    open.swap(whole);
  }
  if (int64_t(schedule.states.size()) < num_states) schedule.states.resize(size_t(num_states));
  args.shared = schedule.shared.data();
  args.num_shared = int64_t(schedule.shared.size());
  args.shared_tokens = schedule.shared_tokens.data();
  args.begun = schedule.begun.data();
  args.states = schedule.states.data();
  return cost;
}

}  // namespace quire
