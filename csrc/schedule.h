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
  std::vector<float> partials;
  std::vector<int32_t> counters;
};

// Fills `schedule` and points `args` at it; sets args.num_threads to 1 where a second thread would not pay.
void build_schedule(AttendArgs& args, const Kernels& kernels, Schedule& schedule);

}  // namespace quire
