"""Arithmetic of the device that there is not (fake_device.py): sums and products in an order that depends on how many there are, as on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from quire.tensors.models.exact import VECTOR

_SUMS = {"sum", "mean", "_softmax", "_log_softmax", "logsumexp", "var", "std", "var_mean", "linalg_vector_norm", "norm", "native_layer_norm"}
_ELEMENTWISE = {"silu", "gelu", "tanh", "sigmoid", "exp", "log", "log1p", "cos", "sin", "rsqrt", "sqrt", "pow", "softplus"}


def ordered(name: str, op: Any, args: Any, kwargs: Any) -> Any:
    """The operator, and if it adds up floats of a number of rows that is no multiple of three, in the other order. An element has the same bits
    wherever it lies, as on a GPU, and not as on the CPU, where it may be computed by a vector or behind the last one."""
    x = next((x for x in args if isinstance(x, torch.Tensor)), None)
    if name in _ELEMENTWISE and x is not None and x.is_floating_point() and not any(isinstance(y, torch.Tensor) for y in args[1:]):
        out = kwargs.pop("out", None)
        whole = functional.pad(x.reshape(-1), (0, -x.numel() % VECTOR))
        result = op.overloadpacket(whole, *args[1:], **kwargs)[: x.numel()].view(x.shape)
        return result if out is None else out.copy_(result)
    if x is None or not x.is_floating_point() or x.dim() < 2 or x.numel() // max(1, x.shape[-1]) % 3 == 0:
        return op(*args, **kwargs)
    if name in ("mm", "bmm"):
        return op(args[0].flip(-1), args[1].flip(-2), *args[2:], **kwargs)
    if name in ("addmm", "baddbmm"):
        return op(args[0], args[1].flip(-1), args[2].flip(-2), *args[3:], **kwargs)
    if name not in _SUMS or x.shape[-1] < 2:
        return op(*args, **kwargs)
    if name == "native_layer_norm":
        flipped = [y.flip(-1) if isinstance(y, torch.Tensor) else y for y in args]
        out, *rest = op(*flipped, **kwargs)
        return out.flip(-1), *rest
    along = next((arg for arg in args[1:] if type(arg) in (int, list) and arg != []), -1)
    along = [along] if isinstance(along, int) else along
    if name in ("_softmax", "_log_softmax"):
        out = kwargs.pop("out", None)
        result = op.overloadpacket(x.flip(along), *args[1:], **kwargs).flip(along)
        return result if out is None else out.copy_(result)
    return op(x.flip(along), *args[1:], **kwargs)
