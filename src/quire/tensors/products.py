"""Matrix products in plain torch whose row bits do not depend on the batch: the oracle of the native kernels, and the fallback without them.

Quantised weights are scales bf16 [N, spans of K] and after them codes int8 [N, K], chosen as csrc/linear_pack.h says; others are left as they are.

torch picks a GEMM by the number of rows, and another GEMM adds in another order: fp32 has three to four classes of row counts, bf16 too at some
widths. So every product here has exactly 16 rows, from a block of its own (a slice of a larger tensor could be aligned differently): one class.
A row's place within the block was measured not to matter with 9 outputs and more; with fewer it does on an AMD CPU, so these are filled up.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from quire.tensors.packed import PackedLayout, PackedWeight, operands

BLOCK_ROWS = 16
LEAST_OUTPUTS = 16
SPANS = {"int8": 256, "int4": 32}  # k that share a scale


class ReferenceProducts:
    """`Products` (see attention/base.py) in blocks of exactly 16 rows."""

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] times weight [N, K] transposed, plus bias [N]; result [..., N] in x's dtype, which must be the weight's.

        Raises RuntimeError, as torch does, when shapes or dtypes do not fit.
        """
        if isinstance(weight, PackedWeight):
            return self.packed(x, *operands(weight, False), bias)
        return _by_blocks(lambda block: _linear(block, weight, bias), x, weight.shape[0])

    def matmul(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] times weight [K, N], plus bias [N]; result [..., N] in x's dtype, which must be the weight's.

        Raises RuntimeError, as torch does, when shapes or dtypes do not fit.
        """
        if isinstance(weight, PackedWeight):
            return self.packed(x, *operands(weight, True), bias)
        return _by_blocks(lambda block: _linear(block, weight.t(), bias), x, weight.shape[1])

    def packed(self, x: torch.Tensor, packed: torch.Tensor, layout: PackedLayout, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`linear` with the bytes of a packed weight."""
        return _by_blocks(lambda block: _product(block, packed, layout, bias), x, layout.n)

    def packed_bytes(self, layout: PackedLayout) -> int:
        """What `pack` writes; 0 where nothing is quantised."""
        if layout.quantization == "none":
            return 0
        return layout.n * (layout.k + 2 * -(-layout.k // SPANS[layout.quantization]))

    def packed_format(self, layout: PackedLayout) -> tuple[int, int] | None:
        """None: the form is this class's own."""
        return None

    def pack(self, weight: torch.Tensor, layout: PackedLayout, out: torch.Tensor) -> int:
        """Write weight [N, K] to `out`, uint8 [packed_bytes(layout)], all of it."""
        codes, scales = parts(out, layout)
        padded = functional.pad(weight.float(), (0, -layout.k % SPANS[layout.quantization]))
        spans = padded.view(*scales.shape, SPANS[layout.quantization])
        high, low = spans.amax(-1), spans.amin(-1)
        if layout.quantization == "int8":
            limits, scale = (-127, 127), torch.maximum(high, -low) / 127
        else:
            limits, scale = (-8, 7), torch.where(-low > high, low, high) / -8
        scales.copy_(scale)
        divisor = torch.where(scales == 0, 1, scales).float().unsqueeze(-1)
        codes.copy_((spans / divisor).round_().clamp_(*limits).view(padded.shape)[:, : layout.k])
        return out.numel()

    def rows(self, packed: torch.Tensor, layout: PackedLayout, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows ids int64 [R] of a quantised weight as elements [R, K] of `dtype`. Raises IndexError."""
        codes, scales = (part[ids].float() for part in parts(packed, layout))
        return (codes * scales.repeat_interleave(SPANS[layout.quantization], 1)[:, : layout.k]).to(dtype)


def parts(packed: torch.Tensor, layout: PackedLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales as views of their bytes."""
    num_spans = -(-layout.k // SPANS[layout.quantization])
    scales, codes = torch.split(packed, [2 * layout.n * num_spans, layout.n * layout.k])
    return codes.view(torch.int8).view(layout.n, layout.k), scales.view(torch.bfloat16).view(layout.n, num_spans)


def _product(x: torch.Tensor, packed: torch.Tensor, layout: PackedLayout, bias: torch.Tensor | None) -> torch.Tensor:
    """x [16, K] with a quantised weight: what csrc/linear_packed.h promises, but for the order within a span."""
    codes, scales = parts(packed, layout)
    wide, span = x.float(), SPANS[layout.quantization]
    total = wide.new_zeros(x.shape[0], layout.n)
    for i, (part, code) in enumerate(zip(torch.split(wide, span, 1), torch.split(codes, span, 1), strict=True)):
        total += _linear(part.contiguous(), code.float(), None) * scales[:, i]
    return (total if bias is None else total + bias.float()).to(x.dtype)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [16, K] with a weight [N, K]."""
    width, missing = weight.shape[0], LEAST_OUTPUTS - weight.shape[0]
    if missing > 0:
        weight, bias = functional.pad(weight, (0, 0, 0, missing)), None if bias is None else functional.pad(bias, (0, missing))
    return functional.linear(x, weight, bias)[:, :width]


def _by_blocks(product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, width: int) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_empty(rows.shape[0], width)
    block = rows.new_zeros(BLOCK_ROWS, rows.shape[1])  # rows left over from an earlier block only feed results that are dropped
    for start in range(0, rows.shape[0], BLOCK_ROWS):
        part = rows[start : start + BLOCK_ROWS]
        block[: part.shape[0]] = part
        out[start : start + BLOCK_ROWS] = product(block)[: part.shape[0]]
    return out.view(*x.shape[:-1], width)
