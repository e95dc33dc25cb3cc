"""A plan as the native program that carries it out: where each value lies, and what runs between two products in one go over each token's row.

A value is kept as rows of its dtype where a product, attention, the caller or a later stretch of operators reads it; all others live in a thread's
scratch, as fp32, for the time of one token.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any

import torch

from quire.tensors.models.recording import UnlowerableError
from quire.tensors.models.rowplan import Multiply, Operand, Plan, RowOp
from quire.tensors.native import DTYPE_CODES, lib

# csrc/rows_args.h: RowOp, by number.
_OPS = (
    "load", "store", "copy", "add", "sub", "mul", "div", "add_scalar", "mul_scalar", "div_scalar",
    "rsqrt", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh", "relu", "exp", "softplus", "mean", "layer_norm",
)  # fmt: skip
_CODES = {name: code for code, name in enumerate(_OPS)}
_INSTRUCTION, _BUFFER, _STEP = struct.Struct("=6if16i"), struct.Struct("=3q"), struct.Struct("=13q")
_LINE = 64  # bytes

Stretch = list[RowOp]


@dataclass(frozen=True, slots=True)
class Program:
    """`native`: quire._native.Program. `ends`: the step behind each part of the plan. `given`: the values whose addresses a run takes, in order."""

    native: Any
    ends: tuple[int, ...]
    given: tuple[int, ...]


def assemble(plan: Plan) -> Program:
    """The program of a plan."""
    mixed = [value for mix in plan.mixes for value in (*mix.values, mix.out)]
    given = [value for value, _ in (*plan.weights, *plan.inputs)] + mixed + [value for value, _ in plan.outputs]
    read = Counter(value for part in plan.parts for step in part for value in step.reads) + Counter(given)
    parts = [_stretches(_scheduled(_without_copies(part, read))) for part in plan.parts]
    steps = [step for part in parts for step in part]
    if len(set(given)) != len(given):
        raise UnlowerableError("two of its results are one tensor")
    if any(count > 1 for count in Counter(value for step in steps for value in _written(step)).values()):
        raise UnlowerableError("a product comes between two parts of a tensor")
    weights = {value for value, _ in plan.weights}
    kept = {value for step in steps for value in _outside(step)} - set(given)
    row_bytes = [size * dtype.itemsize for size, dtype in zip(plan.sizes, plan.dtypes, strict=True)]
    places, arena_bytes = _placed([(_outside(step) | _written(step)) & kept for step in steps], row_bytes, _LINE)
    numbers = {value: number for number, value in enumerate([*given, *places])}
    # Bytes of a packed weight have no dtype, 0: its product names their form.
    buffers = b"".join(_BUFFER.pack(0 if v in weights else row_bytes[v], DTYPE_CODES.get(plan.dtypes[v], 0), places.get(v, -1)) for v in numbers)
    instructions: list[bytes] = []
    packed, scratch_floats = [], 16
    for step in steps:
        if isinstance(step, Multiply):
            bias = -1 if step.bias is None else numbers[step.bias]
            packed.append(
                _STEP.pack(
                    1 + step.weight_format, 0, 0, numbers[step.x], step.x_at, numbers[step.weight], bias, numbers[step.out],
                    step.rows, step.n, step.k, step.x_stride, step.weight_stride,
                )
            )  # fmt: skip
            continue
        made, floats = _instructions(step, plan, numbers)
        packed.append(_STEP.pack(0, len(instructions), len(made), *(0,) * 10))
        instructions += made
        scratch_floats = max(scratch_floats, floats)
    native = lib.Program(b"".join(instructions), buffers, b"".join(packed), scratch_floats, arena_bytes)
    return Program(native, tuple(accumulate(map(len, parts))), tuple(given))


def _without_copies(steps: Sequence[RowOp | Multiply], read: Counter[int]) -> list[RowOp | Multiply]:
    """The steps, where an operator whose result is only copied, rounded or not, writes the copy itself: the same numbers with one pass less."""
    kept: list[RowOp | Multiply] = []
    made: dict[int, int] = {}  # value -> place of the operator that makes it, all of it and nothing else
    for step in steps:
        if isinstance(step, RowOp) and step.op == "copy":
            at = made.get(step.operands[0].value)
            maker = kept[at] if at is not None and read[step.operands[0].value] == 1 else None
            joined = _joined(maker, step) if isinstance(maker, RowOp) else None
            if at is not None and joined is not None:
                kept[at] = joined
                continue
        if isinstance(step, RowOp):
            made[step.out.value] = len(kept)
        kept.append(step)
    return kept


def _joined(maker: RowOp, copy: RowOp) -> RowOp | None:
    """An operator that writes where its result is copied to; None where that is not the same."""
    (source,) = copy.operands
    flat = (0, 0, 1)
    if maker.op == "mean" or (maker.dtype != copy.dtype and torch.float32 not in (maker.dtype, copy.dtype)):
        return None
    dtype = copy.dtype if maker.dtype == torch.float32 else maker.dtype
    if (maker.shape, maker.out) == (copy.shape, source):
        return replace(maker, out=copy.out, dtype=dtype)
    if copy.shape[:2] == (1, 1) and (source.at, source.step, copy.out.step) == (0, flat, flat) and prod(maker.shape) == copy.shape[2]:
        return replace(maker, out=replace(maker.out, value=copy.out.value, at=copy.out.at), dtype=dtype)  # all of it, in order
    return None


def _scheduled(steps: Sequence[RowOp | Multiply]) -> list[RowOp | Multiply]:
    """The steps in an order in which products come as soon as they can, so that few stretches of operators lie between them."""
    unwritten = Counter(step.out if isinstance(step, Multiply) else step.out.value for step in steps)
    pending, ordered = list(steps), []
    while pending:
        ready = (i for i, step in enumerate(pending) if isinstance(step, Multiply) and not unwritten[step.x])
        step = pending.pop(next(ready, 0))
        unwritten[step.out if isinstance(step, Multiply) else step.out.value] -= 1
        ordered.append(step)
    return ordered


def _stretches(steps: Iterable[RowOp | Multiply]) -> list[Stretch | Multiply]:
    found: list[Stretch | Multiply] = []
    for step in steps:
        if isinstance(step, Multiply):
            found.append(step)
        elif found and isinstance(found[-1], list):
            found[-1].append(step)
        else:
            found.append([step])
    return found


def _written(step: Stretch | Multiply) -> set[int]:
    return {step.out} if isinstance(step, Multiply) else {work.out.value for work in step}


def _outside(step: Stretch | Multiply) -> set[int]:
    """The values that a step needs to have been kept, and those that only it can keep."""
    if isinstance(step, Multiply):
        return {step.x, step.out}
    return {value for work in step for value in work.reads} - _written(step)


def _instructions(stretch: Stretch, plan: Plan, numbers: dict[int, int]) -> tuple[list[bytes], int]:
    """A stretch as packed instructions, and how many floats of scratch it takes."""
    last_write = {work.out.value: i for i, work in enumerate(stretch)}
    order: list[RowOp | tuple[str, int]] = []
    loaded: set[int] = set()
    for i, work in enumerate(stretch):
        for value in work.reads:
            if value not in last_write and value not in loaded:
                loaded.add(value)
                order.append(("load", value))
        order.append(work)
        if last_write[work.out.value] == i and work.out.value in numbers:
            order.append(("store", work.out.value))
    used = [{step[1]} if isinstance(step, tuple) else {step.out.value, *step.reads} for step in order]
    places, floats = _placed(used, plan.sizes, _LINE // 4)
    made = []
    for step in order:
        if isinstance(step, tuple):
            name, value = step
            row = (places[value], 0, 0, 1)
            flat: tuple[int, ...] = row + _NONE * 3 if name == "load" else _NONE + row + _NONE * 2
            made.append(_INSTRUCTION.pack(_CODES[name], DTYPE_CODES[plan.dtypes[value]], 1, 1, plan.sizes[value], numbers[value], 0.0, *flat))
        else:
            operands = [_operand(operand, places) for operand in (step.out, *step.operands)]
            flat = sum(operands, ()) + _NONE * (4 - len(operands))
            dtype = torch.float32 if _is_exact(step, plan) else step.dtype  # in scratch all is fp32: nothing to be rounded
            made.append(_INSTRUCTION.pack(_CODES[step.op], DTYPE_CODES[dtype], *step.shape, 0, step.scalar, *flat))
    return made, floats


def _is_exact(work: RowOp, plan: Plan) -> bool:
    """Whether its results are numbers of its dtype before they are rounded."""
    same = plan.dtypes[work.operands[0].value] == work.dtype
    return same and (work.op in ("copy", "relu") or (work.op == "mul_scalar" and abs(work.scalar) == 1.0))


_NONE = (0, 0, 0, 0)


def _operand(operand: Operand, places: dict[int, int]) -> tuple[int, ...]:
    return (places[operand.value] + operand.at, *operand.step)


def _placed(used: Iterable[Iterable[int]], sizes: Sequence[int], line: int) -> tuple[dict[int, int], int]:
    """Places for values of these sizes, given which of them each step uses, and the end of all; multiples of `line`.

    A value lives from the first step that uses it to the last, and those that live at one time do not overlap.
    """
    lives: dict[int, tuple[int, int]] = {}  # value -> first and last step
    for i, values in enumerate(used):
        for value in values:
            lives[value] = (lives.get(value, (i, i))[0], i)
    places: dict[int, int] = {}
    taken: list[tuple[int, int, int]] = []  # last, begin, end
    total = 0
    for value, (first, last) in sorted(lives.items(), key=lambda life: life[1]):
        size = -(-sizes[value] // line) * line
        at = 0
        for _, begin, end in sorted((t for t in taken if t[0] >= first), key=lambda t: t[1]):
            if at + size <= begin:
                break
            at = max(at, end)
        places[value] = at
        taken.append((last, at, at + size))
        total = max(total, at + size)
    return places, total
