"""Matrix products in Triton: weights as they lie, or their codes of int8 and int4, for any device Triton compiles to.

The law by which y[m] depends on x[m], the weight and the bias alone, not on the number of rows, a row's place or how x lies:

    a program     ROWS = 64 rows of x and COLUMNS outputs, whatever the call holds; what is beyond its edges is read as zeros and written nowhere
    its shape     known from x's dtype and the weight's form (`_SHAPES`), its warps too: an output meets the same instructions in a block of one row
                  or of many. Few rows would want a smaller block; that may be another instruction (on a GPU mma, not wgmma), with other bits. They
                  pay with idle lanes, not with memory, for which few rows wait: a weight's element is read once for up to 64 of them
    its order     parts of 1,024 of k, each an fp32 sum from scratch, then added in ascending order: by the program that has them all, or, where a
                  call has few programs (triton_cut.py), by a second kernel. Of a part DEPTH at a time, ascending; within a tile the order is the
                  instruction's, which looks at neither row nor column. Of codes each tile's sum apart, times the scale of its span by one fused
                  multiply-add
    its end       the bias is added in fp32, then rounded to x's dtype
    compiled      once for a weight, and once for it cut: x is read as contiguous rows that begin at 16 bytes (otherwise a copy is), and their number
                  is not specialized on. Multiply and add are fused where the law says so, nowhere else

A weight is read through its strides, so `linear(x, w)` and `matmul(x, w.T)` are one call. Tensors of a call lie on the current device.

The kernel compiles for GPUs (tests/tensors/test_triton_device.py) and has run on none. Under Triton's interpreter it runs on CPU tensors, with one
shape for all dtypes, since there all are multiplied as fp32: slow, for tests.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl

from quire.tensors.attention.triton import INTERPRETED
from quire.tensors.packed import PackedLayout, PackedWeight, operands
from quire.tensors.products import SPANS, ReferenceProducts, parts
from quire.tensors.triton_cut import Cut

_ROWS: Final = 64
_PART: Final = 1024  # of k, a multiple of any depth and span
_CUT_BYTES: Final = 32 << 20  # of parts' sums; where they took more, a program adds its own
_ADDED: Final = 512  # outputs of a program that adds parts
_ALIGNMENT: Final = 16  # bytes, of what Triton specializes a pointer on


class _Shape(NamedTuple):
    """Of a program. Its tiles of x and of the weight lie in shared memory `num_stages` times, less than 99 KiB."""

    columns: int
    depth: int
    num_warps: int
    num_stages: int


# Without TF32 a GPU multiplies fp32 one element at a time, from registers that hold all of a tile's depth.
_SHAPES: Final = {torch.float32: _Shape(64, 16, 4, 3), torch.bfloat16: _Shape(128, 64, 4, 3), torch.float16: _Shape(128, 64, 4, 3)}
# In the interpreter a program takes milliseconds, even a small one, so it has many columns, though no more than twice the weight's: lanes that are
# idle cost there, too. Bits are not a device's anyway.
_SHAPE_INTERPRETED: Final = _Shape(512, 64, 1, 1)


class TritonProducts:
    """`PackingProducts` (see attention/base.py) of float32, bfloat16 and float16 for inference: no gradients are recorded.

    Weights that are not quantised stay as they lie; codes are those of `ReferenceProducts`. `cut`: which calls have their sums cut among programs,
    none by default.
    """

    def __init__(self, cut: Cut | None = None) -> None:
        self._codes, self._cut = ReferenceProducts(), cut or Cut()

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] times weight [N, K] transposed, plus bias [N]; fp32 accumulation, result [..., N] in x's dtype.

        A `PackedWeight` may have another dtype than x. Raises TypeError for dtypes and devices it does not serve, ValueError for shapes that do
        not fit.
        """
        if isinstance(weight, PackedWeight):
            return self.packed(x, *operands(weight, False), bias)
        return self._plain(x, weight, bias, False)

    def matmul(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] times weight [K, N], plus bias [N]; fp32 accumulation, result [..., N] in x's dtype.

        Raises as `linear` does.
        """
        if isinstance(weight, PackedWeight):
            return self.packed(x, *operands(weight, True), bias)
        return self._plain(x, weight, bias, True)

    def packed(self, x: torch.Tensor, packed: torch.Tensor, layout: PackedLayout, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`linear` with the bytes of a quantised weight."""
        codes, scales = parts(packed, layout)
        _check_k(x, codes, 1)
        return _product(x, codes, scales, bias, SPANS[layout.quantization], self._cut.least_programs)

    def packed_bytes(self, layout: PackedLayout) -> int:
        """What `pack` writes; 0 where nothing is quantised."""
        return self._codes.packed_bytes(layout)

    def packed_format(self, layout: PackedLayout) -> tuple[int, int] | None:
        """None: the form is the reference's own."""
        return None

    def pack(self, weight: torch.Tensor, layout: PackedLayout, out: torch.Tensor) -> int:
        """Write weight [N, K] to `out`, uint8 [packed_bytes(layout)], all of it."""
        return self._codes.pack(weight, layout, out)

    def rows(self, packed: torch.Tensor, layout: PackedLayout, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows ids int64 [R] of a quantised weight as elements [R, K] of `dtype`. Raises IndexError."""
        return self._codes.rows(packed, layout, ids, dtype)

    def _plain(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, is_matmul: bool) -> torch.Tensor:
        if x.dtype != weight.dtype:
            raise TypeError(_refusal(x, weight, bias))
        _check_k(x, weight, 0 if is_matmul else 1)
        return _product(x, weight.mT if is_matmul else weight, None, bias, SPANS["int8"], self._cut.least_programs)


def _check_k(x: torch.Tensor, weight: torch.Tensor, axis: int) -> None:
    if weight.dim() != 2 or not x.dim():
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)}: x needs a last dimension, the weight two")
    if x.shape[-1] != weight.shape[axis]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} disagree about K")


def _product(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None, bias: torch.Tensor | None, span: int, least_programs: int
) -> torch.Tensor:
    """x [..., K], weight [N, K] of x's dtype or, with scales [N, spans], int8 codes; bias [N]."""
    shape = _shape(x.dtype)
    given = (x, weight) if bias is None else (x, weight, bias)
    apart = any(tensor.device != x.device for tensor in given) or (x.is_meta if INTERPRETED else x.is_cpu)
    if shape is None or apart or (bias is not None and bias.dtype != x.dtype):
        raise TypeError(_refusal(*given))
    n, k = weight.shape
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias {tuple(bias.shape)}: must be ({n},)")
    x = x.contiguous()
    if x.data_ptr() % _ALIGNMENT:
        x = x.clone()
    out = x.new_empty(*x.shape[:-1], n, dtype=torch.float32 if INTERPRETED else x.dtype)  # the interpreter would cut floats to bfloat16
    m = x.shape[:-1].numel()
    columns = min(shape.columns, max(16, triton.next_power_of_2(n))) if INTERPRETED else shape.columns
    if not out.numel():
        return out.to(x.dtype)
    bias, blocks, num_parts = None if bias is None else bias.contiguous(), (triton.cdiv(m, _ROWS), triton.cdiv(n, columns)), triton.cdiv(k, _PART)
    cut = num_parts > 1 and blocks[0] * blocks[1] < least_programs and 4 * num_parts * out.numel() <= _CUT_BYTES
    sums = x.new_empty(num_parts, m, n, dtype=torch.float32) if cut else None
    _multiply[(*blocks, num_parts if cut else 1)](
        x, weight, scales, bias, out if sums is None else sums, m, n, k, *weight.stride(), CUT=cut,
        SPAN=span, ROWS=_ROWS, COLUMNS=columns, DEPTH=min(shape.depth, span), PART=_PART, WIDE=INTERPRETED,
        num_warps=shape.num_warps, num_stages=shape.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    if sums is not None:
        _add_parts[(triton.cdiv(m * n, _ADDED),)](sums, bias, out, m * n, n, num_parts, BLOCK=_ADDED, num_warps=4, enable_fp_fusion=False)
    return out.to(x.dtype)


def _shape(dtype: torch.dtype) -> _Shape | None:
    return _SHAPE_INTERPRETED if INTERPRETED and dtype in _SHAPES else _SHAPES.get(dtype)


def _refusal(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> str:
    given = {"x": x, "weight": weight} if bias is None else {"x": x, "weight": weight, "bias": bias}
    got = ", ".join(f"{name} {tensor.dtype} on {tensor.device}" for name, tensor in given.items())
    where = "on cpu, in Triton's interpreter, or on one device" if INTERPRETED else "on one device that is not cpu"
    return f"{got}: Triton products take one dtype of {', '.join(str(d) for d in _SHAPES)} for all, {where}"


@triton.jit(do_not_specialize=["m"])  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]
    x, weight, scales, bias, out, m, n, k, weight_n, weight_k,
    CUT: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PART: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A block of rows and of outputs: x [m, k] and out [m, n] contiguous, weight [n, k] by its strides, scales [n, spans] and bias [n] or None.
    With CUT one part of each sum, as it is, to out [parts, m, n].

    Blocks of rows follow one another, so that those that run at one time share the weight's columns.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    part = tl.program_id(2)
    first = part * PART
    left = x + row.to(tl.int64)[:, None] * k + (first + depth)[None, :]
    right = weight + (first + depth).to(tl.int64)[:, None] * weight_k + column.to(tl.int64)[None, :] * weight_n
    if scales is not None:
        scale = scales + column.to(tl.int64) * tl.cdiv(k, SPAN)
    acc, total = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, tl.minimum(k, first + PART) if CUT else k, DEPTH):
        inside = depth < k - start
        a = tl.load(left, mask=(row < m)[:, None] & inside[None, :], other=0.0)
        b = tl.load(right, mask=inside[:, None] & (column < n)[None, :], other=0.0)
        if WIDE:
            a = a.to(tl.float32)
        b = b.to(a.dtype)  # of codes exact, whatever x is
        if scales is None:
            acc = tl.dot(a, b, acc, input_precision="ieee")
        else:
            factor = tl.load(scale + start // SPAN, mask=column < n, other=0.0).to(tl.float32)
            acc = tl.fma(tl.dot(a, b, input_precision="ieee"), tl.broadcast_to(factor[None, :], ROWS, COLUMNS), acc)
        left += DEPTH
        right += DEPTH * weight_k
        if not CUT:  # noqa: SIM102 - one is known when this is compiled, the other is not
            if (start + DEPTH) % PART == 0:
                total += acc
                acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    if CUT:
        total = acc
    else:
        total += acc
        if bias is not None:
            total += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    where = out + (part.to(tl.int64) * m + row)[:, None] * n + column[None, :]
    tl.store(where, total.to(out.dtype.element_ty), mask=(row < m)[:, None] & (column < n)[None, :])


@triton.jit(do_not_specialize=["num_outputs", "num_parts"])  # type: ignore[untyped-decorator]
def _add_parts(sums, bias, out, num_outputs, n, num_parts, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums [parts, outputs] to out [outputs], of which n have a row; bias [n] or None."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    each = sums + at
    for _ in tl.range(0, num_parts, num_stages=4):
        total += tl.load(each, mask=at < num_outputs, other=0.0)
        each += num_outputs
    if bias is not None:
        total += tl.load(bias + at % n, mask=at < num_outputs, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < num_outputs)
