"""Torch operations whose bits depend on how many rows they see, and how each is made to depend on a row alone.

Two kinds were measured. Products pick a GEMM by the number of rows: they go to `Products`. Elementwise functions run whole vectors through one
implementation and the rest, at the end, through another, so a value's bits depend on where it lies: inputs are padded to whole vectors.
`ExactMode` does both to every torch call made while it is on. Reductions within a row (softmax, norms, means) were invariant and are left alone: on
the CPU. On an accelerator it is the other way round, and there `exact_rows.py` says what they become.

The rule for elementwise functions holds for one torch thread: several would each end their share with a rest of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from quire.tensors.attention.base import Products, RowReductions
from quire.tensors.models.einsum import Contraction, contraction
from quire.tensors.models.exact_rows import Handler, row_handlers

VECTOR = 64  # elements; the longest step is two AVX-512 registers of bf16, and every shorter one divides it


def in_whole_vectors(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """function(x) for an elementwise `function` of a float tensor of any shape; no element is computed by a vector loop's remainder."""
    traced = isinstance(x.numel(), torch.SymInt)  # for the compiler, whose loops are its own; the tokens it runs on are padded (compiled.py)
    if traced or is_whole(x):
        return function(x)
    flat = x.reshape(-1)
    count = flat.numel()
    return function(functional.pad(flat, (0, -count % VECTOR)))[:count].view(x.shape)


def is_whole(x: torch.Tensor) -> bool:
    """Whether an elementwise function takes `x` in whole vectors as it lies: rows of them with unit stride, or as many in total where it is
    contiguous."""
    return (x.is_contiguous() and x.numel() % VECTOR == 0) or (x.dim() > 0 and x.shape[-1] % VECTOR == 0 and x.stride(-1) == 1)


class ExactMode(TorchFunctionMode):
    """While on, products go to `products` and elementwise functions run in whole vectors, whoever calls them; the latter unless they are recorded.

    With `rows` this is an accelerator's: sums within a row go there (exact_rows.py), and elementwise functions are left alone.
    """

    def __init__(self, products: Products, *, whole_vectors: bool = True, rows: RowReductions | None = None) -> None:
        super().__init__()
        self.products = products
        self._handlers = _HANDLERS
        if rows is not None or not whole_vectors:
            self._handlers = {func: handler for func, handler in _HANDLERS.items() if handler is not _elementwise}
        if rows is not None:
            self._handlers |= row_handlers(rows)
        self.whole_vectors = whole_vectors and rows is None
        self._paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = None if self._paused else self._handlers.get(func)
        if handler is None:
            return func(*args, **(kwargs or {}))
        return handler(self.products, func, args, kwargs or {})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave torch alone for a while: attention has an exactness of its own."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before


