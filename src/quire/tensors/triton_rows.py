"""Sums within a row in Triton: totals, softmax and norms, for any device Triton compiles to.

The law by which a row's result depends on that row alone, not on the number of rows or a row's place:

    a program     ROWS rows, LANES of each at a time, ascending; both, and the warps, are known from a row's length. What is beyond the last row is
                  read as zeros and written nowhere
    its order     lane i adds elements i, i + LANES, ... in fp32; then a row's lanes are added up, in the order that the compiler has for so many,
                  which looks at no other row
    compiled      once for a length and a dtype: rows are read as contiguous and from 16 bytes on (otherwise a copy is), and their number is not
                  specialized on. Nothing is fused

torch's own kernels for this split a row among more threads when there are fewer rows. Tensors of a call lie on the current device.

The kernels compile for GPUs (tests/tensors/test_triton_device.py) and have run on none. Under Triton's interpreter they run on CPU tensors, too.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl

from quire.tensors.attention.triton import INTERPRETED

_ELEMENTS: Final = 2048  # of a program at once
_ROWS_INTERPRETED: Final = 64  # there a program takes milliseconds, however large it is
_ALIGNMENT: Final = 16  # bytes, of what Triton specializes a pointer on


class TritonRows:
    """See `RowReductions`. Rows of float32, bfloat16 or float16."""

    def total(self, x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        """The sum of each row of x [..., N] times `factor`, [...]."""
        x, out = _rows(x), _out(x, x.shape[:-1])
        if out.numel():
            shape = _shape(x)
            _total[(shape.num_programs,)](x, out, shape.num_rows, x.shape[-1], float(factor), **shape.options)
        return out.to(x.dtype)

    def softmax(self, x: torch.Tensor, log: bool = False) -> torch.Tensor:
        """The softmax of each row of x [..., N], or its logarithm."""
        x, out = _rows(x), _out(x, x.shape)
        if out.numel():
            shape = _shape(x)
            _softmax[(shape.num_programs,)](x, out, shape.num_rows, x.shape[-1], LOG=log, **shape.options)
        return out.to(x.dtype)

    def normalized(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, *, centred: bool = True
    ) -> torch.Tensor:
        """Layer norm of each row of x [..., N], or with `centred` False RMS norm; weight and bias [N] of any float dtype, or None."""
        x, out = _rows(x), _out(x, x.shape)
        if out.numel():
            shape = _shape(x)
            weight, bias = (None if given is None else given.contiguous() for given in (weight, bias))
            _normalized[(shape.num_programs,)](x, weight, bias, out, shape.num_rows, x.shape[-1], float(eps), CENTRED=centred, **shape.options)
        return out.to(x.dtype)


class _Shape(NamedTuple):
    """Of a launch: `options` from the length of a row alone."""

    num_rows: int
    num_programs: int
    options: dict[str, Any]


def _rows(x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    return x.clone() if x.data_ptr() % _ALIGNMENT else x


def _out(x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return x.new_empty(shape, dtype=torch.float32 if INTERPRETED else x.dtype)  # the interpreter would cut floats to bfloat16


def _shape(x: torch.Tensor) -> _Shape:
    num_rows, n = x.shape[:-1].numel(), x.shape[-1]
    lanes = min(_ELEMENTS, int(triton.next_power_of_2(max(n, 1))))
    rows = _ROWS_INTERPRETED if INTERPRETED else _ELEMENTS // lanes
    return _Shape(num_rows, triton.cdiv(num_rows, rows), {"ROWS": rows, "LANES": lanes, "num_warps": 4, "enable_fp_fusion": False})


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _total(x, out, num_rows, n, factor, ROWS: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """x [num_rows, n], out [num_rows]."""
    row, lane = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, LANES)
    acc = tl.zeros([ROWS, LANES], tl.float32)
    for start in range(0, n, LANES):
        acc += _part(x, row, num_rows, n, start + lane, 0.0)
    tl.store(out + row, (tl.sum(acc, 1) * factor).to(out.dtype.element_ty), mask=row < num_rows)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _softmax(x, out, num_rows, n, LOG: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """x and out [num_rows, n]. A row with NaN or inf in it, or with nothing but -inf, becomes NaN as in torch."""
    row, lane = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, LANES)
    highest = tl.full([ROWS, LANES], float("-inf"), tl.float32)
    for start in range(0, n, LANES):
        highest = tl.maximum(highest, _part(x, row, num_rows, n, start + lane, float("-inf")))
    top = tl.max(highest, 1)[:, None]
    acc = tl.zeros([ROWS, LANES], tl.float32)
    for start in range(0, n, LANES):
        values = tl.exp(_part(x, row, num_rows, n, start + lane, 0.0) - top)
        acc += tl.where((start + lane < n)[None, :], values, 0.0)
    total = tl.sum(acc, 1)[:, None]
    for start in range(0, n, LANES):
        values = _part(x, row, num_rows, n, start + lane, 0.0) - top
        if LOG:
            values -= tl.log(total)
        else:
            values = tl.exp(values) / total
        _put(out, values, row, num_rows, n, start + lane)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _normalized(  # type: ignore[no-untyped-def]
    x, weight, bias, out, num_rows, n, eps, CENTRED: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):
    """x and out [num_rows, n], weight and bias [n] or None."""
    row, lane = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, LANES)
    mean = tl.zeros([ROWS], tl.float32)[:, None]
    if CENTRED:
        acc = tl.zeros([ROWS, LANES], tl.float32)
        for start in range(0, n, LANES):
            acc += _part(x, row, num_rows, n, start + lane, 0.0)
        mean = (tl.sum(acc, 1) / n)[:, None]
    acc = tl.zeros([ROWS, LANES], tl.float32)
    for start in range(0, n, LANES):
        values = _part(x, row, num_rows, n, start + lane, 0.0) - mean
        acc += tl.where((start + lane < n)[None, :], values * values, 0.0)
    factor = (1.0 / tl.sqrt(tl.sum(acc, 1) / n + eps))[:, None]
    for start in range(0, n, LANES):
        inside = start + lane < n
        values = (_part(x, row, num_rows, n, start + lane, 0.0) - mean) * factor
        if weight is not None:
            values *= tl.load(weight + start + lane, mask=inside, other=0.0).to(tl.float32)[None, :]
        if bias is not None:
            values += tl.load(bias + start + lane, mask=inside, other=0.0).to(tl.float32)[None, :]
        _put(out, values, row, num_rows, n, start + lane)


@triton.jit
def _part(x, row, num_rows, n, at, other):  # type: ignore[no-untyped-def]
    """Elements `at` [lanes] of the rows `row` [rows] as fp32 [rows, lanes], `other` where there are none."""
    inside = (row < num_rows)[:, None] & (at < n)[None, :]
    return tl.load(x + row.to(tl.int64)[:, None] * n + at[None, :], mask=inside, other=other).to(tl.float32)


@triton.jit
def _put(out, values, row, num_rows, n, at):  # type: ignore[no-untyped-def]
    """Write them."""
    inside = (row < num_rows)[:, None] & (at < n)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * n + at[None, :], values.to(out.dtype.element_ty), mask=inside)
