// Threads that work on one call together: a team of the calling thread's own, kept from call to call.
//
//   caller   ── run(n, body) ──> body(0) ────────────┬──> waits for the others ──> goes on
//   worker i ── waits ─────────> body(i) ── meet() ──┴──> waits for the next call
//
// Whoever waits looks again and again for a while, since a step is hundreds of calls with microseconds between them, and then
// sleeps: an idle engine costs nothing. Where that was in vain it looks for half as long the next time, where it was not for
// twice as long: on a crowded machine, where the others wait for a core, nobody takes it from them by looking. GCC's OpenMP
// spins for milliseconds or, once a process has more of its threads than cores, not at all.
//
// Declarations only, as in kernels.h. parallel.h is what kernels call.
#pragma once
#include <stdint.h>

namespace quire {

class Team;

// One thread's part in a call. `count`: how many have a part; fewer than were asked for where the system gives no more threads.
struct Member {
  int id, count;
  Team* team;  // null where count is 1

  void meet() const;  // returns once all members have come here
};

// Calls body(context, member) once on each of up to `count` threads, one of them the caller's, and returns when all have returned.
// A body must not call this itself.
void run_team(int count, void (*body)(void*, const Member&), void* context);

}  // namespace quire
