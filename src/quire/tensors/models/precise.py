"""A model of bf16 or fp16 weights run with fp32 activations: the probe's second opinion.

A mixture of experts turns on its router's choice, and a choice between two near-equal experts turns on a rounding, so two right computations in
bf16 may give far-off logits for a token. In fp32 such ties all but vanish. Weights are widened one product at a time, for that product only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from quire.tensors.attention.base import Products
from quire.tensors.packed import PackedWeight

# What insists on operands of one dtype. Everything else in a forward promotes by itself.
_STRICT = {
    functional.linear, functional.conv1d, functional.layer_norm, functional.rms_norm, functional.group_norm, torch.matmul, torch.mm, torch.bmm,
    torch.addmm, torch.baddbmm, torch.einsum, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm, torch.Tensor.__matmul__,
    torch.Tensor.__rmatmul__,
}  # fmt: skip
# What would round activations to the dtype of a weight that they are to meet, as convolutions and some routers do.
_CONVERSIONS = {torch.Tensor.to, torch.Tensor.type_as, torch.Tensor.half, torch.Tensor.bfloat16}


class WithFloatActivations(TorchFunctionMode):
    """While on, embeddings come out in fp32, what is fp32 is made no narrower, and products and convolutions widen what they are given to fp32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.embedding:
            return func(*args, **kwargs).float()
        if func in _STRICT:
            return func(*(_widened(given) for given in args), **{name: _widened(given) for name, given in kwargs.items()})
        result = func(*args, **kwargs)
        if func in _CONVERSIONS and args[0].dtype == torch.float32 and result.dtype in (torch.bfloat16, torch.float16):
            return args[0].to(result.device)
        return result


class WidenedProducts:
    """`Products` whose weights are widened to the dtype of x."""

    def __init__(self, products: Products) -> None:
        self._products = products

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """As `Products.linear`, with weight and bias of any float dtype."""
        return self._products.linear(x, _as(weight, x.dtype), None if bias is None else bias.to(x.dtype))

    def matmul(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """As `Products.matmul`, with weight and bias of any float dtype."""
        return self._products.matmul(x, _as(weight, x.dtype), None if bias is None else bias.to(x.dtype))


def _as(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight if isinstance(weight, PackedWeight) else weight.to(dtype)  # a packed one is multiplied in x's dtype anyway


def _widened(given: Any) -> Any:
    return _as(given, torch.float32) if isinstance(given, torch.Tensor) and given.is_floating_point() else given
