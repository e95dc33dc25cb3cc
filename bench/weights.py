"""Quantised weights: what they cost in quality and what they take: KL divergence, perplexity, bytes.

Texts, windows and the random model are those of codecs.py; every position's whole distribution is compared with that of the weights as they are.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import quire
from bench.codecs import PLAIN, demo_texts, distributions, long_model
from bench.machine import Bench
from quire.config import QUANTIZATIONS
from quire.tensors.models.load import load_model
from quire.tensors.native_products import NativeProducts


def compare(folder: str, texts: Sequence[Sequence[int]], first: int = 0) -> Bench:
    """KL(as they are || quantised) in nats a token, and perplexities, over every position from `first` on that has a next token."""
    products = NativeProducts(torch.get_num_threads())
    expected: list[torch.Tensor] = []
    following = [torch.tensor(ids[first + 1 :])[:, None] for ids in texts]
    count, results = sum(map(len, following)), Bench()
    for quantization in QUANTIZATIONS:
        model = load_model(folder, dtype="auto", trust_remote_code=False, revision=None, products=products, quantization=quantization)
        found = [torch.cat(list(distributions(model, ids, PLAIN, first)))[:-1] for ids in texts]
        expected = expected or found
        divergence = sum(float((a.double().exp() * (a.double() - b.double())).sum()) for a, b in zip(expected, found, strict=True))
        loss = -sum(float(scores.gather(1, ids).double().sum()) for scores, ids in zip(found, following, strict=True))
        row = {"kl_nats_per_token": divergence / count, "perplexity": math.exp(loss / count), "weight_bytes": model.weight_bytes}
        model.close()
        results[quantization] = row
        print(
            f"    {quantization:<5} perplexity {row['perplexity']:9.3f}, KL {row['kl_nats_per_token']:.2e} nats a token, "
            f"{row['weight_bytes'] / 1e6:.2f} MB ({row['weight_bytes'] / results['none']['weight_bytes']:.3f})"
        )
    return results


def run(texts: Sequence[str]) -> Bench:
    """Measure and print."""
    folder = str(Path(quire.__file__).parent / "demo_model")
    windows = demo_texts(folder, texts, 1024)
    print("quantised weights: quality, teacher-forced")
    print(f"  demo checkpoint, {len(windows)} windows of 1024 tokens ({'held out' if texts else 'its own'})")
    results: Bench = {"demo": compare(folder, windows)}
    print("  random model, the last 256 of 1024 tokens")
    ids = torch.randint(1, 8192, (1024,), generator=torch.Generator().manual_seed(0)).tolist()
    with tempfile.TemporaryDirectory() as random:
        long_model().save_pretrained(random)
        results["random"] = compare(random, [ids], first=1024 - 256)
    return results
