"""What is to be done with each token's row of a layer, as data: small operators, products with weights, and where tokens meet.

Values are numbered: rows of one size and dtype each, of weights, of the call's tensors, or made by a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quire.tensors.attention.base import Mask


@dataclass(frozen=True, slots=True)
class Operand:
    """Elements of a value's row: from `at` on, in three dimensions of `step`."""

    value: int
    at: int
    step: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class RowOp:
    """One operator (csrc/rows_args.h) over `shape` elements of a row, whose result is rounded to `dtype`."""

    op: str
    dtype: torch.dtype
    shape: tuple[int, int, int]
    out: Operand
    operands: tuple[Operand, ...]
    scalar: float = 0.0

    @property
    def reads(self) -> tuple[int, ...]:
        """The values it needs."""
        return tuple(operand.value for operand in self.operands)


@dataclass(frozen=True, slots=True)
class Multiply:
    """x W, with `rows` rows of x for each token, from element `x_at` of its row on, `x_stride` apart. `weight_format`: csrc/linear_args.h."""

    weight_format: int
    x: int
    x_at: int
    x_stride: int
    weight: int
    weight_stride: int
    bias: int | None
    rows: int
    n: int
    k: int
    out: int

    @property
    def reads(self) -> tuple[int, ...]:
        """The values it needs, besides weights."""
        return (self.x,)


@dataclass(frozen=True, slots=True)
class Attend:
    """The layer's attention: whole values q [Hq,Dk], k [Hkv,Dk], v [Hkv,Dv], result [Hq,Dv] for each token."""

    values: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    mask: Mask
    out: int


@dataclass(frozen=True, slots=True)
class Convolve:
    """A convolution: a whole value x [C], a weight [C,W] and a bias [C], result [C] for each token. `carried`: of a layer that carries a state."""

    values: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    width: int
    weight: int
    bias: int | None
    out: int
    carried: bool


@dataclass(frozen=True, slots=True)
class Recur:
    """A recurrence (attention/carried.py): whole values q, k [Hk,Dk], v [Hv,Dv], decay and beta [Hv], result [Hv,Dv] for each token."""

    values: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    scale: float
    normalized: bool
    corrects: bool
    out: int


Mix = Attend | Convolve | Recur


@dataclass(frozen=True, slots=True)
class Plan:
    """A layer, or a part of a model: what is done before tokens meet, between two such `mixes`, and behind the last. `dtypes`, `sizes` [value];
    `weights`, `inputs`: values, and their numbers among the layer's weights and its call's tensors; `outputs`: values and shapes of what it returns,
    with the dimension of tokens in front.
    """

    parts: tuple[tuple[RowOp | Multiply, ...], ...]
    mixes: tuple[Mix, ...]
    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[int, ...]
    weights: tuple[tuple[int, int], ...]
    inputs: tuple[tuple[int, int], ...]
    outputs: tuple[tuple[int, tuple[int, ...]], ...]
