"""Quantised pages: what they cost in quality, what they take and what they give: KL divergence, perplexity, bytes a token, speed of decoding.

Texts go through the model teacher-forced, in chunks, over paged keys and values, exactly as in the engine; every position's whole distribution is
compared with that over plain pages. The demo checkpoint reads the held-out ends of the books it was made of, if they are given (`--text`), and
otherwise what it writes itself. The long case is a random model: its text means nothing, but its keys are many.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.qwen3 import Qwen3Config

import quire
from bench.attention import HKV, D, one_layer
from bench.machine import Bench
from quire import LLM, SamplingParams
from quire.policy.groups import arrange
from quire.tensors.attention.base import StepInputs, TableInputs
from quire.tensors.attention.native import NativeAttention
from quire.tensors.codec import row_format
from quire.tensors.models.load import load_model
from quire.tensors.models.model import CausalModel
from quire.tensors.native_products import NativeProducts
from quire.tensors.store import PageStore, StagedStep, cached_layers, layer_places

Codec = tuple[str | None, str | None]
CODECS: dict[str, Codec] = {"int8": ("int8", "int8"), "k=int8,v=int4": ("int8", "int4"), "int4": ("int4", "int4")}
PLAIN: Codec = (None, None)
CHUNK, B, HELD_OUT, TURNS = 256, 16, 0.025, 31


def bytes_per_token(model: CausalModel, codec: Codec) -> float:
    """Of all layers together."""
    return arrange(cached_layers(model.layers, model.dtype, *codec), B).bytes_per_token()


def distributions(model: CausalModel, ids: Sequence[int], codec: Codec, first: int) -> Iterator[torch.Tensor]:
    """Log-probabilities [n, V] of what follows each token from `first` on, a chunk at a time."""
    layers = cached_layers(model.layers, model.dtype, *codec)
    arrangement = arrange(layers, B)
    tables, num_pages = [], 0
    for group in arrangement.groups:
        count = -(-len(ids) // group.page_size)
        tables.append(torch.arange(num_pages, num_pages + count, dtype=torch.int32))
        num_pages += count
    attention = NativeAttention(torch.get_num_threads())
    store = PageStore(layer_places(arrangement, layers), num_pages, arrangement.page_bytes, attention)
    inputs = tuple(TableInputs(table, torch.tensor([0, len(table)], dtype=torch.int32)) for table in tables)
    for start in range(0, len(ids), CHUNK):
        positions = torch.arange(start, min(start + CHUNK, len(ids)))
        query_start, committed = (torch.tensor(x, dtype=torch.int32) for x in ([0, len(positions)], [start]))
        slots = [
            table[positions // group.page_size].long() * group.page_size + positions % group.page_size
            for table, group in zip(tables, arrangement.groups, strict=True)
        ]
        step = StagedStep(store, StepInputs(query_start, committed, inputs), slots)
        wanted = torch.arange(min(max(0, first - start), len(positions)), len(positions))
        logits = model.forward(step, torch.tensor(ids[start : start + CHUNK]), positions, wanted)
        step.commit()
        yield logits.float().log_softmax(-1)


def compare(model: CausalModel, texts: Sequence[Sequence[int]], first: int = 0) -> Bench:
    """KL(plain || codec) in nats a token, and perplexities, over every position from `first` on that has a next token."""
    kl, loss, count = dict.fromkeys(CODECS, 0.0), dict.fromkeys(["none", *CODECS], 0.0), 0
    for ids in texts:
        expected = torch.cat(list(distributions(model, ids, PLAIN, first)))[:-1]
        following = torch.tensor(ids[first + 1 :])[:, None]
        count += len(following)
        loss["none"] -= float(expected.gather(1, following).double().sum())
        for name, codec in CODECS.items():
            found = torch.cat(list(distributions(model, ids, codec, first)))[:-1]
            kl[name] += float((expected.double().exp() * (expected.double() - found.double())).sum())
            loss[name] -= float(found.gather(1, following).double().sum())
    plain_bytes = bytes_per_token(model, PLAIN)
    results: Bench = {"tokens": count, "perplexity": math.exp(loss["none"] / count), "bytes_per_token": plain_bytes}
    print(f"    none           perplexity {math.exp(loss['none'] / count):8.3f}, {plain_bytes:7.0f} bytes a token")
    for name, codec in CODECS.items():
        size = bytes_per_token(model, codec)
        row = {"kl_nats_per_token": kl[name] / count, "perplexity": math.exp(loss[name] / count), "bytes_per_token": size}
        results[name] = row
        print(
            f"    {name:<14} perplexity {row['perplexity']:8.3f}, {size:7.0f} bytes a token ({size / plain_bytes:.3f} of plain), "
            f"KL {row['kl_nats_per_token']:.2e} nats a token"
        )
    return results


def demo_texts(folder: str, paths: Sequence[str], length: int) -> list[list[int]]:
    """Windows of `length` tokens of the held-out end of each text, cut and cleaned as for the training, or of what the model itself writes."""
    spec = importlib.util.spec_from_file_location("train_demo", Path(__file__).parents[1] / "tools" / "train_demo.py")
    training = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(training)
    with LLM(folder) as llm:
        if not paths:
            outputs = llm.generate([""] * 6, [SamplingParams(max_tokens=length - 1, seed=i, ignore_eos=True) for i in range(6)])
            return [[llm.tokenizer.bos_token_id, *o.outputs[0].token_ids] for o in outputs]
        tails = [training.split_held_out(training.clean(Path(path).read_text(encoding="utf-8")), HELD_OUT)[1] for path in paths]
        coded = [llm.tokenizer.encode(tail) for tail in tails]
    return [ids[i : i + length] for ids in coded for i in range(0, len(ids) - length + 1, length)]


def long_model() -> PreTrainedModel:
    """Four layers of Qwen3-0.6B's attention with random weights, a small vocabulary, scaled so that its attention is not flat."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=8192, hidden_size=1024, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        tie_word_embeddings=True, max_position_embeddings=8192, rope_theta=1e6, initializer_range=0.06,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def quality(texts: Sequence[str]) -> Bench:
    """Measure and print."""
    products, folder = NativeProducts(torch.get_num_threads()), str(Path(quire.__file__).parent / "demo_model")
    results: Bench = {}
    windows = demo_texts(folder, texts, 1024)
    print("codecs: quality, teacher-forced")
    print(f"  demo checkpoint, heads of 32, {len(windows)} windows of 1024 tokens ({'held out' if texts else 'its own'})")
    model = load_model(folder, dtype="auto", trust_remote_code=False, revision=None, products=products)
    results["demo"] = compare(model, windows)
    model.close()
    print("  random model, heads of 128, the last 512 of 4096 tokens")
    model = load_model(long_model(), dtype="auto", trust_remote_code=False, revision=None, products=products)
    ids = torch.randint(1, 8192, (4096,), generator=torch.Generator().manual_seed(0)).tolist()
    results["long"] = compare(model, [ids], first=4096 - 512)
    model.close()
    return results


