// Parts of a call on the threads of a team (team.h).
#pragma once
#include "simd.h"
#include "team.h"

namespace quire {
namespace QUIRE_ISA {
namespace {

// f(member) on each of up to `threads` threads.
template <class Function>
void parallel(int threads, const Function& f) {
  run_team(threads, [](void* context, const Member& member) { (*static_cast<const Function*>(context))(member); }, (void*)&f);
}

// f(i, thread) for each i < count: equal stretches of them to each thread.
template <class Function>
void parallel_for(int threads, int64_t count, const Function& f) {
  parallel(threads, [&](const Member& me) {
    for (int64_t i = count * me.id / me.count; i < count * (me.id + 1) / me.count; ++i) f(i, me.id);
  });
}

// What is next of `count` things whose sizes differ, for whichever thread comes first.
struct Next {
  int64_t count, taken = 0;

  bool take(int64_t& i) {
    i = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED);
    return i < count;
  }
};

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
