"""The faces: a padded batch beside transformers' own, as trainers call it, and a long prompt in chunks of several sizes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

import quire
from bench.live import Result, line, measured, prompt, random_model, with_quire
from bench.machine import Bench

CHUNKS = (64, 256, 512, 2048)


def run(layers: int, batches: list[int], new: int, long_prompt: int, peers: bool) -> Bench:
    """Prints each comparison and returns its figures."""
    model, rng = random_model(layers, torch.bfloat16), random.Random(2)
    print(f"faces: Qwen3-0.6B's shape with {layers} layers, bf16, random weights")
    results: Bench = {"layers": layers, "padded": {str(batch): padded(model, rng, batch, new, peers) for batch in batches}}
    if long_prompt:
        results["chunks"] = chunks(model, rng, long_prompt)
    return results


def padded(model: PreTrainedModel, rng: random.Random, batch: int, new: int, peers: bool) -> Bench:
    """Mixed lengths, 16 to 512 log-uniform, left-padded, and as many new tokens for each: `quire.generate` on a live model, start-up included."""
    ids = quire.left_pad([prompt(rng, round(16 * 32 ** rng.random())) for _ in range(batch)])
    mask, tokens_out = (ids != 0).long(), batch * new
    print(f" padded batch of {batch}, width {ids.shape[1]}, {int(mask.sum())} tokens in, {tokens_out} out")

    def with_face() -> None:
        quire.generate(model, ids, max_generated_tokens=new, temperature=0.0, return_logits=False)

    ours = measured(with_face)
    figures: Bench = {"quire": line("quire.generate", ours, tokens_out, None)}
    if not peers:
        return figures
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
    figures["generate"] = line("generate", measured(lambda: model.generate(ids, **options)), tokens_out, ours)
    try:
        figures["static, compiled"] = static(model, lambda: model.generate(ids, cache_implementation="static", **options), tokens_out, ours)
    except Exception as error:
        print(f"    static, compiled  failed: {type(error).__name__}: {str(error)[:200]}")
        figures["static, compiled"] = {"failed": f"{type(error).__name__}: {error}"}
    return figures


def static(model: PreTrainedModel, generate: Callable[[], object], tokens_out: int, ours: Result) -> Bench:
    """transformers with a static cache and a compiled forward; what compiling takes is told apart, as a second run takes none."""
    vars(model)["forward"] = torch.compile(model.forward)
    try:
        start = time.perf_counter()
        generate()
        cold = time.perf_counter() - start
        result = measured(lambda: generate())
        return {**line("static, compiled", result, tokens_out, ours), "first_run_s": cold}
    finally:
        del vars(model)["forward"]
        torch.compiler.reset()


def chunks(model: PreTrainedModel, rng: random.Random, length: int) -> Bench:
    """The first token of a long prompt, and the memory its steps take beside its pages, under several bounds."""
    ids, figures = prompt(rng, length), {}
    print(f" a prompt of {length} in chunks")
    for size in CHUNKS:
        result, counters = with_quire(model, [(ids, 1)], max_tokens_per_step=size, cache_bytes=4 * 2**30)
        pages_mb, foreseen = length * counters["bytes_per_token"] / 2**20, counters["workspace_bytes"] / 2**20
        extra = (result.extra_mb or 0.0) - pages_mb
        beside = f"{extra:+6.0f} MB beside {pages_mb:.0f} MB of pages ({foreseen:.0f} MB foreseen)"
        print(f"    {size:>5} tokens a step {result.first_token_s:8.2f} s, {beside}")
        figures[str(size)] = {"first_token_s": result.first_token_s, "extra_mb": extra, "foreseen_mb": foreseen, "steps": counters["num_steps"]}
    return figures
