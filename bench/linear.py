"""`python -m bench.linear`: matrix products beside torch's, as weights read a second and as GFLOP/s, with the read bandwidth of the same run.

Weights are not in cache: each call takes the next of many copies. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from bench.machine import Bench, processor
from quire.tensors.native_products import NativeProducts

SHAPES = [(1024, 3072), (3072, 1024), (1024, 1024), (2048, 1024), (1024, 151_936)]
ROWS = [1, 4, 8, 16, 32, 128, 512]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def best_of(functions: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Seconds of the fastest call of each, taking turns, so that a busy moment of a shared host hits them alike."""
    times: dict[str, float] = {}
    end = time.perf_counter() + seconds
    turns = 0
    while turns < 4 or time.perf_counter() < end:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            taken = time.perf_counter() - start
            if turns:
                times[name] = min(times.get(name, taken), taken)
        turns += 1
    return times


def weights(k: int, n: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Copies of a weight [N, K], over 200 MB of them, round and round."""
    copies = max(2, -(-200_000_000 // (k * n * dtype.itemsize)))
    return itertools.cycle((torch.randn(copies, n, k, dtype=dtype) * 0.02).unbind())


def reads(size: int) -> Iterator[torch.Tensor]:
    """As many bytes as a weight has, to be summed up: what reading costs at the least."""
    numbers = size // 4
    return itertools.cycle(torch.ones(max(2, -(-50_000_000 // numbers)), numbers).unbind())


def race(
    products: NativeProducts, x: torch.Tensor, following: Iterator[torch.Tensor], plain: Iterator[torch.Tensor]
) -> dict[str, Callable[[], object]]:
    """A plain read, Quire and torch, each on the next memory."""
    return {
        "read": lambda: next(plain).sum(),
        "quire": lambda: products.linear(x, next(following)),
        "torch": lambda: F.linear(x, next(following)),
    }


def one_shape(products: NativeProducts, k: int, n: int, dtype: torch.dtype, rows: list[int], seconds: float) -> Bench:
    """Both products at each number of rows, and a plain read of the weights in the same turns."""
    size, results = k * n * dtype.itemsize, Bench()
    following, plain = weights(k, n, dtype), reads(size)
    for m in rows if n <= 10_000 else rows[:5]:
        taken = best_of(race(products, torch.randn(m, k).to(dtype), following, plain), seconds)
        gb_s = {name: size / t / 1e9 for name, t in taken.items()}
        gflop_s = {name: 2 * m * n * k / taken[name] / 1e9 for name in ("quire", "torch")}
        results[str(m)] = {"gb_s": gb_s, "gflop_s": gflop_s}
        ours, theirs, speedup = gb_s["quire"], gb_s["torch"], taken["torch"] / taken["quire"]
        print(
            f"  {k:>5} -> {n:<6} {m:>4} rows: {ours:6.1f} GB/s {gflop_s['quire']:5.0f} GFLOP/s, {ours / gb_s['read']:4.0%} of {gb_s['read']:4.1f}"
            f" | torch {theirs:5.1f} GB/s {gflop_s['torch']:5.0f} GFLOP/s | x{speedup:.2f}"
        )
    return results


def small_calls(products: NativeProducts, seconds: float) -> Bench:
    """Microseconds of a whole call where there is hardly anything to compute."""
    results: Bench = {}
    for m, k, n in ((1, 64, 96), (4, 64, 96), (1, 256, 256)):
        x, weight = torch.randn(m, k), torch.randn(n, k)
        with torch.inference_mode():
            taken = best_of(race(products, x, itertools.repeat(weight), itertools.repeat(x)), seconds)
        results[f"{m}x{k}x{n}"] = {name: t * 1e6 for name, t in taken.items()}
        print(f"  {k:>5} -> {n:<6} {m:>4} rows: {taken['quire'] * 1e6:5.1f} us a call | torch {taken['torch'] * 1e6:5.1f} us")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="for each line of the table")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first of them")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    products = NativeProducts(args.threads)
    print(f"{processor()}, {args.threads} threads, torch {torch.__version__}")
    results: Bench = {"date": time.strftime("%Y-%m-%d"), "cpu": processor(), "threads": args.threads}
    results["small_calls_us"] = small_calls(products, args.seconds)
    with torch.inference_mode():
        for name in args.dtypes:
            print(name)
            results[name] = {f"{k}x{n}": one_shape(products, k, n, DTYPES[name], args.rows, args.seconds) for k, n in SHAPES[: args.shapes]}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
