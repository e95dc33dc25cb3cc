// Splits a ragged batch into work items, largest first, so that threads finish together. Neither their order nor their
// number changes a result: a row's arithmetic is fixed by absolute positions (see attention.h).
#pragma once
#include <vector>

#include "kernels.h"

namespace quire {

// Kept by the calling thread from call to call.
struct Schedule {
  std::vector<WorkItem> items;
  std::vector<int64_t> costs;
  std::vector<SharedItem> shared;
  std::vector<int32_t> shared_tokens;
  std::vector<Begun> begun;
  std::vector<float> states, partials;
  std::vector<int32_t> counters;
};

// Fills `schedule` and points `args` at it; sets args.num_threads to 1 where a second thread would not pay.
void build_schedule(AttendArgs& args, const Kernels& kernels, Schedule& schedule);

// What rows cost against some keys. Reading a key costs about as much as scoring it against four rows.
inline int64_t cost_of(int64_t keys, int64_t rows) { return keys * (rows + 4); }

// Finds keys that blocks of few rows have in the same pages, and takes them out of the costs of these (shared_keys.cpp). Returns what the shared
// items cost.
int64_t share_keys(AttendArgs& args, const Kernels& kernels, Schedule& schedule);

}  // namespace quire
