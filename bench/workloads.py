"""(d) Whole workloads on a random checkpoint of Qwen3-0.6B's shape, beside transformers' `generate` and `generate_batch`. Public names only.

Every engine is given the same live model, the same prompts and the same exact output lengths, greedy, one engine after the other in one run.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.models.qwen3 import Qwen3Config

from bench.machine import Bench
from quire import LLM, SamplingParams

VOCAB = 151_936
Jobs = list[tuple[list[int], int]]


@dataclass(frozen=True)
class Result:
    """Seconds in all and to the first token (of a single request), and the most memory held beyond what was held before, in MB."""

    seconds: float
    first_token_s: float | None = None
    extra_mb: float | None = None


def random_model(layers: int, dtype: torch.dtype) -> PreTrainedModel:
    """Qwen3-0.6B's shape with random weights; fewer layers for a quicker run."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=1024, intermediate_size=3072, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, tie_word_embeddings=True, max_position_embeddings=40_960, rope_theta=1e6, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(1, VOCAB) for _ in range(length)]


def ragged(rng: random.Random, count: int, scale: float) -> Jobs:
    """Log-uniform lengths: 16..512 in, 16..256 out, times `scale`."""

    def length(low: int, high: int) -> int:
        return max(1, round(low * (high / low) ** rng.random() * scale))

    return [(prompt(rng, length(16, 512)), length(16, 256)) for _ in range(count)]


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


def with_generate(model: PreTrainedModel, jobs: Jobs, batch: int = 16) -> Result:
    """Left-padded batches in order of arrival, each as long as its longest."""

    def run() -> float | None:
        first = None
        for at in range(0, len(jobs), batch):
            part = jobs[at : at + batch]
            width, new = max(len(p) for p, _ in part), max(n for _, n in part)
            ids = torch.tensor([[0] * (width - len(p)) + p for p, _ in part])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in part])
            if len(jobs) == 1:
                start = time.perf_counter()
                model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=1, pad_token_id=0)
                first = time.perf_counter() - start
            model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0)
        return first

    result = measured(run)
    return Result(result.seconds - (result.first_token_s or 0.0), result.first_token_s, result.extra_mb)


def with_generate_batch(model: PreTrainedModel, jobs: Jobs) -> Result:
    """transformers' continuous batching; each request has its own length, so requests are added one by one."""
    config = GenerationConfig(do_sample=False, max_new_tokens=max(n for _, n in jobs), eos_token_id=-1, pad_token_id=0)

    def run() -> float | None:
        with model.continuous_batching_context_manager(generation_config=config, warmup=False) as manager:
            for i, (ids, new) in enumerate(jobs):
                manager.add_request(ids, request_id=str(i), max_new_tokens=new, eos_token_id=-1)
            left = {str(i) for i in range(len(jobs))}
            while left:
                result = manager.get_result(timeout=1.0)
                if result is not None and result.is_finished():
                    left.discard(result.request_id)
                elif result is None and not manager.is_running():
                    raise RuntimeError("generate_batch stopped before its requests had finished")
        return None

    implementation = model.config._attn_implementation
    try:
        return measured(run)
    finally:
        model.set_attn_implementation(implementation)


def run(layers: int, scale: float, count: int, long_prompt: int, peers: bool, only: str = "") -> Bench:
    """The workloads whose names hold `only`; prints a line for each engine and returns seconds and ratios."""
    model, rng, results = random_model(layers, torch.bfloat16), random.Random(0), {}
    stem = prompt(rng, round(768 * scale))
    workloads: dict[str, Jobs] = {
        "one stream": [(prompt(rng, 128), 128)],
        f"{count} ragged": ragged(rng, count, scale),
        f"shared prefix of {len(stem)}": [(stem + prompt(rng, rng.randint(16, 48)), 32) for _ in range(count // 2)],
        f"a prompt of {long_prompt}": [(prompt(rng, long_prompt), 16)],
    }
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"workloads: Qwen3-0.6B's shape with {layers} layers, bf16, random weights, {millions:.0f} M parameters")
    for name, jobs in [item for item in workloads.items() if only in item[0]]:
        tokens_in, tokens_out = sum(len(p) for p, _ in jobs), sum(n for _, n in jobs)
        print(f" {name}: {tokens_in} tokens in, {tokens_out} out")
        quire, counters = with_quire(model, jobs, cache_bytes=2 * 2**30, max_sequences=32)
        entry: Bench = {"tokens_in": tokens_in, "tokens_out": tokens_out, "quire": line("quire", quire, tokens_out, None), "counters": counters}
        print(f"    {counters}")
        if peers:
            entry["generate"] = line("generate", with_generate(model, jobs), tokens_out, quire)
            try:
                entry["generate_batch"] = line("generate_batch", with_generate_batch(model, jobs), tokens_out, quire)
            except Exception as error:
                print(f"    generate_batch    failed: {type(error).__name__}: {error}")
                entry["generate_batch"] = {"failed": str(error)}
        results[name] = entry
    return {"layers": layers, **results}


def line(name: str, result: Result, tokens_out: int, quire: Result | None) -> Bench:
    ratio = result.seconds / quire.seconds if quire else None
    first = f", first token {result.first_token_s:.2f} s" if result.first_token_s is not None else ""
    print(
        f"    {name:<15} {result.seconds:8.2f} s {tokens_out / result.seconds:8.1f} tokens/s out{first}, {result.extra_mb:+.0f} MB at peak"
        + (f"; quire is {ratio:.2f} times as fast" if ratio else "")
    )
    return {"seconds": result.seconds, "first_token_s": result.first_token_s, "extra_mb": result.extra_mb, "quire_times_as_fast": ratio}


def _status_mb(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    return 0.0
