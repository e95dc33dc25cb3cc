"""Quire, through its front door."""

from __future__ import annotations

from typing import Any

import quire
from bench.speed.engines.protocol import Done, Engine, Task, main
from quire import LLM, SamplingParams

COUNTERS = ("num_computed_tokens", "num_cached_tokens", "num_steps", "num_preemptions")


def load(task: Task) -> Engine:
    """Options that a user would give: how many at once, threads, room for all that may run. That is taken at load, as vLLM takes it: where a host
    gives memory slowly, the first run would measure that."""
    options: dict[str, Any] = {} if task.quantization == "none" else {"quantization": task.quantization}
    llm = LLM(task.folder, max_sequences=task.max_concurrent, num_threads=task.threads, cache_bytes=2 * 2**30, preallocate=True, **options)

    def run(prompts: list[list[int]], new: list[int], n: int) -> Done:
        before = llm.stats()
        temperature = 0.0 if n == 1 else 1.0
        params = [SamplingParams(max_tokens=count, temperature=temperature, seed=task.seed, ignore_eos=True, n=n) for count in new]
        asked = list(zip(prompts, params, strict=True))
        turns = [asked] if task.max_concurrent > 1 else [[one] for one in asked]  # one after the other: none waits for those before it
        outputs = [output.raise_for_error() for turn in turns for output in llm.generate(*map(list, zip(*turn, strict=True)))]
        after = llm.stats()
        counters = {key: after[key] - before[key] for key in COUNTERS}
        counters |= {
            "pool_bytes": llm.info.cache_bytes,
            "weight_bytes": llm.info.weight_bytes,
            "workspace_bytes": llm.info.workspace_bytes,
            "backend": llm.info.backend,
        }
        tokens = sum(len(sequence.token_ids) for output in outputs for sequence in output.outputs)
        return Done(tokens, [output.receipt.queued_s + output.receipt.prefill_s for output in outputs], counters)

    return Engine(f"quire {quire.__version__}", run, llm.reset_cache)


if __name__ == "__main__":
    main(load, "torch", "transformers")
