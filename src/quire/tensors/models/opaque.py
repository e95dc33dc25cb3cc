"""What the compiler must not look into: products, attention and convolutions, as operators of torch's own registry.

In a layer's graph they are calls it can neither fuse nor reorder by what is inside; when the graph runs they go to the products and the step of the
forward that runs on this thread. They know which of their rows are padding (see compiled.py): those are left out, and come back zero.

Shape letters: T packed tokens with padding, n tokens without, Hq/Hkv query/KV heads, Dk/Dv head sizes, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch.nn import functional

from quire.errors import UnsupportedModelError
from quire.tensors.attention.base import Mask, PackingProducts
from quire.tensors.attention.carried import Recurrence
from quire.tensors.models.hook import current
from quire.tensors.packed import PackedLayout, PackedWeight, operands

_library: Any = torch.library.Library("quire", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("linear(Tensor x, Tensor weight, Tensor? bias, int axis) -> Tensor")
_library.define("matmul(Tensor x, Tensor weight, Tensor? bias, int axis) -> Tensor")
_library.define("packed(Tensor x, Tensor packed, Tensor? bias, int n, int k, ScalarType dtype, str quantization, int axis) -> Tensor")
_library.define("attend(Tensor q, Tensor k, Tensor v, Tensor? sinks, float scale, int window, int chunk, float softcap) -> Tensor")
_library.define("convolve(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


class OpaqueProducts:
    """`Products` for the time of tracing: each call becomes one operator of the graph."""

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See `Products.linear`."""
        if isinstance(weight, PackedWeight):
            return _packed_call(x, *operands(weight, False), bias)
        out: torch.Tensor = torch.ops.quire.linear(x, weight, bias, _token_axis(x))
        return out

    def matmul(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See `Products.matmul`."""
        if isinstance(weight, PackedWeight):
            return _packed_call(x, *operands(weight, True), bias)
        out: torch.Tensor = torch.ops.quire.matmul(x, weight, bias, _token_axis(x))
        return out


class OpaqueStep:
    """An `AttentionStep` for the time of tracing. `layers`: the layer_idx of each call, which is no part of the graph: layers share graphs."""

    of_programs = None

    def __init__(self) -> None:
        self.layers: list[int] = []

    def attend(self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> torch.Tensor:
        """q [T,Hq,Dk], k [T,Hkv,Dk], v [T,Hkv,Dv] -> [T,Hq,Dv]."""
        self.layers.append(layer_idx)
        out: torch.Tensor = torch.ops.quire.attend(q, k, v, mask.sinks, mask.scale, mask.window, mask.chunk, mask.softcap)
        return out

    def convolve(self, layer_idx: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T,C], weight [C,W], bias [C] -> [T,C]."""
        self.layers.append(layer_idx)
        out: torch.Tensor = torch.ops.quire.convolve(x, weight, bias)
        return out

    def convolve_carried(self, layer_idx: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """No compiled layer carries a state."""
        raise UnsupportedModelError("it carries a state from token to token, which compiled layers do not")

    def recur(self, layer_idx: int, given: Recurrence) -> torch.Tensor:
        """No compiled layer carries a state."""
        raise UnsupportedModelError("it carries a state from token to token, which compiled layers do not")


def _token_axis(x: torch.Tensor) -> int:
    """Which axis of a traced x [..., K] counts the tokens, if all before it are 1; -1 if none is, so that all rows are multiplied."""
    for axis, size in enumerate(x.shape[:-1]):
        if isinstance(size, torch.SymInt):
            return axis if size.node.expr.is_Symbol else -1
        if size != 1:
            break
    return -1


def _packed_call(x: torch.Tensor, packed: torch.Tensor, layout: PackedLayout, bias: torch.Tensor | None) -> torch.Tensor:
    form = (layout.n, layout.k, layout.dtype, layout.quantization)
    out: torch.Tensor = torch.ops.quire.packed(x, packed, bias, *form, _token_axis(x))
    return out


def _rows(compute: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, axis: int) -> torch.Tensor:
    """compute(x) without the padding along `axis`, which comes back zero."""
    num_tokens = current().positions.shape[0]
    if axis < 0 or x.shape[axis] == num_tokens:
        return compute(x)
    out = compute(x.narrow(axis, 0, num_tokens))
    return functional.pad(out, (0, 0) * (x.dim() - axis - 1) + (0, x.shape[axis] - num_tokens))


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, axis: int) -> torch.Tensor:
    products = current().mode.products
    return _rows(lambda part: products.linear(part, weight, bias), x, axis)


def _matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, axis: int) -> torch.Tensor:
    products = current().mode.products
    return _rows(lambda part: products.matmul(part, weight, bias), x, axis)


def _packed(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, n: int, k: int, dtype: torch.dtype, quantization: str, axis: int
) -> torch.Tensor:
    products = cast(PackingProducts, current().mode.products)
    layout = PackedLayout(n, k, dtype, quantization)
    return _rows(lambda part: products.packed(part, packed, layout, bias), x, axis)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, scale: float, window: int, chunk: int, softcap: float
) -> torch.Tensor:
    forward = current()
    num_tokens = forward.positions.shape[0]
    # Copies: what is staged is read again at the commit, and by then compiled code has used its buffers for something else.
    k, v = (x[:num_tokens].clone(memory_format=torch.contiguous_format) for x in (k, v))
    with forward.mode.paused():
        out = forward.step.attend(forward.layer_idx, q[:num_tokens].contiguous(), k, v, Mask(scale, window, chunk, softcap, sinks))
    return functional.pad(out, (0, 0, 0, 0, 0, q.shape[0] - num_tokens)) if q.shape[0] != num_tokens else out.contiguous()


def _convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    forward = current()
    num_tokens = forward.positions.shape[0]
    with forward.mode.paused():
        rows = x[:num_tokens].clone(memory_format=torch.contiguous_format)  # staged, as above
        out = forward.step.convolve(forward.layer_idx, rows, weight, bias)
    return functional.pad(out, (0, 0, 0, x.shape[0] - num_tokens))


def _linear_shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, axis: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _matmul_shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, axis: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1])


def _packed_shape(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, n: int, *_: object) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], n)


def _attend_shape(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


def _convolve_shape(x: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape)


# Plain registrations: torch.library.custom_op wraps each call in several layers of Python, a tenth of a small layer's time.
for _name, _run, _shape in (
    ("linear", _linear, _linear_shape),
    ("matmul", _matmul, _matmul_shape),
    ("packed", _packed, _packed_shape),
    ("attend", _attend, _attend_shape),
    ("convolve", _convolve, _convolve_shape),
):
    _library.impl(_name, _run, "CPU")
    torch.library.register_fake(f"quire::{_name}", _shape, lib=_library)
