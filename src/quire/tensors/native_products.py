"""Matrix products on CPU in C++: float32, bfloat16 and float16, weights read as they lie.

The bits of y[m] depend on x[m], the weight and the bias alone: not on the number of rows, a row's place or the threads. Each output adds its terms
in one order, given in csrc/linear.h, and `linear(x, w)` equals `matmul(x, w.T)` bit for bit.
"""

from __future__ import annotations

from math import prod

import torch

from quire.tensors.native import DTYPE_CODES, lib

_product = lib.product


class NativeProducts:
    """`Products` (see attention/base.py) for inference: no gradients are recorded, whatever its arguments ask for.

    `num_threads`: OpenMP threads of each call; results do not depend on it.
    """

    def __init__(self, num_threads: int) -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads={num_threads}: must be at least 1")
        self.num_threads = num_threads

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] times weight [N, K] transposed, plus bias [N]; fp32 accumulation, result [..., N] in x's dtype.

        Raises TypeError for dtypes and devices it does not serve, ValueError for shapes that do not fit.
        """
        return self._multiply(x, weight, bias, False)

    def matmul(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] times weight [K, N], plus bias [N]; fp32 accumulation, result [..., N] in x's dtype.

        Raises as `linear` does.
        """
        return self._multiply(x, weight, bias, True)

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
            if x.stride(-1) == 1 and x.numel() == shape[-2] * k:  # rows apart, as in a slice of columns
                x_stride = x.stride(-2)
            else:
                x = x.contiguous()
        out = x.new_empty(*leading, n)
        _product(
            is_matmul, x.data_ptr(), weight.data_ptr(), bias_address, out.data_ptr(), prod(leading), n, k, x_stride, weight_stride, code,
            self.num_threads,
        )  # fmt: skip
        return out


def _refusal(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str:
    given = {"x": x, "weight": weight} if bias is None else {"x": x, "weight": weight, "bias": bias}
    got = ", ".join(f"{name} {tensor.dtype} on {tensor.device}" for name, tensor in given.items())
    return f"{got}: native products take one dtype of {', '.join(str(d) for d in DTYPE_CODES)} for all, on cpu"