def speed(machine: Bench) -> Bench:
    """Measure and print. Formats take turns, so that what disturbs one disturbs all; medians of each and of its ratio to bf16 of the same turn."""
    threads, bandwidth = torch.get_num_threads(), float(machine["read_gb_s"])
    results: Bench = {}
    print(f"codecs: decode attention, 16 query and 8 KV heads of 128, bf16 queries, medians of {TURNS} turns (read bandwidth {bandwidth:.1f} GB/s)")
    for count, length in ((32, 1024), (1, 8192), (8, 4096), (32, 4096)):
        formats: dict[str, Codec] = {"bf16": PLAIN, **CODECS}
        calls = {name: one_layer([(length - 1, 1)] * count, torch.bfloat16, threads, codec) for name, codec in formats.items()}
        turns = [{name: timed(call) for name, call in calls.items()} for _ in range(TURNS + 1)][1:]
        print(f"  {count} x {length}")
        for name, codec in formats.items():
            size = count * length * HKV * sum(row_format(one, torch.bfloat16, D).num_bytes for one in codec)
            taken = statistics.median(turn[name] for turn in turns)
            ratios = sorted(turn["bf16"] / turn[name] for turn in turns)
            low, ratio, high = (ratios[int(share * (TURNS - 1))] for share in (0.1, 0.5, 0.9))
            results[f"{name}_{count}x{length}"] = {"ms": taken * 1e3, "gb_s": size / taken / 1e9, "times_bf16": ratio, "from": low, "to": high}
            print(
                f"    {name:<14} {taken * 1e3:7.3f} ms, {size / 1e6:5.0f} MB at {size / taken / 1e9:5.1f} GB/s, "
                f"{ratio:.2f} times bf16 (a tenth below {low:.2f}, a tenth above {high:.2f})"
            )
    return results


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
