"""`python -m bench.linear`: products with weights packed, quantised and as they lie, beside torch's, in GB/s of weights and GFLOP/s.

Weights are not in cache: each call takes the next of many copies. A product's limit is what reading its weights or computing it takes at the least,
whichever is more, at the read bandwidth of its own turns and the matrix rate of the run. Times are medians of turns in which all take part, one after
the other, so that a busy moment of a shared host hits them alike. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from bench import machine
from bench.machine import Bench
from bench.options import above_zero, whole
from quire.tensors.host import room
from quire.tensors.native_products import NativeProducts
from quire.tensors.packed import PackedLayout, PackedWeight

SHAPES = [(1024, 3072), (3072, 1024), (1024, 1024), (2048, 1024), (1024, 151_936)]
ROWS = [1, 2, 4, 8, 16, 32, 64, 512]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
COPIES_BYTES = 200_000_000
Call = Callable[[], object]


def turns(calls: dict[str, Call], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call, turn by turn; the first turn warms up and does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while len(times["read"]) < 6 or time.perf_counter() < end:
        for name, one in calls.items():
            start = time.perf_counter()
            one()
            times[name].append(time.perf_counter() - start)
    return {name: taken[1:] for name, taken in times.items()}


def call(linear: Callable[[torch.Tensor, Any], object], x: torch.Tensor, weights: Iterator[Any]) -> Call:
    """A product of `x` with the next of some weights."""
    return lambda: linear(x, next(weights))


def packed(products: NativeProducts, weight: torch.Tensor, quantization: str) -> Iterator[PackedWeight]:
    """Copies of a packed weight, round and round."""
    layout = PackedLayout(*weight.shape, weight.dtype, quantization)
    size = products.packed_bytes(layout)
    copies = room(max(2, -(-COPIES_BYTES // size)) * size).view(-1, size)  # the memory that a model's weights get
    return itertools.cycle([PackedWeight(copy, layout, products.rows, "", num_bytes=products.pack(weight, layout, copy)) for copy in copies])


def one_shape(products: NativeProducts, k: int, n: int, dtype: torch.dtype, rows: list[int], seconds: float, matrix_limit: float) -> Bench:
    """Every product at each number of rows, with a plain read of as many bytes as the weight has in the same turns."""
    weight, results = (torch.randn(n, k) * 0.02).to(dtype), Bench()
    size = k * n * dtype.itemsize
    plain = itertools.cycle(weight.expand(max(2, -(-COPIES_BYTES // size)), n, k).clone().unbind())
    forms = {name: packed(products, weight, quantization) for name, quantization in (("packed", "none"), ("int8", "int8"), ("int4", "int4"))}
    memory = itertools.cycle(room(max(2, COPIES_BYTES // size) * size).view(torch.float32).fill_(1.0).view(-1, size // 4).unbind())
    sizes = {"torch": size, "plain": size} | {name: next(form).num_bytes for name, form in forms.items()}
    for m in rows if n <= 10_000 else rows[:5]:
        x = torch.randn(m, k).to(dtype)
        calls: dict[str, Call] = {"read": lambda: next(memory).sum(), "torch": call(F.linear, x, plain), "plain": call(products.linear, x, plain)}
        calls |= {name: call(products.linear, x, form) for name, form in forms.items()}
        taken = turns(calls, seconds)
        read = size / median(taken.pop("read"))
        results[str(m)] = row = {"read_gb_s": read / 1e9}
        for name, times in taken.items():
            middle, flops = median(times), 2 * m * n * k
            share = max(sizes[name] / read, flops / matrix_limit / 1e9) / middle
            speedup = median(before / after for before, after in zip(taken["plain"], times, strict=True))
            row[name] = {"gb_s": sizes[name] / middle / 1e9, "gflop_s": flops / middle / 1e9, "share": share, "times_plain": speedup}
        told = " | ".join(f"{name} {row[name]['gb_s']:5.1f} GB/s {row[name]['share']:4.0%} x{row[name]['times_plain']:.2f}" for name in taken)
        print(f"  {k:>5} -> {n:<6} {m:>3} rows, read {read / 1e9:4.1f}: {told}")
    return results


def small_calls(products: NativeProducts, seconds: float) -> Bench:
    """Microseconds of a whole call where there is hardly anything to compute."""
    results: Bench = {}
    for m, k, n in ((1, 64, 96), (4, 64, 96), (1, 256, 256)):
        x, weight = torch.randn(m, k), torch.randn(n, k)
        same, form = itertools.repeat(weight), itertools.repeat(next(packed(products, weight, "none")))
        calls: dict[str, Call] = {"read": x.sum, "torch": call(F.linear, x, same)}
        calls |= {"plain": call(products.linear, x, same), "packed": call(products.linear, x, form)}
        with torch.inference_mode():
            taken = {name: median(times) * 1e6 for name, times in turns(calls, seconds).items()}
        results[f"{m}x{k}x{n}"] = taken
        print(f"  {k:>5} -> {n:<6} {m:>3} rows: " + " | ".join(f"{name} {taken[name]:5.1f} us" for name in ("torch", "plain", "packed")))
    return results


def run(of_machine: Bench, shapes: int = 2, rows: list[int] = ROWS, dtypes: tuple[str, ...] = ("bf16",), seconds: float = 1.0) -> Bench:
    """Measure and print. `shapes`: only the first of them."""
    products = NativeProducts(torch.get_num_threads())
    print("products: GB/s of weights, share of the limit, times as fast as with weights as they lie")
    results: Bench = {"small_calls_us": small_calls(products, seconds)}
    with torch.inference_mode():
        for name in dtypes:
            print(name)
            limit = of_machine["matrix_limit_gflop_s"]
            results[name] = {f"{k}x{n}": one_shape(products, k, n, DTYPES[name], rows, seconds, limit) for k, n in SHAPES[:shapes]}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.linear", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=whole, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=above_zero, default=1.0, help="for each line of the table")
    parser.add_argument("--rows", type=whole, nargs="+", default=ROWS)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--shapes", type=whole, default=len(SHAPES), help="only the first of them")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    of_machine = machine.run()
    results = run(of_machine, args.shapes, args.rows, tuple(args.dtypes), args.seconds)
    print(json.dumps({"date": time.strftime("%Y-%m-%d"), "machine": of_machine, "linear": results}))


if __name__ == "__main__":
    main()
