"""Drafts: what they save where they are right and cost where they are wrong, on a random checkpoint of Qwen3-0.6B's shape.

Tokens are sampled at temperature 1, so that the output never repeats by itself, as a greedy one of a random model does.
A prediction is what the request draws without one (right), the same with every 16th token another (edited), or tokens that stand behind each pair of
its tokens and never come (wrong, at every step: the worst there is). All draw the same tokens, which is checked.
"""

from __future__ import annotations

import random
import statistics
from dataclasses import replace

from bench.live import prompt
from bench.machine import Bench
from bench.speed.checkpoints import checkpoint
from bench.speed.shapes import QWEN3
from quire import LLM, SamplingParams

PROMPT, NEW, ROUNDS = 128, 128, 3


def run(layers: int) -> Bench:
    """Measure and print: one stream and four, in turns within one engine, medians."""
    folder, results = str(checkpoint(QWEN3.shortened(layers))), Bench()
    print(f"drafts: Qwen3-0.6B's shape with {layers} layers, bf16 and int8, {PROMPT} tokens in and {NEW} out")
    for quantization in ("none", "int8"):
        with LLM(folder, quantization=quantization, max_sequences=4, cache_bytes=2**30) as llm:
            for num_streams in (1, 4):
                results[f"{quantization}, {num_streams}"] = _compare(llm, num_streams, f"{quantization:<5} {num_streams}")
    return results


def _compare(llm: LLM, num_streams: int, title: str) -> Bench:
    rng = random.Random(1)
    prompts = [prompt(rng, PROMPT) for _ in range(num_streams)]
    plain = SamplingParams(max_tokens=NEW, temperature=1, seed=1, ignore_eos=True)
    drawn = [output.outputs[0].token_ids for output in llm.generate(prompts, plain)]
    absent = next(token for token in range(llm.info.vocab_size) if not any(token in ids for ids in drawn))
    kinds = {
        "none": [None] * num_streams,
        "right": drawn,
        "edited": [[absent if i % 16 == 15 else token for i, token in enumerate(ids)] for ids in drawn],
        "wrong": [[token for pair in zip(ids, ids[1:], strict=False) for token in (*pair, absent)] for ids in drawn],
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    results = Bench()
    for _ in range(ROUNDS):
        for kind, predictions in kinds.items():
            steps = llm.stats()["num_steps"]
            outputs = llm.generate(prompts, [replace(plain, prediction=one) for one in predictions])
            assert [output.outputs[0].token_ids for output in outputs] == drawn, "a draft has changed what is drawn"
            seconds[kind].append(max(output.receipt.decode_s for output in outputs))
            results[kind] = {"steps": llm.stats()["num_steps"] - steps, "accepted": sum(output.receipt.accepted_tokens for output in outputs)}
    for kind, taken in seconds.items():
        median = results[kind]["seconds"] = statistics.median(taken)
        ratio = statistics.median(seconds["none"]) / median
        spread = f"{min(taken):.2f} to {max(taken):.2f}"
        print(f"  {title} {kind:<7} {median:6.2f} s ({spread}), {results[kind]['steps']:4d} steps, {ratio:.2f} times as fast")
    return results
