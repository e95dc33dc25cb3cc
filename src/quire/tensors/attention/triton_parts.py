"""Blocks of query tokens and parts of keys, as the Triton attention cuts them: which there are, what a row has of each, how that is folded.

The kernels of triton.py say when; what is here is one arithmetic for both of its ways, so that a row's bits do not tell which one it went.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from quire.tensors.attention.base import Mask

PART: Final = 512  # keys, a multiple of a tile's
LINES: Final = 8  # tokens whose parts one program folds: mostly there is one


def num_blocks(num_tokens: int, num_sequences: int, block: int) -> int:
    """Programs enough for sequences of any lengths that add up to `num_tokens`, `block` tokens a program. Sequence s has those from
    query_start[s] // block + s on, one more than its whole blocks, so that it can be told from a program's number alone; some have nothing to do.
    """
    return num_tokens // block + num_sequences


def most_parts(num_keys: int, mask: Mask, block: int) -> int:
    """That `block` tokens of a sequence of at most `num_keys` may see something of."""
    seen = min([num_keys, *(reach + block for reach in (mask.window, mask.chunk) if reach)])
    return min(-(-num_keys // PART), -(-seen // PART) + 1)


# What follows is compiled by Triton, with the kernels that call it.


@triton.jit  # type: ignore[untyped-decorator]
def find_block(query_start, num_sequences, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sequence of this program's block, where its tokens start in the step, which of them is the block's first, and how many there are."""
    block = tl.program_id(0)
    sequence, beyond = block * 0, num_sequences
    while beyond - sequence > 1:  # the last sequence whose programs do not begin behind this one
        middle = (sequence + beyond) // 2
        is_behind = tl.load(query_start + middle) // TOKENS + middle > block
        sequence, beyond = tl.where(is_behind, sequence, middle), tl.where(is_behind, middle, beyond)
    start = tl.load(query_start + sequence)
    return sequence, start, (block - start // TOKENS - sequence) * TOKENS, tl.load(query_start + sequence + 1) - start


@triton.jit  # type: ignore[untyped-decorator]
def reach(committed, first, count, TOKENS: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The lowest position that a row of the block sees, and the highest."""
    return first_visible(committed + first, WINDOW, CHUNK), committed + tl.minimum(first + TOKENS, count) - 1


@triton.jit  # type: ignore[untyped-decorator]
def nothing_met(sinks, head, real, ROWS: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Maximum, total and sum of rows that have met no key, but a sink: that is a key without a value."""
    if sinks is not None:
        top = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * 1.4426950408889634
        total = tl.full([ROWS], 1.0, tl.float32)
    else:
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
    return top, total, tl.zeros([ROWS, LANES], tl.float32)


@triton.jit
def fold(top, total, acc, part_top, part_total, part_sum):  # type: ignore[no-untyped-def]
    """What rows have after one part more. One of which they saw nothing has a maximum of -inf and a total and sum of 0."""
    new_top = tl.maximum(top, part_top)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    old = tl.where(new_top == top, 1.0, tl.exp2(top - base))
    new = tl.where(new_top == part_top, 1.0, tl.exp2(part_top - base))
    return new_top, total * old + part_total * new, acc * old[:, None] + part_sum * new[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def store(first, real, lane, DIM: tl.constexpr, total, acc):  # type: ignore[no-untyped-def]
    """Results of rows that begin at the pointers `first`, where `real` is set."""
    result = acc / tl.where(real, total, 1.0)[:, None] + 0.0  # never -0
    tl.store(first[:, None] + lane[None, :], result.to(first.dtype.element_ty), mask=real[:, None] & (lane < DIM)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def first_visible(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first position a query at `position`, of any shape, may see."""
    lowest = position * 0
    if WINDOW:
        lowest = tl.maximum(lowest, position - (WINDOW - 1))
    if CHUNK:
        lowest = tl.maximum(lowest, position - position % CHUNK)
    return lowest


@triton.jit(do_not_specialize=["num_sequences", "num_parts"])  # type: ignore[untyped-decorator]
def fold_parts(  # type: ignore[no-untyped-def]
    out, query_start, num_committed, sinks, sums, tops, totals, num_sequences, num_parts, out_token, out_head,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr, LINES: tl.constexpr, DV: tl.constexpr, LANES_V: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """LINES of a block's tokens and one query head: what a kernel left of their parts becomes the result."""
    sequence, start, first, count = find_block(query_start, num_sequences, TOKENS)
    if first + tl.program_id(2) * LINES >= count:
        return
    lowest, last = reach(tl.load(num_committed + sequence), first, count, TOKENS, WINDOW, CHUNK)
    line, head, lane = tl.program_id(2) * LINES + tl.arange(0, LINES), tl.program_id(1), tl.arange(0, LANES_V)
    real = (line < TOKENS) & (first + line < count)
    at = (start + first + line).to(tl.int64)
    top, total, acc = nothing_met(sinks, head + line * 0, real, LINES, LANES_V)
    for part in tl.range(0, last // PART + 1 - lowest // PART, num_stages=4):
        where = (at * tl.num_programs(1) + head) * num_parts + part
        part_top, part_total = tl.load(tops + where, mask=real, other=float("-inf")), tl.load(totals + where, mask=real, other=0.0)
        part_sum = tl.load(sums + where[:, None] * DV + lane[None, :], mask=real[:, None] & (lane < DV)[None, :], other=0.0)
        top, total, acc = fold(top, total, acc, part_top, part_total, part_sum)
    store(out + at * out_token + head * out_head, real, lane, DV, total, acc)
