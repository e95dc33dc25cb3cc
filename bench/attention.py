"""Decode attention against memory bandwidth, prefill attention against the matrix rate: one layer of 16 query and 8 KV heads of 128."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.machine import Bench, best
from quire.tensors.attention.base import LayerPlace, Mask, StepInputs, TableInputs
from quire.tensors.attention.native import NativeAttention
from quire.tensors.codec import row_format

HQ, HKV, D, B = 16, 8, 128, 16
MASK = Mask(scale=D**-0.5)


def seconds(sequences: list[tuple[int, int]], dtype: torch.dtype, threads: int) -> float:
    """Best time of a call of `one_layer`."""
    return best(one_layer(sequences, dtype, threads))


def one_layer(
    sequences: list[tuple[int, int]], dtype: torch.dtype, threads: int, codec: tuple[str | None, str | None] = (None, None)
) -> Callable[[], torch.Tensor]:
    """One layer's attention for (committed, new) tokens of each sequence, on shuffled pages, with the codecs of keys and of values."""
    counts = [-(-(committed + new) // B) for committed, new in sequences]
    attention, formats = NativeAttention(threads), [row_format(name, dtype, D) for name in codec]
    k_bytes, v_bytes = (HKV * B * row.num_bytes for row in formats)
    place = LayerPlace(layer_idx=0, group=0, page_size=B, num_kv_heads=HKV, k=formats[0], v=formats[1], k_offset=0, v_offset=k_bytes)
    pages = torch.empty(sum(counts), k_bytes + v_bytes, dtype=torch.uint8)
    for half, row in zip(pages.split([k_bytes, v_bytes], dim=1), formats, strict=True):
        for part in half.split(256):
            rows = attention.encode(torch.randn(len(part), HKV * B, D).to(dtype), row)
            part.copy_(rows.view(torch.uint8).flatten(1))
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    query_start = torch.tensor([0, *(new for _, new in sequences)]).cumsum(0).to(torch.int32)
    committed = torch.tensor([c for c, _ in sequences], dtype=torch.int32)
    step = StepInputs(query_start, committed, (TableInputs(order, starts),))
    total = int(query_start[-1])
    q, k, v = (torch.randn(total, heads, D).to(dtype) for heads in (HQ, HKV, HKV))
    k, v = attention.encode(k, formats[0]), attention.encode(v, formats[1])
    return lambda: attention.attend(q, k, v, pages, place, step, MASK)


def run(machine: Bench) -> Bench:
    """Measure and print."""
    threads, bandwidth, limit = torch.get_num_threads(), float(machine["read_gb_s"]), float(machine["matrix_limit_gflop_s"])
    results: Bench = {}
    print("attention alone, 16 query and 8 KV heads of 128, bf16, pages of 16")
    for count, length in ((32, 1024), (1, 8192), (8, 4096)):
        taken = seconds([(length - 1, 1)] * count, torch.bfloat16, threads)
        rate = count * length * HKV * D * 2 * 2 / taken / 1e9
        results[f"decode_{count}x{length}"] = {"gb_s": rate, "share_of_bandwidth": rate / bandwidth}
        print(f"  decode {count:>2} x {length}: {rate:5.1f} GB/s of K/V, {rate / bandwidth:4.0%} of read bandwidth")
    for committed, new in ((0, 512), (0, 2048), (7680, 512)):
        taken = seconds([(committed, new)], torch.bfloat16, threads)
        pairs = sum(range(committed + 1, committed + new + 1))
        rate = pairs * HQ * D * 4 / taken / 1e9
        results[f"prefill_{committed}+{new}"] = {"gflop_s": rate, "share_of_matrix_rate": rate / limit}
        print(f"  prefill {new} tokens after {committed}: {rate:5.0f} GFLOP/s, {rate / limit:4.0%} of the matrix rate")
    return results
