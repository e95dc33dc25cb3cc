"""A live random model of Qwen3-0.6B's shape in this process, for what is compared on one: padded batches, chunks, the cache. Public names only."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.qwen3 import Qwen3Config

from bench.machine import Bench
from bench.speed.checkpoints import config_fields
from bench.speed.engines.protocol import status_bytes
from bench.speed.shapes import QWEN3
from quire import LLM, SamplingParams

Jobs = list[tuple[list[int], int]]


@dataclass(frozen=True)
class Result:
    """Seconds in all and to the first token (of a single request), and the most memory held beyond what was held before, in MB."""

    seconds: float
    first_token_s: float | None = None
    extra_mb: float | None = None


def random_model(layers: int, dtype: torch.dtype) -> PreTrainedModel:
    """The shape with random weights; fewer layers for a quicker run."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Qwen3Config(**config_fields(QWEN3.shortened(layers))), dtype=dtype).eval()


def prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(1, QWEN3.vocab) for _ in range(length)]


def measured(function: Callable[[], object]) -> Result:
    """Time and peak memory of a call that returns its time to first token, if it knows."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark anew
    before, start = _status_mb("VmRSS"), time.perf_counter()
    first = function()
    taken = time.perf_counter() - start
    return Result(taken, first if isinstance(first, float) else None, _status_mb("VmHWM") - before)


def with_quire(model: PreTrainedModel, jobs: Jobs, **options: object) -> tuple[Result, Bench]:
    with LLM(model, **options) as llm:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2))
        llm.reset_cache()
        stats = llm.stats()

        def run() -> float | None:
            params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for _, n in jobs]
            outputs = llm.generate([p for p, _ in jobs], params)
            receipt = outputs[0].receipt
            return receipt.queued_s + receipt.prefill_s if len(jobs) == 1 else None

        result = measured(run)
        after = llm.stats()
        counters = {key: after[key] - stats[key] for key in ("num_computed_tokens", "num_cached_tokens", "num_steps", "num_preemptions")}
        return result, {**counters, "bytes_per_token": llm.info.bytes_per_token, "workspace_bytes": llm.info.workspace_bytes}


def line(name: str, result: Result, tokens_out: int, quire: Result | None) -> Bench:
    ratio = result.seconds / quire.seconds if quire else None
    first = f", first token {result.first_token_s:.2f} s" if result.first_token_s is not None else ""
    print(
        f"    {name:<15} {result.seconds:8.2f} s {tokens_out / result.seconds:8.1f} tokens/s out{first}, {result.extra_mb:+.0f} MB at peak"
        + (f"; quire is {ratio:.2f} times as fast" if ratio else "")
    )
    return {"seconds": result.seconds, "first_token_s": result.first_token_s, "extra_mb": result.extra_mb, "quire_times_as_fast": ratio}


def _status_mb(key: str) -> float:
    return status_bytes(key) / 2**20
