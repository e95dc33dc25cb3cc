"""Llama 3 8B's shape on an accelerator: seconds a step of one stream and of many, beside transformers' `generate_batch` and what memory allows.

A step's limit is reading the weights once, and the keys and values that its tokens see, at the bandwidth measured in the same run. Random weights in
bf16, greedy, exact lengths; what is told is the whole of a call (`seconds`), in which `generate_batch` captures its graphs anew, and a decoding
step: what more tokens took, over their number.
Quire runs with captured steps and, as `eager`, without. No accelerator has run this yet (docs/devices.md). Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from bench.machine import Bench, best
from bench.options import folder, whole
from bench.speed.checkpoints import checkpoint
from bench.speed.shapes import LLAMA3, Shape
from quire import LLM, SamplingParams

ROUNDS = 3


class Lengths(NamedTuple):
    """Tokens of each prompt, and those generated behind it."""

    prompt: int
    new: int


Generate = Callable[[list[list[int]], int], None]  # prompts, and how many tokens to generate after each


def main() -> None:
    """Measure, print and end with one JSON line."""
    parser = argparse.ArgumentParser(prog="bench.accelerator", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="as torch names it")
    parser.add_argument("--layers", type=whole, default=LLAMA3.layers, help="fewer for a quick look")
    parser.add_argument("--batches", type=whole, nargs="+", default=[1, 32, 256], help="streams")
    parser.add_argument("--prompt", type=whole, default=128, help="tokens of each prompt; many, for attention's share")
    parser.add_argument("--new", type=whole, default=128, help="tokens of each")
    parser.add_argument("--no-peers", action="store_true", help="Quire alone")
    parser.add_argument("--cache", type=folder, help="where the checkpoint is written once: a folder")
    args = parser.parse_args()
    if args.new < 2:
        parser.error(f"argument --new: {args.new}: must be 2 or more, as the first token is no decoding step")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a build of torch that knows no such device
        parser.error(f"argument --device: {args.device}: torch finds no such device ({str(error).splitlines()[0]})")
    shape, lengths = LLAMA3.shortened(args.layers), Lengths(args.prompt, args.new)
    path, bandwidth = checkpoint(shape, args.cache, args.device), _bandwidth(args.device)
    told = f"torch {torch.__version__}, memory read {bandwidth:.0f} GB/s; {shape.name}, {args.prompt} in, {args.new} out"
    print(f"accelerator: {_name(args.device)}, {told}")
    results: Bench = {"date": time.strftime("%Y-%m-%d"), "device": _name(args.device), "read_gb_s": bandwidth, "args": {**vars(args), "cache": None}}
    limit = {batch: _limit(shape, batch, lengths, bandwidth) for batch in args.batches}
    for name in ("quire", "eager") if args.no_peers else ("quire", "eager", "generate_batch"):
        try:
            results[name] = _engine(name, path, args.device, args.batches, lengths, limit)
        except Exception as error:  # one that fails is told, and the others go on
            results[name] = {"failed": f"{type(error).__name__}: {error}"}
            print(f"  {name:<15} failed: {results[name]['failed'][:300]}")
        gc.collect()
    print(json.dumps(results))


def _engine(name: str, path: Path, device: str, batches: list[int], lengths: Lengths, limit: dict[int, float]) -> Bench:
    if name == "generate_batch":
        return _measure(name, _transformers(path, device, lengths.prompt), batches, lengths, limit)
    with LLM(str(path), device=device, max_sequences=max(batches), enforce_eager=name == "eager", prefix_sharing=False) as llm:
        print(f"  {name:<15} {llm.info.layers}")

        def generate(prompts: list[list[int]], num: int) -> None:
            outputs = llm.generate(prompts, SamplingParams(max_tokens=num, temperature=0.0, ignore_eos=True))
            assert all(len(output.outputs[0].token_ids) == num for output in outputs), "not the tokens asked for"

        return {"layers": llm.info.layers, **_measure(name, generate, batches, lengths, limit)}


def _transformers(path: Path, device: str, prompt: int) -> Generate:
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(str(path), dtype="auto").to(device).eval()

    def generate(prompts: list[list[int]], num: int) -> None:
        page = ContinuousBatchingConfig().page_size
        blocks = len(prompts) * -(-(prompt + num) // page)
        sizes = ContinuousBatchingConfig(num_blocks=2 * blocks, max_batch_tokens=512, max_requests_per_batch=len(prompts))
        config = GenerationConfig(max_new_tokens=num, eos_token_id=-1, pad_token_id=0, do_sample=False)
        outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=sizes)
        assert all(len(output.generated_tokens) == num for output in outputs.values()), "not the tokens asked for"

    return generate


def _measure(name: str, generate: Generate, batches: list[int], lengths: Lengths, limit: dict[int, float]) -> Bench:
    results: Bench = {}
    prompt, new = lengths
    for batch in batches:
        rng = random.Random(batch)
        taken: dict[int, list[float]] = {1: [], new: []}
        for _ in range(ROUNDS + 1):
            for num, times in taken.items():
                prompts = [[rng.randrange(1, LLAMA3.vocab) for _ in range(prompt)] for _ in range(batch)]
                start = time.perf_counter()
                generate(prompts, num)
                times.append(time.perf_counter() - start)
        first, seconds = (statistics.median(times[1:]) for times in taken.values())  # the first round compiles
        step = (seconds - first) / (new - 1)
        results[str(batch)] = {"seconds": seconds, "step_s": step, "limit_s": limit[batch], "spread": [min(taken[new][1:]), max(taken[new][1:])]}
        told = f"{step * 1e3:.2f} ms, {batch / step:.0f} tokens/s, {limit[batch] / step:.0%} of what memory allows" if step > 0 else "within noise"
        print(f"  {name:<15} {batch:4d} streams {seconds:7.2f} s; a step {told}")
    return results


def _limit(shape: Shape, batch: int, lengths: Lengths, bandwidth: float) -> float:
    """Seconds of a decoding step in which each stream has half of its new tokens."""
    return (2 * (shape.layer_weights + shape.head_weights) + batch * shape.kv_bytes(lengths.prompt + lengths.new // 2)) / bandwidth / 1e9


def _bandwidth(device: str) -> float:
    """GB/s at which a sum reads a tensor too large for any cache."""
    numbers = torch.ones(2**29, device=device)

    def read() -> None:
        numbers.sum().item()

    return numbers.nbytes / best(read) / 1e9


def _name(device: str) -> str:
    return "the CPU" if device == "cpu" else str(torch.get_device_module(device).get_device_name(device))


if __name__ == "__main__":
    main()
