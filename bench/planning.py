"""What a step costs before and after the model: plan and commit of many decoding sequences, in pure Python.

Every sequence has the same length and its own tokens, so all complete a page in one step, grow one in the next and leave a window's page in
one: the worst steps there are. The steady pool gives pages from the free list; the full one must evict a cached page for each it gives.
Each step is timed `--repeats` times in equal runs and its best time taken, because other processes share the machine; the quantiles are
over the steps. `loop_ns` is one turn of an empty Python loop in the same process, to compare machines and moments by.

    python -m bench.planning [--sequences 256] [--steps 64] [--repeats 5]

Prints one JSON line for each case: microseconds a step.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time

from bench.options import whole
from quire.policy.cache import PageCache
from quire.policy.groups import Group
from quire.policy.scheduler import Scheduler
from quire.policy.sequence import Sequence

PAGE, WINDOW, PROMPT = 16, 256, 320
CASES = {
    "full": (Group(0, PAGE, 0, 0, ()),),
    "hybrid of 4": (Group(0, PAGE, 0, 0, ()), *(Group(i, PAGE, WINDOW, 0, ()) for i in (1, 2, 3))),
}


def run(groups: tuple[Group, ...], num_sequences: int, num_steps: int, *, evicting: bool) -> list[tuple[float, float]]:
    """Seconds of (plan, commit) for each step, all sequences decoding."""
    rng = random.Random(1)
    pages = num_sequences * len(groups) * ((PROMPT + num_steps) // PAGE + 2)
    cache = PageCache(groups, pages)
    scheduler = Scheduler(cache, max_tokens_per_step=2 * num_sequences * PROMPT, max_sequences=num_sequences)
    arrival = 0
    if evicting:
        while cache.pool.num_free > len(groups) * PROMPT // PAGE:
            scheduler.add(Sequence(arrival, [rng.randrange(50_000) for _ in range(PROMPT)], cache.namespaces.root("")))
            plan = scheduler.plan()
            assert plan is not None
            scheduler.commit(plan)
            scheduler.finish(plan.works[0].sequence)
            arrival += 1
    sequences = [Sequence(arrival + i, [rng.randrange(50_000) for _ in range(PROMPT)], cache.namespaces.root("")) for i in range(num_sequences)]
    for seq in sequences:
        scheduler.add(seq)
    times = []
    while len(times) <= num_steps:
        start = time.thread_time()
        plan = scheduler.plan()
        planned = time.thread_time()
        assert plan is not None and len(plan.works) == num_sequences
        middle = time.thread_time()
        scheduler.commit(plan)
        times.append((planned - start, time.thread_time() - middle))
        for seq in sequences:
            seq.tokens.append(rng.randrange(50_000))
    return times[1:]  # the first was the prompts


def loop_ns() -> float:
    """Nanoseconds of one turn of an empty loop."""
    best = float("inf")
    for _ in range(20):
        start = time.thread_time()
        for _ in range(10_000):
            pass
        best = min(best, time.thread_time() - start)
    return best / 10_000 * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.planning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=whole, default=256)
    parser.add_argument("--steps", type=whole, default=64)
    parser.add_argument("--repeats", type=whole, default=5)
    args = parser.parse_args()
    for name, groups in CASES.items():
        for evicting in (False, True):
            runs = [run(groups, args.sequences, args.steps, evicting=evicting) for _ in range(args.repeats)]
            best = [min(plan + commit for plan, commit in step) * 1e6 for step in zip(*runs, strict=True)]
            every = sorted((plan + commit) * 1e6 for one in runs for plan, commit in one)
            row = {
                "bench": "planning",
                "groups": name,
                "pool": "full" if evicting else "steady",
                "sequences": args.sequences,
                "median_us": round(statistics.median(best)),
                "p95_us": round(sorted(best)[int(0.95 * len(best))]),
                "max_us": round(max(best)),
                "median_of_all_us": round(statistics.median(every)),
                "p95_of_all_us": round(every[int(0.95 * len(every))]),
                "loop_ns": round(loop_ns(), 1),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
