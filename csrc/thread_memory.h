// A thread's working memory, cut into arrays.
#pragma once
#include <stdlib.h>

#include "simd.h"

namespace quire {
namespace QUIRE_ISA {
namespace {

// Grows to the largest need of its thread and is kept: allocating per call would fault its pages in every time.
struct ThreadMemory {
  float* floats = nullptr;
  int64_t size = 0;
  ~ThreadMemory() { free(floats); }
  float* get(int64_t wanted) {
    if (wanted > size) {
      free(floats);
      floats = (float*)aligned_alloc(64, size_t(wanted) * 4);
      size = floats ? wanted : 0;
    }
    return floats;
  }
};

struct Wanted {
  float** at;
  int64_t floats;
};

// False if memory is short. A debug build fills it with NaN, so that reading what was never written shows.
template <int N>
bool carve(ThreadMemory& memory, const Wanted (&wanted)[N]) {
  const auto lines = [](int64_t floats) { return (floats + 15) / 16 * 16; };
  int64_t total = 0;
  for (const Wanted& w : wanted) total += lines(w.floats);
  float* at = memory.get(total);
  if (!at) return false;
#ifdef QUIRE_DEBUG
  for (int64_t i = 0; i < total; ++i) at[i] = __builtin_nanf("");
#endif
  for (const Wanted& w : wanted) {
    *w.at = at;
    at += lines(w.floats);
  }
  return true;
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
