"""The cache: forks, the disk tier, the two layouts and the deferred write, on a random checkpoint of Qwen3-0.6B's shape."""

from __future__ import annotations

import random
import tempfile
import threading
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from bench.attention import HKV, HQ, MASK, B, D
from bench.live import Jobs, prompt, random_model, with_quire
from bench.machine import Bench, best
from quire import LLM, SamplingParams
from quire.tensors.attention.base import LayerPlace, StepInputs, TableInputs
from quire.tensors.attention.native import NativeAttention
from quire.tensors.codec import row_format


def run(layers: int, cached_prompt: int = 4096) -> Bench:
    """Prints each comparison and returns its figures."""
    model, rng = random_model(layers, torch.bfloat16), random.Random(1)
    print(f"cache: Qwen3-0.6B's shape with {layers} layers, bf16, random weights")
    results: Bench = {"layers": layers, "forks": forks(model, rng), "layouts": layouts(model, rng), "deferral": deferral()}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "model")
        del model
        results["disk"] = disk(str(Path(folder) / "model"), str(Path(folder) / "store"), prompt(rng, cached_prompt))
    return results


def forks(model: PreTrainedModel, rng: random.Random) -> Bench:
    """Eight samples of 64 after a prompt of 512: one request of n=8, against eight requests that share nothing."""
    ids = prompt(rng, 512)
    figures: Bench = {}
    for name, sharing in (("n=8", True), ("apart", False)):
        with LLM(model, prefix_sharing=sharing, cache_bytes=2**30) as llm:
            params = SamplingParams(max_tokens=64, seed=1, ignore_eos=True, n=8 if sharing else 1)
            most, done = 0, threading.Event()

            def watch(llm: LLM = llm, done: threading.Event = done) -> None:
                nonlocal most
                while not done.wait(0.02):
                    most = max(most, llm.stats()["num_held_pages"])

            watcher, start = threading.Thread(target=watch), time.perf_counter()
            watcher.start()
            llm.generate([ids] if sharing else [ids] * 8, params)
            taken = time.perf_counter() - start
            done.set()
            watcher.join()
            figures[name] = {"seconds": taken, "most_pages": most, "computed_tokens": llm.stats()["num_computed_tokens"]}
            print(f"  {name:<6} {taken:6.2f} s, {most} pages at most, {llm.stats()['num_computed_tokens']} tokens computed")
    return figures


def layouts(model: PreTrainedModel, rng: random.Random) -> Bench:
    """The same ragged requests on pages of 16 and on one slot of 2,048 tokens a sequence."""
    jobs: Jobs = [(prompt(rng, rng.choice([32, 128, 512])), 48) for _ in range(16)]
    figures: Bench = {}
    for layout in ("paged", "stacked"):
        result, _ = with_quire(model, jobs, cache_layout=layout, max_sequences=16, max_model_len=2048, prefix_sharing=False)
        figures[layout] = {"seconds": result.seconds, "extra_mb": result.extra_mb}
        print(f"  {layout:<8} {result.seconds:6.2f} s for 16 requests of 48 tokens, {result.extra_mb:+.0f} MB at peak")
    return figures


def deferral() -> Bench:
    """One decode step of 32 sequences of 512 tokens over 28 layers: rows written layer by layer, or all at the step's end as Quire does."""
    count, length, num_layers, row = 32, 512, 28, row_format(None, torch.bfloat16, D)
    attention, block = NativeAttention(torch.get_num_threads()), HKV * B * row.num_bytes
    places = [LayerPlace(i, 0, B, HKV, row, row, 2 * i * block, (2 * i + 1) * block) for i in range(num_layers)]
    per_sequence = length // B
    pages = torch.zeros(count * per_sequence, 2 * num_layers * block, dtype=torch.uint8)
    ids = torch.randperm(len(pages), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    starts = torch.arange(0, len(ids) + 1, per_sequence, dtype=torch.int32)
    step = StepInputs(torch.arange(count + 1, dtype=torch.int32), torch.full((count,), length - 1, dtype=torch.int32), (TableInputs(ids, starts),))
    slots = ids[starts[1:].long() - 1].long() * B + B - 1
    q, k, v = (torch.randn(count, heads, D).to(torch.bfloat16) for heads in (HQ, HKV, HKV))
    k, v = attention.encode(k, row), attention.encode(v, row)

    def run(deferred: bool) -> None:
        for place in places:
            attention.attend(q, k, v, pages, place, step, MASK)
            if not deferred:
                attention.commit(k, v, pages, place, slots)
        for place in places if deferred else ():
            attention.commit(k, v, pages, place, slots)

    taken = {name: best(lambda deferred=deferred: run(deferred), 4.0) for name, deferred in (("layer by layer", False), ("deferred", True))}
    print(f"  a decode step's attention and writes: {', '.join(f'{name} {seconds * 1e3:.2f} ms' for name, seconds in taken.items())}")
    return dict(taken)


def disk(model: str, store: str, ids: list[int]) -> Bench:
    """Time to the first token of a prompt: computed, and read from the disk by a new engine."""
    figures: Bench = {}
    params = SamplingParams(max_tokens=1, temperature=0.0)
    for name in ("cold", "restored"):
        with LLM(model, dtype="bfloat16", cache_dir=store, cache_bytes=2 * 2**30) as llm:
            start = time.perf_counter()
            (output,) = llm.generate(ids, params)
            taken = time.perf_counter() - start
            figures[name] = {"first_token_s": taken, "cached_tokens": output.receipt.cached_tokens}
            print(f"  {name:<9} first token of {len(ids)} after {taken:6.2f} s, {output.receipt.cached_tokens} tokens cached")
    cold, restored = (figures[name]["first_token_s"] for name in ("cold", "restored"))
    print(f"  the disk is {cold / restored:.1f} times as fast as computing")
    return figures
