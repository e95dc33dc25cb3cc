"""`python -m bench.layers`: decoder layers as programs, and as compiled code, beside plain ones, on Qwen3-0.6B's shape, steps alternated in one run.

Three steps: one stream that decodes after 128 tokens, 32 streams that do, and a prompt of 512. `--start` prints only how long an engine takes to
start, so that two processes after each other (with TORCHINDUCTOR_CACHE_DIR set to an empty folder before the first) show a cold and a warm one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from bench.live import random_model
from bench.machine import Bench
from bench.options import above_zero, whole
from quire import LLM
from quire.config import DTYPES
from quire.tensors.attention.base import StepInputs, TableInputs
from quire.tensors.host import one_torch_thread_here
from quire.tensors.models.model import CausalModel
from quire.tensors.store import PageStore, StagedStep

KINDS = ("plain", "programs", "compiled")


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


def alternated(functions: Sequence[Callable[[], None]], count: int) -> list[list[float]]:
    """Seconds of each, in the order of the runs; one after the other `count` times."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(count):
        for function, into in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            into.append(time.perf_counter() - start)
    return times


def engine(model: PreTrainedModel, kind: str, threads: int) -> LLM:
    """An engine whose layers are plain, programs or compiled."""
    llm = LLM(model, compile=kind == "compiled", cache_bytes=2**28, num_threads=threads)
    if kind == "plain":
        llm._built.engine.runner.model.lowered = None
    return llm


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.layers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=whole, default=6)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES[1:], default=["bfloat16", "float32"])
    parser.add_argument("--threads", type=whole, default=torch.get_num_threads())
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS[:2]))
    parser.add_argument("--repeats", type=above_zero, default=1.0, help="times as many runs of each step as usual")
    parser.add_argument("--start", action="store_true", help="only the time to start")
    args = parser.parse_args()
    results: Bench = {}
    for name in args.dtypes:
        model, started = random_model(args.layers, getattr(torch, name)), []
        engines = []
        for kind in args.kinds:
            start = time.perf_counter()
            engines.append(engine(model, kind, args.threads))
            started.append(time.perf_counter() - start)
        print(f"{name}: start " + ", ".join(f"{kind} {took:.1f} s" for kind, took in zip(args.kinds, started, strict=True)), flush=True)
        entry: Bench = {"start_s": started}
        one_torch_thread_here()  # as the engine's own thread has it
        for what, (num_seqs, committed, new), count in () if args.start else STEPS:
            steps = [step_of(llm, num_seqs, committed, new) for llm in engines]
            alternated(steps, 2)
            times = alternated(steps, max(2, round(count * args.repeats)))
            for kind, taken in zip(args.kinds, times, strict=True):
                paired = statistics.median(a / b for a, b in zip(times[0], taken, strict=True))
                entry[f"{what}, {kind}"] = {"best_s": min(taken), "median_s": statistics.median(taken), "times_as_fast": paired}
                print(
                    f"  {what:<16} {kind:<9} best {min(taken) * 1e3:8.2f} ms, median {statistics.median(taken) * 1e3:8.2f},"
                    f" {paired:.2f} times as fast as {args.kinds[0]} (median of pairs)",
                    flush=True,
                )
        for llm in engines:
            llm.close()
        results[name] = entry
    print(json.dumps(results))


STEPS = (("one stream", (1, 128, 1), 60), ("32 streams", (32, 128, 1), 20), ("a prompt of 512", (1, 0, 512), 8))

if __name__ == "__main__":
    main()
