"""What attention needs to know of one step, and the one operator every backend provides.

Shape letters: T packed tokens of the step, S sequences, P pages, B page size, Hq/Hkv query/KV heads, Dk/Dv head sizes.

    packed batch       query_start      one sequence's page table (group of full layers, B = 4)
    a a a b c c  _     0 3 4 6          entry      0         1         2
    (T = 7, one pad)                    page_ids  [ 17 ]    [  3 ]    [ 40 ]
                                        positions 0..3      4..7      8..11
                                        num_committed = 6  ->  0..5 are read from pages, 6.. from this step's staged k/v
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from quire.tensors.codec import RowFormat
from quire.tensors.packed import PackedLayout

if TYPE_CHECKING:
    from quire.tensors.attention.carried import CarriedKernels


@dataclass(frozen=True, slots=True)
class TableInputs:
    """Page tables of one group in CSR form: sequence s owns `page_ids[page_start[s] : page_start[s + 1]]`.

    Entry j of a sequence covers absolute positions [j * B, (j + 1) * B). It is -1 where the page has left a sliding window and is never read.
    `page_ids` int32, `page_start` int32 [S + 1].
    """

    page_ids: torch.Tensor
    page_start: torch.Tensor


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The ragged batch of one step, the same for every layer. `query_start` int32 [S + 1], `num_committed` int32 [S], one table a group."""

    query_start: torch.Tensor
    num_committed: torch.Tensor
    tables: tuple[TableInputs, ...]


@dataclass(frozen=True, slots=True)
class LayerPlace:
    """Where one layer's keys and values lie: its group, the formats of their rows, and where in a page the rows of K [Hkv, B] and of V [Hkv, B]
    begin, in bytes."""

    layer_idx: int
    group: int
    page_size: int
    num_kv_heads: int
    k: RowFormat
    v: RowFormat
    k_offset: int
    v_offset: int


@dataclass(frozen=True, slots=True)
class StatePlace:
    """Where in a page of its group the state of a layer that carries one begins, and how long it is, in bytes."""

    layer_idx: int
    group: int
    page_size: int
    offset: int
    num_bytes: int


def page_rows(pages: torch.Tensor, place: LayerPlace) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's rows of K [P, Hkv, B, bytes] and of V [P, Hkv, B, bytes] as views of pages [P, page_bytes] uint8."""
    shape, num_rows = (pages.shape[0], place.num_kv_heads, place.page_size), place.num_kv_heads * place.page_size
    k = pages[:, place.k_offset : place.k_offset + num_rows * place.k.num_bytes].view(*shape, place.k.num_bytes)
    v = pages[:, place.v_offset : place.v_offset + num_rows * place.v.num_bytes].view(*shape, place.v.num_bytes)
    return k, v


@dataclass(frozen=True, slots=True)
class Mask:
    """What a query may see beyond causality, and how its scores are shaped. 0 means none.

    A key at position p is visible to a query at position q when p <= q, q - p < window (if set), p // chunk == q // chunk (if set). Scores are
    multiplied by `scale`, then softcapped to softcap * tanh(s / softcap) if set. `sinks` [Hq] adds one logit a head to the denominator.
    """

    scale: float
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    sinks: torch.Tensor | None = None

    def first_visible(self, position: int) -> int:
        """The lowest position a query at `position` sees."""
        first = max(0, position - self.window + 1) if self.window else 0
        return max(first, position - position % self.chunk) if self.chunk else first


class ProgramStep(Protocol):
    """A step as layers that are native programs attend in it; they stage keys and values there themselves. `handle` is theirs to know."""

    handle: Any

    @property
    def staged_layers(self) -> list[int]:
        """The layer_idx of every layer that has staged something."""
        ...

    def commit(self, slots: Sequence[torch.Tensor]) -> None:
        """Write it to pages, as `AttentionBackend.commit` does; `slots[g]` of group g."""
        ...


class AttentionBackend(Protocol):
    """One operator, what goes before it and what after. Implementations promise that a row's bits depend on its own sequence alone."""

    name: str

    @property
    def carried(self) -> CarriedKernels | None:
        """What computes them, None where layers with a state cannot be served."""
        ...

    def program_steps(self, pages: torch.Tensor, places: Iterable[LayerPlace]) -> Callable[[StepInputs, int], ProgramStep] | None:
        """What makes a step of so many tokens over pages [P,page_bytes] for layers that are native programs; None if they cannot attend here."""
        ...

    def encode(self, x: torch.Tensor, row: RowFormat) -> torch.Tensor:
        """Keys or values x [T,Hkv,D] as they are staged: rows [T,Hkv,num_bytes] uint8 of an encoded format, `x` itself for a plain one."""
        ...

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, place: LayerPlace, step: StepInputs, mask: Mask
    ) -> torch.Tensor:
        """Attention of q [T,Hq,Dk] over committed pages [P,page_bytes] uint8 and staged k, v (from `encode`); [T,Hq,Dv] contiguous, of q's dtype.

        Rows at and beyond query_start[S] are padding and come back zero. Nothing is written but the result.
        """
        ...

    def commit(self, k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, place: LayerPlace, slots: torch.Tensor) -> None:
        """Write staged k, v to pages: token t goes to page slots[t] // B, place slots[t] % B; -1 writes nothing. `slots` int64 [T]."""
        ...


class Products(Protocol):
    """Matrix products whose row bits do not depend on the number of rows."""

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] times weight [N, K] transposed, plus bias [N]; fp32 accumulation, result in x's dtype."""
        ...

    def matmul(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] times weight [K, N], plus bias [N]; fp32 accumulation, result in x's dtype."""
        ...


class RowReductions(Protocol):
    """Sums within a row whose bits do not depend on the number of rows, in fp32. x: [..., N], contiguous or not, results in x's dtype."""

    def total(self, x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        """The sum of each row times a factor, [...]."""
        ...

    def softmax(self, x: torch.Tensor, log: bool = False) -> torch.Tensor:
        """The softmax of each row, or its logarithm, [..., N]."""
        ...

    def normalized(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, *, centred: bool = True
    ) -> torch.Tensor:
        """Layer norm, or with `centred` False RMS norm, of each row, [..., N]; weight and bias [N] or None."""
        ...


class PackingProducts(Products, Protocol):
    """Products that multiply a `PackedWeight` in `linear` and `matmul`, and make one. `packed` below is the bytes of one."""

    def packed(self, x: torch.Tensor, packed: torch.Tensor, layout: PackedLayout, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] times the weight [N, K] transposed, plus bias [N]; fp32 accumulation, result in x's dtype."""
        ...

    def packed_bytes(self, layout: PackedLayout) -> int:
        """The most that `pack` writes; 0 where such a weight is best left as it is."""
        ...

    def packed_format(self, layout: PackedLayout) -> tuple[int, int] | None:
        """The native kernels' numbers of its dtype and its packed form, None if `pack` writes another."""
        ...

    def pack(self, weight: torch.Tensor, layout: PackedLayout, out: torch.Tensor) -> int:
        """Write weight [N, K] of layout.dtype to `out`, uint8 [packed_bytes(layout)]; of these it is the first so many that are returned."""
        ...

    def rows(self, packed: torch.Tensor, layout: PackedLayout, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows ids int64 [R] of the weight as elements [R, K] of `dtype`. Raises IndexError."""
        ...
