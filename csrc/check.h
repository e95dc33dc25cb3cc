// Page tables and slots come from Python; a wrong entry must be an exception that names it, not a stray read or write.
#pragma once
#include "kernels.h"

namespace quire {

// Throw std::runtime_error. One look per page and per token: they cost nothing beside the work they guard.
void check_attend(const AttendArgs& args);
void check_commit(const CommitArgs& args);

}  // namespace quire
