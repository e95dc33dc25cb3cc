"""What torch computes itself in a forward of ours though its bits follow the number of tokens: products (on an accelerator sums, too), for which
it picks another kernel with another order of adding, and elementwise functions of a number of elements that is no whole number of vectors.

They are looked for by what they are, not by what they give: an adapter that begins at zero, or adds little, shows no difference in any bit of the
probe's logits, and would in those of a later step. A curve differs in the last bit of few elements, which the probe's few tokens need not have.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from quire.tensors.attention.base import Products
from quire.tensors.models.exact import is_whole

# Operator -> the argument whose last dimension is added over; over one element nothing is added. None: whatever its shapes.
_PRODUCTS: dict[str, int | None] = {
    **dict.fromkeys(("mm", "bmm", "mv", "matmul", "linear", "inner", "linalg_matmul"), 0),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm", "addmv", "addmm_", "baddbmm_", "addbmm_", "addmv_", "_addmm_activation"), 1),
    **dict.fromkeys(
        ("dot", "vdot", "einsum", "tensordot", "bilinear", "_trilinear", "linalg_vecdot", "linalg_multi_dot", "_cdist_forward", "_euclidean_dist",
         "convolution", "_convolution", "mkldnn_convolution", "mkldnn_linear", "_slow_conv2d_forward", "slow_conv3d_forward", "thnn_conv2d",
         "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math", "scaled_dot_product_attention", "_scaled_mm", "_int_mm",
         "_grouped_mm", "_weight_int8pack_mm", "_weight_int4pack_mm_for_cpu", "mkldnn_rnn_layer")
    ),
}  # fmt: skip

# Where torch adds up floats in an order that looks at how many sums there are, as it does on accelerators. Of integers every order is the same.
_SUMS = frozenset((
    "sum", "mean", "nansum", "nanmean", "prod", "var", "std", "var_mean", "std_mean", "logsumexp", "norm", "linalg_vector_norm", "cumsum", "cumprod",
    "logcumsumexp", "_softmax", "_log_softmax", "softmax", "log_softmax", "native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm",
    "native_group_norm", "group_norm", "native_batch_norm", "_native_batch_norm_legit", "batch_norm", "scatter_add", "scatter_add_", "scatter_reduce",
    "segment_reduce", "_embedding_bag", "avg_pool1d", "avg_pool2d", "_adaptive_avg_pool2d",
))  # fmt: skip

# Elementwise functions whose vector loop and the remainder behind it differ in the last bit. Roots, quotients and their likes round alike in both.
_CURVES = frozenset(
    name + suffix
    for suffix in ("", "_")
    for name in (
        "sigmoid", "tanh", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "erf", "erfc", "sin", "cos", "tan", "asin", "acos", "atan",
        "atan2", "sinh", "cosh", "asinh", "acosh", "atanh", "pow", "logit", "sinc", "silu", "gelu", "glu", "softplus", "mish", "elu",
        "log_sigmoid_forward", "logaddexp", "logaddexp2", "xlogy", "lgamma", "digamma",
    )
)  # fmt: skip
_EXACT_POWERS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0)  # made of products, quotients and roots

Stray = tuple[str, str, tuple[tuple[int, ...], ...]]  # operator, class of the module that runs it, its operands' shapes


class Finder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While on, notes in `found` the operators that reach torch of which `wanted`, given name and arguments, returns any operands."""

    def __init__(self, wanted: Callable[[str, tuple[Any, ...]], tuple[Any, ...]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._wanted = wanted
        self.found: list[Stray] = []
        self._overlooking = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._overlooking:
            return func(*args, **kwargs)
        with self:  # under inference_mode, what is made of smaller operators arrives whole
            made = func.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
        name = func.overloadpacket.__name__
        if operands := self._wanted(name, args):
            self.found.append((name, _running_module(), tuple(tuple(x.shape) for x in operands if isinstance(x, torch.Tensor))))
        return func(*args, **kwargs)

    @contextmanager
    def overlooking(self) -> Iterator[None]:
        """Inside, nothing is noted."""
        before, self._overlooking = self._overlooking, True
        try:
            yield
        finally:
            self._overlooking = before


def of_products(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The operands of a product."""
    if name not in _PRODUCTS:
        return ()
    at = _PRODUCTS[name]
    return args if at is None or args[at].shape[-1] > 1 else ()


def of_products_and_sums(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The operands of a product, or of a sum of floats."""
    if name in _SUMS and args[0].is_floating_point() and args[0].numel() > 1:
        return args[:1]
    return of_products(name, args)


def of_remainders(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The operands of an elementwise function that is given something else than whole vectors (see exact.py)."""
    if name not in _CURVES or (name in ("pow", "pow_") and isinstance(args[1], int | float) and args[1] in _EXACT_POWERS):
        return ()
    return args if any(isinstance(x, torch.Tensor) and x.is_floating_point() and not is_whole(x) for x in args) else ()


class OverlookedProducts:
    """`Products` whose own use of torch is their own affair."""

    def __init__(self, products: Products, strays: Finder) -> None:
        self._products, self._strays = products, strays

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See `Products.linear`."""
        with self._strays.overlooking():
            return self._products.linear(x, weight, bias)

    def matmul(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See `Products.matmul`."""
        with self._strays.overlooking():
            return self._products.matmul(x, weight, bias)


def differing(few: Finder, more: Finder) -> list[tuple[str, str]]:
    """(operator, class of the module) of those found whose shapes, or whose number, are others for another number of tokens, each once."""
    if len(few.found) == len(more.found):
        strays = [b for a, b in zip(few.found, more.found, strict=True) if a != b]
    else:  # experts, of which some get no token
        fixed = set(few.found) & set(more.found)
        strays = [one for one in (*few.found, *more.found) if one not in fixed]
    return list(dict.fromkeys((operator, owner) for operator, owner, _ in strays))


def _running_module() -> str:
    """The class of the innermost module whose forward is on this thread's stack."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return type(owner).__name__
        frame = frame.f_back
    return "the model"
