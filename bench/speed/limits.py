"""How fast a workload can be at best on a machine: a lower bound of its seconds, from two rates measured in the same run.

    A   arithmetic: 2 x weights of the layers for each token computed, 2 x weights of the head for each row of logits that is needed, and
        4 x heads x head_dim x visible keys for each query in each layer (a product for the score and one for the value, two operations a number),
        or what a layer that does not attend does for a token
    W   bytes of all weights as stored, two of bf16 however an engine keeps it, the head once, the embedding (a row a token) and norms not
    a(X) = A of X / matrix rate          r = W / read bandwidth: seconds to read all weights once

    stream    W1          new x r                                  one token a step, and a step reads all weights. The prompt's arithmetic is left out
    samples   W5          a(prompt) + sum over steps of max(r, a(n rows))           the prompt, then new - 1 steps one after the other
    first     W4          max(r, a(prompt))                        compared with the time to the first token
    batch     W2 W3 W6    max(a(all), steps x r)                   steps >= the longest output, and >= all tokens out / max_concurrent

Every needed token is computed once: shared prefixes and forked prompts once, and the last token of a sequence never, as nothing follows it. A row of
logits is needed behind each prompt (once for n samples) and each token computed after it. For "batch" all arithmetic may hide all reading and the
other way round, which no schedule reaches quite; reading keys and values, norms, softmax, sampling and text are free. So a share of the limit is
never flattered by what is left out. It holds for exact decoding that draws one token a sequence and step, without speculation.

The matrix rate is the best kernel's, whatever float it multiplies: stored weights, quantised or not, become bf16 or fp32 numbers first.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.speed.shapes import STORED_BYTES, Shape
from bench.speed.workloads import Workload


@dataclass(frozen=True)
class Limit:
    """`seconds` at least, set by "memory" or "arithmetic"; `flops` and `tokens` that must be computed, `read_bytes` of weights."""

    seconds: float
    bound: str
    flops: float
    read_bytes: float
    tokens: int


def weight_bytes(shape: Shape, quantization: str = "none") -> float:
    """Bytes that a step reads: matrices of the layers and the head."""
    return STORED_BYTES[quantization] * (shape.layer_weights + shape.head_weights)


def flops(shape: Shape, start: int, stop: int, rows: int) -> float:
    """Arithmetic of the tokens at positions start..stop-1 of one sequence, with `rows` rows of logits."""
    full, windowed = shape.num_full_layers, shape.num_attention_layers - shape.num_full_layers
    keys = full * _visible(start, stop) + windowed * _visible(start, stop, shape.window)
    token = 2 * shape.layer_weights + shape.mixer_flops
    return token * (stop - start) + 2 * shape.head_weights * rows + 4 * shape.heads * shape.head_dim * keys


def limit(workload: Workload, read_bytes_s: float, flop_s: float, quantization: str = "none") -> Limit:
    """The least seconds for `workload` where memory gives `read_bytes_s` and the best kernel `flop_s` operations a second."""
    shape, read = workload.shape, weight_bytes(workload.shape, quantization)
    first = workload.jobs[0]
    prompt, steps = len(first.prompt), first.new - 1
    read_s = read / read_bytes_s
    if workload.kind == "stream":
        return Limit(first.new * read_s, "memory", _all_flops(workload), first.new * read, prompt + steps)
    prefill = flops(shape, 0, prompt, 1)
    if workload.kind == "first":
        seconds = max(read_s, prefill / flop_s)
        return Limit(seconds, "memory" if seconds == read_s else "arithmetic", prefill, read, prompt)
    if workload.kind == "samples":
        costs = [workload.n * flops(shape, at, at + 1, 1) / flop_s for at in range(prompt, prompt + steps)]
        bound = "memory" if sum(cost < read_s for cost in costs) * 2 >= len(costs) else "arithmetic"
        seconds = prefill / flop_s + sum(max(read_s, cost) for cost in costs)
        return Limit(seconds, bound, _all_flops(workload), (1 + steps) * read, prompt + workload.n * steps)
    num_steps = max(max(job.new for job in workload.jobs), -(-workload.tokens_out // workload.max_concurrent))
    total = _all_flops(workload)
    seconds = max(total / flop_s, num_steps * read_s)
    return Limit(seconds, "arithmetic" if seconds == total / flop_s else "memory", total, num_steps * read, least_tokens(workload))


def least_tokens(workload: Workload) -> int:
    """Tokens that must go through the model."""
    return workload.shared + sum(len(job.prompt) - workload.shared + workload.n * (job.new - 1) for job in workload.jobs)


def _all_flops(workload: Workload) -> float:
    shape, total = workload.shape, flops(workload.shape, 0, workload.shared, 0)
    for job in workload.jobs:
        end = len(job.prompt)
        total += flops(shape, workload.shared, end, 1) + workload.n * flops(shape, end, end + job.new - 1, job.new - 1)
    return total


def _visible(start: int, stop: int, window: int = 0) -> int:
    """Keys seen by the queries at start..stop-1, their own among them, all or the last `window`."""

    def upto(end: int) -> int:
        short = min(end, window) if window else end
        return short * (short + 1) // 2 + (end - short) * window

    return upto(stop) - upto(start)
