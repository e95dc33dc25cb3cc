#include "check.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace quire {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::runtime_error(what); }

std::string entry(const char* name, int64_t index, int64_t value) { return std::string(name) + "[" + std::to_string(index) + "] = " + std::to_string(value); }

}  // namespace

void check_attend(const AttendArgs& args) {
  const int64_t page_size = args.layout.page_size;
  if (args.num_seqs > 0 && args.query_start[0] != 0) refuse("attend: " + entry("query_start", 0, args.query_start[0]) + " is not 0");
  for (int64_t s = 0; s < args.num_seqs; ++s) {
    const int32_t start = args.query_start[s], end = args.query_start[s + 1], committed = args.num_committed[s];
    if (end < start || end > args.num_tokens)
      refuse("attend: " + entry("query_start", s + 1, end) + " is outside " + std::to_string(start) + ".." + std::to_string(args.num_tokens));
    if (committed < 0) refuse("attend: " + entry("num_committed", s, committed) + " is negative");
    const int64_t first_entry = args.page_start[s], entries = args.page_start[s + 1] - first_entry;
    if (first_entry < 0 || entries < 0 || first_entry + entries > args.num_page_ids)
      refuse("attend: " + entry("page_start", s + 1, args.page_start[s + 1]) + " is outside the " + std::to_string(args.num_page_ids) + " page_ids");
    if (start == end) continue;
    int64_t first = args.window > 0 ? std::max<int64_t>(0, int64_t(committed) - args.window + 1) : 0;
    if (args.chunk > 0) first = std::max(first, committed / args.chunk * int64_t(args.chunk));
    for (int64_t j = first / page_size; j * page_size < committed; ++j) {
      if (j >= entries)
        refuse("attend: sequence " + std::to_string(s) + " has " + std::to_string(committed) + " committed tokens but only " + std::to_string(entries) +
               " pages of " + std::to_string(page_size));
      const int32_t id = args.page_ids[first_entry + j];
      if (id < 0 || id >= args.layout.num_pages)
        refuse("attend: page id " + std::to_string(id) + " (sequence " + std::to_string(s) + ", entry " + std::to_string(j) + ") is outside 0.." +
               std::to_string(args.layout.num_pages - 1));
    }
  }
}

void check_commit(const CommitArgs& args) {
  const int64_t num_slots = args.layout.num_pages * args.layout.page_size;
  for (int64_t t = 0; t < args.num_tokens; ++t) {
    if (args.slots[t] < -1 || args.slots[t] >= num_slots)
      refuse("commit: " + entry("slots", t, args.slots[t]) + " is outside the " + std::to_string(num_slots) + " slots of " +
             std::to_string(args.layout.num_pages) + " pages");
  }
}

}  // namespace quire
