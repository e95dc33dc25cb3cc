#include "schedule.h"

#include <algorithm>
#include <numeric>

namespace quire {
namespace {

// Below this many multiply-adds, waking a second thread costs more than it saves.
constexpr int64_t kThreadsPay = 300000;

// Items per thread and KV head under which long blocks are cut: those of many rows into fewer rows, those of few rows over their keys.
constexpr int64_t kItemsPerThread = 4;
constexpr int64_t kLeastBlockRows = 192;

// Query tokens of a block of up to `rows` rows, or of half or a quarter as many where that leaves threads without work.
int32_t tokens_of_block(const AttendArgs& args, int64_t rows) {
  const int64_t group = args.num_heads / args.layout.num_kv_heads;
  for (;; rows /= 2) {
    const int64_t tokens = std::max<int64_t>(1, rows / group);
    int64_t items = 0;
    for (int32_t s = 0; s < args.num_seqs; ++s) items += (args.query_start[s + 1] - args.query_start[s] + tokens - 1) / tokens;
    if (rows < 2 * kLeastBlockRows || items * args.layout.num_kv_heads >= kItemsPerThread * args.num_threads) return int32_t(tokens);
  }
}

}  // namespace

void build_schedule(AttendArgs& args, const Kernels& kernels, Schedule& schedule) {
  const int64_t group = args.num_heads / args.layout.num_kv_heads, kv_heads = args.layout.num_kv_heads;
  const int32_t block_tokens = tokens_of_block(args, kernels.block_rows(&args));
  auto& items = schedule.items;
  auto& costs = schedule.costs;
  items.clear();
  costs.clear();
  for (int32_t s = 0; s < args.num_seqs; ++s) {
    const int32_t num_tokens = args.query_start[s + 1] - args.query_start[s];
    for (int32_t first = 0; first < num_tokens; first += block_tokens) {
      const int32_t count = std::min(block_tokens, num_tokens - first);
      const int64_t position = int64_t(args.num_committed[s]) + first, end = position + count;
      int64_t begin = args.window > 0 ? std::max<int64_t>(0, position - args.window + 1) : 0;
      if (args.chunk > 0) begin = std::max(begin, position / args.chunk * args.chunk);
      const int32_t first_part = int32_t(begin / kPartKeys), end_part = int32_t((end - 1) / kPartKeys + 1);
      costs.push_back(cost_of(end - begin, count * group));
      items.push_back({s, first, count, first_part, end_part, 1, first_part, end_part - first_part, 0, 0, -1});
    }
  }
  const int64_t shared = share_keys(args, kernels, schedule), total = std::accumulate(costs.begin(), costs.end(), shared);
  const int64_t multiply_adds = total * kv_heads * (args.layout.k.dim + args.layout.v.dim);
  if (multiply_adds < kThreadsPay) args.num_threads = 1;

  int64_t num_partials = 0, num_counters = 0;
  if (args.num_threads > 1 && int64_t(items.size()) * kv_heads < kItemsPerThread * args.num_threads) {
    const int64_t target = std::max<int64_t>(1, total * kv_heads / (kItemsPerThread * args.num_threads));
    const size_t num_blocks = items.size();
    for (size_t i = 0; i < num_blocks; ++i) {
      const WorkItem block = items[i];
      const int64_t rows = block.num_tokens * group;
      const int32_t splits = int32_t(std::min<int64_t>(block.num_parts, (costs[i] + target - 1) / target));
      if (rows > kernels.split_rows || splits < 2) continue;
      for (int32_t n = 0; n < splits; ++n) {
        WorkItem item = block;
        item.first_part = block.first_part + int32_t(int64_t(block.num_parts) * n / splits);
        item.end_part = block.first_part + int32_t(int64_t(block.num_parts) * (n + 1) / splits);
        item.num_splits = splits;
        item.partials = num_partials;
        item.counter = num_counters;
        if (n == 0) {
          items[i] = item;
        } else {
          items.push_back(item);
          costs.push_back(costs[i] / splits);
        }
      }
      costs[i] /= splits;
      num_partials += kv_heads * block.num_parts * rows * state_floats(args.layout.v.dim);
      num_counters += kv_heads;
    }
  }
  if (int64_t(schedule.partials.size()) < num_partials) schedule.partials.resize(size_t(num_partials));
  schedule.counters.assign(size_t(num_counters), 0);

  if (items.size() > 1) {
    std::vector<uint32_t> order(items.size());
    std::iota(order.begin(), order.end(), 0u);
    std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return costs[a] > costs[b]; });
    std::vector<WorkItem> sorted;
    sorted.reserve(items.size());
    for (const uint32_t i : order) sorted.push_back(items[i]);
    items.swap(sorted);
  }
  args.items = items.data();
  args.num_items = int64_t(items.size());
  args.partials = schedule.partials.data();
  args.counters = schedule.counters.data();
}

}  // namespace quire
