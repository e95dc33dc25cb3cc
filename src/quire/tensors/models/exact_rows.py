"""Sums within a row of a tensor, as torch spells them, given to `RowReductions`: what exact mode does on an accelerator beside products.

There torch splits a sum among threads by the number of sums, so that a row's bits depend on how many rows there are; and there elementwise functions
need nothing. Served is one dimension of a float32, bfloat16 or float16 tensor, in the spellings below. Whatever else adds up floats stays with torch,
and strays.py finds it at load. Of integers and of maxima any order gives the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from quire.tensors.attention.base import Products, RowReductions

Handler = Callable[[Products, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
_Rows = Callable[[RowReductions, torch.Tensor, dict[str, Any]], torch.Tensor]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def row_handlers(rows: RowReductions) -> dict[Callable[..., Any], Handler]:
    """Handlers for `ExactMode`."""
    handlers: dict[Callable[..., Any], Handler] = {function: _along(rows, run, names) for function, (run, names) in _ALONG.items()}
    return handlers | {functional.layer_norm: _normalized(rows, centred=True), functional.rms_norm: _normalized(rows, centred=False)}


def _along(rows: RowReductions, run: _Rows, names: tuple[str, ...]) -> Handler:
    """What gives a function of (input, *names) along its one `dim` to `run`, the dimension last, and everything else to torch."""

    def handler(_: Any, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(("input", *names), args, strict=False)) | {"dim" if name == "axis" else name: value for name, value in kwargs.items()}
        x, dim, dtype = given.pop("input", None), given.pop("dim", None), given.pop("dtype", None)
        dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
        served = len(args) <= 1 + len(names) and type(dim) is int and isinstance(x, torch.Tensor) and x.dim() > 0 and "out" not in given
        if not served or (dtype or x.dtype) not in _DTYPES or not x.is_floating_point():
            return func(*args, **kwargs)
        keepdim, x = given.pop("keepdim", None), x if dtype is None else x.to(dtype)
        try:
            out = run(rows, x.movedim(dim, -1), given)
        except _NotServed:
            return func(*args, **kwargs)
        if out.dim() == x.dim():
            return out.movedim(-1, dim)
        return out.unsqueeze(dim) if keepdim else out

    return handler


class _NotServed(Exception):
    """For torch, and for strays.py to find."""


def _sum(rows: RowReductions, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    return rows.total(x)


def _mean(rows: RowReductions, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    return rows.total(x, 1 / x.shape[-1]) if x.shape[-1] else rows.total(x) * torch.nan


def _var(rows: RowReductions, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    correction = given.get("correction", None if given.get("unbiased") is None else int(given["unbiased"]))
    correction = 1 if correction is None else correction
    if x.shape[-1] <= correction:
        raise _NotServed
    wide = x.float()
    return rows.total((wide - _mean(rows, wide, {}).unsqueeze(-1)).square(), 1 / (x.shape[-1] - correction)).to(x.dtype)


def _std(rows: RowReductions, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    return _var(rows, x.float(), given).sqrt().to(x.dtype)


def _norm(rows: RowReductions, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    if given.get("p", given.get("ord", 2)) not in (2, 2.0, "fro", None):
        raise _NotServed
    return rows.total(x.float().square()).sqrt().to(x.dtype)


def _softmax(rows: RowReductions, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    return rows.softmax(x)


def _log_softmax(rows: RowReductions, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    return rows.softmax(x, log=True)


def _normalized(rows: RowReductions, *, centred: bool) -> Handler:
    names = ("input", "normalized_shape", "weight", "bias", "eps") if centred else ("input", "normalized_shape", "weight", "eps")

    def handler(_: Any, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        x, shape, eps = given["input"], given["normalized_shape"], given.get("eps", 1e-5 if centred else None)
        if len(shape) != 1 or x.dtype not in _DTYPES or x.shape[-1:] != torch.Size(shape):
            return func(*args, **kwargs)
        return rows.normalized(x, given.get("weight"), given.get("bias"), torch.finfo(x.dtype).eps if eps is None else eps, centred=centred)

    return handler


_REDUCED, _SHAPED = ("dim", "keepdim"), ("dim",)
_ALONG: dict[Callable[..., Any], tuple[_Rows, tuple[str, ...]]] = {
    **dict.fromkeys((torch.sum, torch.Tensor.sum), (_sum, _REDUCED)),
    **dict.fromkeys((torch.mean, torch.Tensor.mean), (_mean, _REDUCED)),
    **dict.fromkeys((torch.var, torch.Tensor.var), (_var, ("dim", "unbiased", "keepdim"))),
    **dict.fromkeys((torch.std, torch.Tensor.std), (_std, ("dim", "unbiased", "keepdim"))),
    **dict.fromkeys((torch.norm, torch.Tensor.norm), (_norm, ("p", "dim", "keepdim"))),
    torch.linalg.vector_norm: (_norm, ("ord", "dim", "keepdim")),
    **dict.fromkeys((torch.softmax, torch.Tensor.softmax, functional.softmax), (_softmax, _SHAPED)),
    **dict.fromkeys((torch.log_softmax, torch.Tensor.log_softmax, functional.log_softmax), (_log_softmax, _SHAPED)),
}
