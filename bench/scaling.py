"""`python -m bench.scaling`: tokens a second against batch size and context, with the machine's limits, as two SVG plots. Ends with one JSON line.

Decoding is timed on prompts that are in the cache already, so that all sequences decode from the first step on. Medians of `--repeat`. The limits are
those of bench/speed/limits.py for a step, and for decoding at a context the keys and values that must be read as well.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.options import folder, whole
from bench.speed.checkpoints import checkpoint
from bench.speed.limits import flops, weight_bytes
from bench.speed.shapes import QWEN3, SHAPES, STORED_BYTES, Shape
from bench.svg import Series, plot
from quire import LLM, SamplingParams

Points = list[tuple[float, float]]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="bench.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default=QWEN3.name)
    parser.add_argument("--layers", type=whole, help="fewer layers than the shape has")
    parser.add_argument("--quantization", choices=list(STORED_BYTES), default="none")
    parser.add_argument("--batches", type=whole, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--contexts", type=whole, nargs="+", default=[128, 256, 512, 1024, 2048, 4096, 8192, 16_384])
    parser.add_argument("--new", type=whole, default=32, help="tokens decoded at each point, the first with its prompt")
    parser.add_argument("--repeat", type=whole, default=3)
    parser.add_argument("--out", type=folder, default=Path("docs"), help="the folder of the plots")
    args = parser.parse_args()
    shape = SHAPES[args.shape].shortened(args.layers)
    if args.new < 2:
        parser.error(f"argument --new: '{args.new}': must be 2 or more, as the first token comes with the prompt")
    if max(128, *args.contexts) + args.new > shape.context:
        parser.error(
            f"argument --contexts: '{max(args.contexts)}': must be at most {shape.context - args.new} with --new {args.new}, of {shape.name}"
        )
    before = machine.run()
    # Room for the largest point twice: what is cached of one repetition is not in the way of the next.
    most = max(max(args.batches) * (128 + args.new), max(args.contexts) + args.new) + 1024
    options: dict[str, Any] = {} if args.quantization == "none" else {"quantization": args.quantization}
    with LLM(str(checkpoint(shape)), max_sequences=max(args.batches), cache_bytes=2 * shape.kv_bytes(1) * most, **options) as llm:
        batches = {b: [decode_s(llm, [128] * b, args.new) for _ in range(args.repeat)] for b in args.batches}
        contexts = {c: [decode_s(llm, [c], args.new) for _ in range(args.repeat)] for c in args.contexts}
    after = machine.run()
    read = max(m["read_gb_s"] for m in (before, after)) * 1e9
    rate = max(m["matrix_limit_gflop_s"] for m in (before, after)) * 1e9
    steps = args.new - 1
    by_batch: Points = [(b, b * steps / statistics.median(decode for _, decode in runs)) for b, runs in batches.items()]
    by_context: Points = [(c, steps / statistics.median(decode for _, decode in runs)) for c, runs in contexts.items()]
    prompts: Points = [(c, c / statistics.median(prompt for prompt, _ in runs)) for c, runs in contexts.items()]
    batch_limit, context_limit, prompt_limit = limits(shape, args.quantization, args.batches, args.contexts, read, rate)
    about = f"{shape.name}, {args.quantization}, {torch.get_num_threads()} threads, {time.strftime('%Y-%m-%d')}"
    title = f"Decoding after 128 tokens: {about}"
    decoding = [Series("decoding", by_batch), Series("limit", batch_limit, limit=True)]
    (args.out / "scaling-batch.svg").write_text(plot(title, "sequences", "tokens a second, all together", decoding))
    lines = [Series("prompt", prompts), Series("limit", prompt_limit, limit=True)]
    lines += [Series("decoding one sequence", by_context), Series("limit", context_limit, limit=True)]
    (args.out / "scaling-context.svg").write_text(plot(f"One sequence: {about}", "tokens of context", "tokens a second", lines))
    measured = {"batch": by_batch, "batch_limit": batch_limit, "context": by_context, "context_limit": context_limit}
    print(json.dumps({"about": about, "machine": [before, after], **measured, "prompt": prompts, "prompt_limit": prompt_limit}))


def decode_s(llm: LLM, lengths: list[int], new: int) -> tuple[float, float]:
    """Seconds of all prompts, computed from nothing, and then of decoding `new` - 1 tokens after each of them."""
    llm.reset_cache()
    prompts = [[random.randrange(256, llm.info.vocab_size) for _ in range(length)] for length in lengths]
    start = time.perf_counter()
    llm.generate(prompts, SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
    prompt_s = time.perf_counter() - start
    outputs = llm.generate(prompts, SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True))
    decode = max(output.raise_for_error().receipt.decode_s for output in outputs)
    print(f"  {len(lengths)} x {lengths[0]}: prompts {prompt_s:.2f} s, {len(lengths) * (new - 1) / decode:.1f} tokens/s decoded", flush=True)
    return prompt_s, decode


def limits(shape: Shape, quantization: str, batches: list[int], contexts: list[int], read: float, rate: float) -> tuple[Points, Points, Points]:
    """The most tokens a second: of decoding by batch size, of decoding by context, of prompts by length."""
    weights = weight_bytes(shape, quantization)
    batch = [(float(b), b / max(weights / read, b * flops(shape, 128, 129, 1) / rate)) for b in batches]
    context = [(float(c), read / (weights + shape.kv_bytes(c))) for c in contexts]
    return batch, context, [(float(c), c / max(weights / read, flops(shape, 0, c, 1) / rate)) for c in contexts]


if __name__ == "__main__":
    main()
