// Products of one x of few rows with some weights, as one call of the team. A step of decoding has a hundred such calls, and what a core
// does not read while it waits for another is lost (docs/speed.md, "What one core reads"): so each thread has x for its own, and one that is done
// takes panels that another has not begun.
//
//   panels of q, k, v   0 1 2 3 ->       31 | 32 33 34 35 ->       63
//                       thread 0            | thread 1       <- then thread 0
#pragma once
#include "linear_panels.h"

namespace quire {
namespace QUIRE_ISA {
namespace {
namespace product {

// A thread's own panels: it takes them from the first one on, others from the last.
struct alignas(64) Stretch {
  int64_t taken, by_others;
};

template <class P>
int64_t few_scratch_floats(const LinearArgs& g) {
  const TilePlan p = P::plan(g);
  return p.threads * (int64_t(sizeof(Stretch)) + p.x_bytes + p.own_bytes) / 4;
}

template <class P>
void run_few(const LinearArgs* products, int64_t count) {
  TilePlan p = P::plan(products[0]);
  int64_t panels = 0;
  for (int64_t i = 0; i < count; ++i) {
    panels += ceil_div(products[i].n, kWide);
    const TilePlan one = P::plan(products[i]);  // of the same x, so only its threads differ
    if (one.threads > p.threads) p = one;
  }
  auto* const stretches = (Stretch*)products[0].scratch;
  for (int i = 0; i < p.threads; ++i) stretches[i] = {};
  parallel(p.threads, [&](const Member& me) {
    char *const x = (char*)(stretches + p.threads) + me.id * (p.x_bytes + p.own_bytes), *const own = x + p.x_bytes;
    [[maybe_unused]] const auto shapes = P::shapes(p);
    P::place(products[0], p, 0, 0, p.rows, x);
    for (int i = 0; i < me.count; ++i) {
      const int owner = (me.id + i) % me.count;
      Stretch& stretch = stretches[owner];
      const int64_t begin = panels * owner / me.count, end = panels * (owner + 1) / me.count;
      int64_t mine = begin;
      while (begin + __atomic_fetch_add(&stretch.taken, 1, __ATOMIC_RELAXED) < end) {
        int64_t panel = i == 0 ? mine++ : end - 1 - __atomic_fetch_add(&stretch.by_others, 1, __ATOMIC_RELAXED);
        const LinearArgs* g = products;
        for (; panel >= ceil_div(g->n, kWide); ++g) panel -= ceil_div(g->n, kWide);
        P::pass(*g, p, x, 0, 1, panel, true, own);
      }
    }
  });
}

}  // namespace product
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
