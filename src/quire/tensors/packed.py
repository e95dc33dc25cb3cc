"""Weights in a form of our own: packed for the kernels, or quantised, in the place where a model's weight was.

A `PackedWeight` is a tensor to whoever asks for its shape and dtype. What modules do with a weight (linear, addmm, embedding; its conversion, one
row) works, slowly, on rows that are unpacked for the occasion, so that a model's own forward still runs; anything else raises, naming the weight.
`Products` know it and multiply it as it lies. How the bytes lie is in csrc/packed_formats.h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

_CHUNK_BYTES = 2**22  # of unpacked rows at once


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """A weight [n, k] of `dtype` in its packed form. `quantization`: "none" for its very elements, or "int8", "int4"."""

    n: int
    k: int
    dtype: torch.dtype
    quantization: str = "none"


Rows = Callable[[torch.Tensor, PackedLayout, torch.Tensor, torch.dtype], torch.Tensor]


class PackedWeight(torch.Tensor):
    """A weight [N, K] that is kept packed.

    Attributes: `packed` (uint8, as many as its form can take), `num_bytes` (how many of these it takes: what follows may be another weight's),
    `form` (a tensor's `layout` is another thing), `weight_name`, `transposed` (the model has it as [K, N]).
    """

    packed: torch.Tensor
    num_bytes: int
    form: PackedLayout
    weight_name: str
    transposed: bool
    _rows: Rows

    @staticmethod
    def __new__(
        cls, packed: torch.Tensor, layout: PackedLayout, rows: Rows, weight_name: str, transposed: bool = False, num_bytes: int | None = None
    ) -> PackedWeight:
        shape = (layout.k, layout.n) if transposed else (layout.n, layout.k)
        self: PackedWeight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=layout.dtype, device=packed.device)
        self.packed, self.form, self.weight_name, self.transposed, self._rows = packed, layout, weight_name, transposed, rows
        self.num_bytes = packed.numel() if num_bytes is None else num_bytes
        return self

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    def rows(self, ids: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows of the weight [N, K] as elements: ids int64 of any shape, result [*ids, K], in `dtype` or the weight's. Raises IndexError."""
        taken = self._rows(self.packed, self.form, ids.reshape(-1), dtype or self.dtype)
        return taken.view(*ids.shape, self.form.k)

    def with_packed(self, packed: torch.Tensor) -> PackedWeight:
        """The same weight with other bytes."""
        return PackedWeight(packed, self.form, self._rows, self.weight_name, self.transposed, self.num_bytes)

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"PackedWeight({self.weight_name}, {self.form})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            return _linear(*args, **kwargs)
        if func is torch.addmm and len(args) == 3 and not kwargs and isinstance(args[2], PackedWeight) and args[2].transposed:
            return _linear(args[1], args[2], args[0])
        if func is functional.embedding:
            return _embedding(*args, **kwargs)
        if func in (torch.Tensor.to, torch.Tensor.type) and len(args) == 2 and isinstance(args[1], torch.dtype) and not kwargs:
            return _converted(*args)
        if func is torch.Tensor.__getitem__ and (row := _one_row(*args)) is not None:
            return row
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        weight = next(arg for arg in (*args, *(kwargs or {}).values()) if isinstance(arg, PackedWeight))
        raise RuntimeError(f"{weight.weight_name} is packed ({weight.form.quantization=}): {func} cannot read it; `.rows(ids)` gives its elements")


def operands(weight: PackedWeight, as_matmul: bool) -> tuple[torch.Tensor, PackedLayout]:
    """Bytes and form of the weight of a `linear`, or of a `matmul`. Raises ValueError if it is the other's."""
    if weight.transposed != as_matmul:
        raise ValueError(f"{weight.weight_name} is packed and cannot be multiplied as its transpose")
    return weight.packed, weight.form


def bytes_of(weight: torch.Tensor) -> torch.Tensor:
    """The tensor in which a weight's bytes are."""
    return weight.packed if type(weight) is PackedWeight else weight


def form_of(weight: torch.Tensor) -> PackedLayout | None:
    """A packed weight's form, None of another."""
    return weight.form if type(weight) is PackedWeight else None


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """torch's own product with a packed weight, some rows of it unpacked at a time, in x's dtype."""
    if not isinstance(weight, PackedWeight) or isinstance(x, PackedWeight):
        raise RuntimeError(f"{weight!r} and {x!r}: only a product's weight may be packed")
    step = max(16, _CHUNK_BYTES // (x.element_size() * max(1, weight.form.k)) // 16 * 16)
    chunks = torch.split(torch.arange(weight.form.n, device=x.device), step)
    out = torch.cat([functional.linear(x, weight.rows(ids, x.dtype)) for ids in chunks], dim=-1)
    return out if bias is None else out + bias.to(x.dtype)


def _embedding(
    input: torch.Tensor, weight: torch.Tensor, padding_idx: int | None = None, max_norm: float | None = None, *_: object, **__: object
) -> torch.Tensor:
    assert isinstance(weight, PackedWeight) and max_norm is None  # padding_idx and what follows it matter to gradients alone
    return weight.rows(input)


def _converted(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """All elements in a dtype, as LongCat's router takes its weight at every call."""
    elements = weight.rows(torch.arange(weight.form.n, device=weight.device), weight.dtype).to(dtype)
    return elements.t() if weight.transposed else elements


def _one_row(weight: torch.Tensor, at: object) -> torch.Tensor | None:
    """`weight[i]` or `weight[i, :]`, as Gemma 4 asks for its padding's embedding; None for whatever else is asked for."""
    if isinstance(at, tuple) and len(at) == 2 and at[1] == slice(None):
        at = at[0]
    if not isinstance(weight, PackedWeight) or weight.transposed or type(at) is not int or not -weight.form.n <= at < weight.form.n:
        return None
    return weight.rows(torch.tensor([at % weight.form.n], device=weight.device))[0]
