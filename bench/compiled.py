"""`python -m bench.compiled`: compiled decoder layers beside plain ones, on Qwen3-0.6B's shape, in one run, steps alternated.

Three steps: one stream that decodes after 128 tokens, 32 streams that do, and a prompt of 512. `--start` prints only how long an engine takes to
start, so that two processes after each other (with TORCHINDUCTOR_CACHE_DIR set to an empty folder before the first) show a cold and a warm one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

from bench.live import random_model
from bench.machine import Bench
from quire import LLM
from quire.tensors.attention.base import StepInputs, TableInputs
from quire.tensors.device import one_torch_thread_here
from quire.tensors.models.model import CausalModel
from quire.tensors.store import PageStore, StagedStep


def step_of(llm: LLM, num_seqs: int, committed: int, new: int) -> Callable[[], None]:
    """A step of `num_seqs` sequences, each with `committed` tokens in pages of its own and `new` to compute. It is not committed."""
    runner = llm._built.engine.runner
    model: CausalModel = runner.model
    store: PageStore = runner.store
    (group,) = runner.groups
    per_seq = -(-(committed + new) // group.page_size)
    pages = torch.arange(num_seqs * per_seq, dtype=torch.int32)
    store.pages[: len(pages)].zero_()
    table = TableInputs(pages, torch.arange(num_seqs + 1, dtype=torch.int32) * per_seq)
    inputs = StepInputs(torch.arange(num_seqs + 1, dtype=torch.int32) * new, torch.full((num_seqs,), committed, dtype=torch.int32), (table,))
    slots = (torch.full((num_seqs * new,), -1),)
    ids, positions = torch.arange(num_seqs * new) + 5, torch.arange(committed, committed + new).repeat(num_seqs)
    logits_at = torch.arange(1, num_seqs + 1) * new - 1
    return lambda: void(model.forward(StagedStep(store, inputs, slots), ids, positions, logits_at))


def void(_: object) -> None:
    """Nothing."""


def alternated(plain: Callable[[], None], compiled: Callable[[], None], count: int) -> tuple[list[float], list[float]]:
    """Seconds of each, sorted; one after the other `count` times."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(count):
        for function, into in zip((plain, compiled), times, strict=True):
            start = time.perf_counter()
            function()
            into.append(time.perf_counter() - start)
    return sorted(times[0]), sorted(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--start", action="store_true", help="only the time to start, plain and compiled")
    args = parser.parse_args()
    results: Bench = {}
    for name in args.dtypes:
        model, started = random_model(args.layers, getattr(torch, name)), []
        engines = []
        for compile in (False, True):
            start = time.perf_counter()
            engines.append(LLM(model, compile=compile, cache_bytes=2**30, num_threads=args.threads))
            started.append(time.perf_counter() - start)
        print(f"{name}: start {started[0]:.1f} s, compiled {started[1]:.1f} s", flush=True)
        entry: Bench = {"start_s": started}
        one_torch_thread_here()  # as the engine's own thread has it
        for what, (num_seqs, committed, new), count in () if args.start else STEPS:
            plain, compiled = (step_of(llm, num_seqs, committed, new) for llm in engines)
            alternated(plain, compiled, 2)
            a, b = alternated(plain, compiled, count)
            entry[what] = {"best_s": (a[0], b[0]), "median_s": (a[count // 2], b[count // 2])}
            print(
                f"  {what:<16} best: plain {a[0] * 1e3:7.2f} ms, compiled {b[0] * 1e3:7.2f} ms, {a[0] / b[0]:.2f} times as fast;"
                f" median: {a[count // 2] * 1e3:.2f}, {b[count // 2] * 1e3:.2f}, {a[count // 2] / b[count // 2]:.2f}",
                flush=True,
            )
        for llm in engines:
            llm.close()
        results[name] = entry
    print(json.dumps(results))


STEPS = (("one stream", (1, 128, 1), 60), ("32 streams", (32, 128, 1), 20), ("a prompt of 512", (1, 0, 512), 8))

if __name__ == "__main__":
    main()
