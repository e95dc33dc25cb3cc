"""Matrix products on CPU in C++: float32, bfloat16 and float16, with weights as they lie, packed, or quantised (packed.py).

The bits of y[m] depend on x[m], the weight and the bias alone: not on the number of rows, a row's place or the threads. Each output adds its terms
in one order, given in csrc/linear.h, and `linear(x, w)` equals `matmul(x, w.T)` bit for bit, and so does either with `w` packed. Quantised weights
have an order of their own, in csrc/linear_packed.h.
"""

from __future__ import annotations

from math import prod

import torch

from quire.tensors.native import DTYPE_CODES, lib
from quire.tensors.native_numbers import packed_format
from quire.tensors.packed import PackedLayout, PackedWeight, operands

_product = lib.product
_NK, _KN = 0, 1  # csrc/linear_args.h: weights as they lie


class NativeProducts:
    """`Products` (see attention/base.py) for inference: no gradients are recorded, whatever its arguments ask for.

    `num_threads`: threads of each call; results do not depend on it.
    """

    def __init__(self, num_threads: int) -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads={num_threads}: must be at least 1")
        self.num_threads = num_threads

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] times weight [N, K] transposed, plus bias [N]; fp32 accumulation, result [..., N] in x's dtype.

        A `PackedWeight` may have another dtype than x. Raises TypeError for dtypes and devices it does not serve, ValueError for shapes that do
        not fit.
        """
        if type(weight) is PackedWeight:
            return self.packed(x, *operands(weight, False), bias)
        return self._multiply(x, weight, bias, False)

    def matmul(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] times weight [K, N], plus bias [N]; fp32 accumulation, result [..., N] in x's dtype.

        Raises as `linear` does.
        """
        if type(weight) is PackedWeight:
            return self.packed(x, *operands(weight, True), bias)
        return self._multiply(x, weight, bias, True)

    def packed_bytes(self, layout: PackedLayout) -> int:
        """The most that `pack` writes."""
        return int(lib.packed_bytes(format_code(layout), layout.n, layout.k))

    def packed_format(self, layout: PackedLayout) -> tuple[int, int] | None:
        """The kernels' numbers of a packed weight's dtype and form."""
        return DTYPE_CODES[layout.dtype], format_code(layout)

    def pack(self, weight: torch.Tensor, layout: PackedLayout, out: torch.Tensor) -> int:
        """Write weight [N, K] of layout.dtype to `out`, uint8 [packed_bytes(layout)], and return how many of these bytes it takes; they are told in
        csrc/packed_formats.h, and for bf16 in packed_short.h, where the CPU has AVX2 or AVX-512 and no tiles."""
        weight = weight if weight.stride(-1) == 1 else weight.contiguous()
        address, code = weight.data_ptr(), DTYPE_CODES[layout.dtype]
        n, k = layout.n, layout.k
        return int(lib.pack(format_code(layout), address, out.data_ptr(), n, 0, n, k, weight.stride(0), code, self.num_threads))

    def rows(self, packed: torch.Tensor, layout: PackedLayout, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows ids int64 [R] of a packed weight as elements [R, K] of `dtype`. Raises IndexError."""
        ids, out = ids.contiguous(), torch.empty(ids.shape[0], layout.k, dtype=dtype)
        code = DTYPE_CODES[dtype]
        lib.packed_rows(
            format_code(layout), packed.data_ptr(), ids.data_ptr(), out.data_ptr(), ids.shape[0], layout.n, layout.k, code, self.num_threads
        )
        return out

    def packed(self, x: torch.Tensor, packed: torch.Tensor, layout: PackedLayout, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`linear` with the bytes of a packed weight."""
        code, shape = DTYPE_CODES.get(x.dtype), x.shape
        bias_address = 0
        if bias is not None:
            bias = bias.contiguous()
            bias_address = bias.data_ptr()
        if code is None or not x.is_cpu or (bias is not None and (bias.dtype is not x.dtype or not bias.is_cpu)):
            raise TypeError(_refusal(x, packed, bias))
        *leading, k = shape or (0,)
        if k != layout.k or not shape or (bias is not None and bias.shape != (layout.n,)):
            raise ValueError(f"x {tuple(shape)}, weight {(layout.n, layout.k)} and bias {None if bias is None else tuple(bias.shape)} do not fit")
        x_stride = k
        if not x.is_contiguous():
            x, x_stride = _rows_apart(x)
        out = x.new_empty(*leading, layout.n)
        _product(
            format_code(layout), x.data_ptr(), packed.data_ptr(), bias_address, out.data_ptr(), prod(leading), layout.n, k, x_stride, 0, code,
            self.num_threads,
        )  # fmt: skip
        return out

    # One of these runs for every projection of every layer, and each thing asked of a tensor costs a tenth of a microsecond or more.
    def _multiply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, is_matmul: bool) -> torch.Tensor:
        dtype = x.dtype
        code = DTYPE_CODES.get(dtype)
        if code is None or weight.dtype is not dtype or not (x.is_cpu and weight.is_cpu):
            raise TypeError(_refusal(x, weight, bias))
        shape, weight_shape = x.shape, weight.shape
        if len(weight_shape) != 2 or not shape:
            raise ValueError(f"x {tuple(shape)} and weight {tuple(weight_shape)}: x needs a last dimension, the weight two")
        first, weight_stride = weight_shape
        k, n = weight_shape if is_matmul else (weight_stride, first)
        *leading, x_stride = shape
        if x_stride != k:
            raise ValueError(f"x {tuple(shape)} and weight {tuple(weight_shape)} disagree about K")
        bias_address = 0
        if bias is not None:
            if bias.dtype is not dtype or not bias.is_cpu:
                raise TypeError(_refusal(x, weight, bias))
            if bias.shape != (n,):
                raise ValueError(f"bias {tuple(bias.shape)}: must be ({n},)")
            bias = bias.contiguous()
            bias_address = bias.data_ptr()
        if not weight.is_contiguous():
            stride, last = weight.stride()
            if last == 1:
                weight_stride = stride
            elif stride == 1 and first > 1:  # a transposed weight: the other product, with the same bits
                is_matmul, weight_stride = not is_matmul, last
            else:
                weight = weight.contiguous()
        if not x.is_contiguous():
            x, x_stride = _rows_apart(x)
        out = x.new_empty(*leading, n)
        _product(
            _KN if is_matmul else _NK, x.data_ptr(), weight.data_ptr(), bias_address, out.data_ptr(), prod(leading), n, k, x_stride, weight_stride,
            code, self.num_threads,
        )  # fmt: skip
        return out


def format_code(layout: PackedLayout) -> int:
    """The number by which the kernels know a packed form (csrc/linear_args.h)."""
    return packed_format(DTYPE_CODES[layout.dtype], layout.quantization)


def _rows_apart(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x with rows of unit stride, and how far they are apart: as they are in a slice of columns, or a copy's."""
    if x.stride(-1) == 1 and x.numel() == x.shape[-2] * x.shape[-1]:
        return x, x.stride(-2)
    return x.contiguous(), x.shape[-1]


def _refusal(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str:
    given = {"x": x, "weight": weight} if bias is None else {"x": x, "weight": weight, "bias": bias}
    got = ", ".join(f"{name} {tensor.dtype} on {tensor.device}" for name, tensor in given.items())
    return f"{got}: native products take one dtype of {', '.join(str(d) for d in DTYPE_CODES)} for all, on cpu"
