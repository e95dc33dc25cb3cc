"""What this machine can do now: memory read bandwidth and matrix rates. Taken in the same run as everything it is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from quire.tensors.host import room
from quire.tensors.native_products import NativeProducts
from quire.tensors.packed import PackedLayout

Bench = dict[str, Any]


def best(function: Callable[[], object], seconds: float = 1.0, least: int = 3) -> float:
    """Seconds of the fastest of repeated calls; hosts are shared, and the fastest is the one nobody disturbed."""
    function()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def processor() -> str:
    """The CPU's name as the system tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


class Reading:
    """Reads a packed weight of half a billion bf16 by all threads, in huge pages where the system has them, as packed weights are."""

    def __init__(self) -> None:
        self._products, self._layout = NativeProducts(torch.get_num_threads()), PackedLayout(2**19, 1024, torch.bfloat16)
        self._data, self._x = room(self._products.packed_bytes(self._layout)), torch.zeros(1, 1024, dtype=torch.bfloat16)
        self._size = self._products.pack(torch.ones(1, 1024, dtype=torch.bfloat16).expand(2**19, 1024), self._layout, self._data)
        self._numbers = self._data[: self._size].view(torch.float32)

    def bandwidth(self) -> float:
        """GB/s of the fastest of many reads, by a plain sum or by one row times it as a packed bf16 weight."""
        return max(self._size / best(lambda: self._numbers.sum()) / 1e9, *self.now(1.0))

    def now(self, seconds: float = 0.5) -> list[float]:
        """GB/s of each read by one row, one after the other: what memory gives while neighbours on the host read theirs."""
        found: list[float] = []
        end = time.perf_counter() + seconds
        while not found or time.perf_counter() < end:
            start = time.perf_counter()
            self._products.packed(self._x, self._data, self._layout)
            found.append(self._size / (time.perf_counter() - start) / 1e9)
        return found


def matrix_rates() -> dict[str, float]:
    """GFLOP/s of [512, 1024] x [1024, 3072], by who computes it. The best one is the machine's matrix rate for that type."""
    products, rates = NativeProducts(torch.get_num_threads()), {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        x, w = torch.randn(512, 1024).to(dtype), torch.randn(3072, 1024).to(dtype)
        flops = 2 * 512 * 1024 * 3072
        rates[f"{name}_torch"] = flops / best(lambda x=x, w=w: F.linear(x, w)) / 1e9
        rates[f"{name}_quire"] = flops / best(lambda x=x, w=w: products.linear(x, w)) / 1e9
    return rates


def run(reading: Reading | None = None) -> Bench:
    """Measure and print; with the `reading` of a caller that has one, as it takes 1 GiB."""
    bandwidth, rates = (reading or Reading()).bandwidth(), matrix_rates()
    # bf16 numbers widened to fp32 lose nothing, so where the CPU has no bf16 arithmetic its fp32 rate is the limit for bf16 as well.
    limit = max(rates.values())
    print(f"machine: {processor()}, {torch.get_num_threads()} threads, torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()})")
    print(f"  memory read {bandwidth:.1f} GB/s; GFLOP/s at 512 rows: " + ", ".join(f"{k} {v:.0f}" for k, v in rates.items()))
    return {"cpu": processor(), "threads": torch.get_num_threads(), "read_gb_s": bandwidth, "gflop_s": rates, "matrix_limit_gflop_s": limit}