def product(products: Products, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b through `products`, broadcasting as torch.matmul does. Rows are a's, unless a is a weight and b is not.

    Products over one element (rope's outer product) and of two vectors add nothing, or in one order, and stay with torch.
    """
    if a.dtype != b.dtype or not a.is_floating_point() or a.shape[-1] == 1 or (a.dim() == 1 and b.dim() == 1):
        return torch.matmul(a, b)
    if b.dim() == 1:
        return products.linear(a, b.unsqueeze(0)).squeeze(-1)
    if a.dim() == 1:
        return product(products, a.unsqueeze(0), b).squeeze(-2)
    if isinstance(a, nn.Parameter) and not isinstance(b, nn.Parameter):
        return product(products, b.mT, a.detach().mT).mT
    if b.dim() == 2:
        return _rows(products, a, b)
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # type: ignore[no-untyped-call]
    lefts, rights = (x.expand(*batch, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (a, b))
    parts = [_rows(products, left, right) for left, right in zip(lefts, rights, strict=True)]
    if not parts:
        return torch.matmul(a, b)
    return torch.stack(parts).view(*batch, a.shape[-2], b.shape[-1])


def _rows(products: Products, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if weight.mT.is_contiguous():
        return products.linear(x, weight.mT)
    return products.matmul(x, weight.contiguous())


def _linear(products: Products, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _linear_of(products, *args, **kwargs)


def _linear_of(products: Products, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if weight.dim() != 2 or input.dtype != weight.dtype:
        return functional.linear(input, weight, bias)
    return products.linear(input, weight, bias)


def _matmul(products: Products, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    operands = (*args, *kwargs.values())
    if len(operands) != 2 or not all(isinstance(x, torch.Tensor) for x in operands):  # out= or an out_dtype: not for us
        return func(*args, **kwargs)
    left, right = operands
    return product(products, right, left) if func is torch.Tensor.__rmatmul__ else product(products, left, right)


def _addmm(products: Products, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) != 3 or set(kwargs) - {"alpha", "beta"}:
        return func(*args, **kwargs)
    alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
    base, a, b = args
    if alpha == beta == 1 and base.dim() == 1 and b.dim() == 2 and not b.mT.is_contiguous() and base.dtype == a.dtype == b.dtype:
        return products.matmul(a, b.contiguous(), base)
    result = product(products, a, b)
    result = result if alpha == 1 else result * alpha
    return result if beta == 0 else result + (base if beta == 1 else base * beta)  # beta = 0 must not read NaN from the base


def _inner(products: Products, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) != 2 or kwargs or args[1].dim() != 2:
        return func(*args, **kwargs)
    return product(products, args[0], args[1].mT)


def _einsum(products: Products, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any einsum of two operands that adds only over what they share; others stay with torch, and with the probe."""
    spec, *operands = args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if isinstance(spec, str) and len(operands) == 2 and operands[0].dtype == operands[1].dtype and operands[0].is_floating_point():
        x, weight = operands
        plan = contraction(spec, x.dim(), weight.dim())
        if plan is not None and isinstance(x, nn.Parameter) and not isinstance(weight, nn.Parameter):
            plan, x, weight = plan.swapped(), weight, x
        if plan is not None:
            sizes = dict(zip(plan.left, x.shape, strict=True))
            if all(sizes.setdefault(label, n) == n for label, n in zip(plan.right, weight.shape, strict=True)):
                return _contracted(products, plan, sizes, x, weight)
    return func(*args, **kwargs)


def _contracted(products: Products, plan: Contraction, sizes: dict[str, int], x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    batch, rows, shared, columns = ([sizes[label] for label in labels] for labels in plan.parts)
    lefts = x.permute(plan.left_order).reshape(*batch, math.prod(rows), math.prod(shared))
    rights = weight.permute(plan.right_order).reshape(*batch, math.prod(shared), math.prod(columns))
    return product(products, lefts, rights).reshape(*batch, *rows, *columns).permute(plan.out_order)


def _elementwise(products: Products, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0] if args else None
    rest = (*args[1:], *kwargs.values())
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or any(isinstance(other, torch.Tensor) for other in rest):
        return func(*args, **kwargs)
    result = in_whole_vectors(lambda padded: func(padded, *args[1:], **kwargs), x)
    if func in _INPLACE or kwargs.get("inplace") is True or any(given is True for given in args[1:]):
        return x.copy_(result)  # the caller may go on with x itself
    return result


_PRODUCTS: dict[Handler, tuple[Callable[..., Any], ...]] = {
    _linear: (functional.linear,),
    _matmul: (torch.matmul, torch.mm, torch.bmm, torch.mv, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm, torch.Tensor.mv,
              torch.Tensor.__matmul__, torch.Tensor.__rmatmul__, torch.linalg.matmul),
    _addmm: (torch.addmm, torch.baddbmm, torch.Tensor.addmm, torch.Tensor.baddbmm),
    _einsum: (torch.einsum,),
    _inner: (torch.inner, torch.Tensor.inner),
}  # fmt: skip
_ELEMENTWISE = (
    "sigmoid", "tanh", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "erf", "erfc", "sin", "cos", "tan", "atan", "asinh", "sinh", "cosh",
    "rsqrt", "sqrt", "reciprocal", "pow", "logit", "sinc",
)  # fmt: skip
_ACTIVATIONS = (
    "silu", "gelu", "softplus", "mish", "elu", "selu", "celu", "logsigmoid", "hardswish", "hardsigmoid", "tanhshrink", "softsign", "sigmoid", "tanh",
)  # fmt: skip
_HANDLERS: dict[Callable[..., Any], Handler] = {function: handler for handler, functions in _PRODUCTS.items() for function in functions}
_INPLACE = {getattr(owner, f"{name}_") for name in _ELEMENTWISE for owner in (torch, torch.Tensor) if hasattr(owner, f"{name}_")}
_PLAIN = {getattr(owner, name) for name in _ELEMENTWISE for owner in (torch, torch.Tensor, torch.special) if hasattr(owner, name)}
_FUNCTIONAL = {getattr(functional, name) for name in _ACTIVATIONS}
_HANDLERS.update(dict.fromkeys(_INPLACE | _PLAIN | _FUNCTIONAL | {torch.Tensor.__pow__}, _elementwise))
