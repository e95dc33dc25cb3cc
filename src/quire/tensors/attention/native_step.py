"""One step's attention and staged keys and values, as layers that are native programs find them in C++ (csrc/step.h)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from quire.tensors.attention.base import LayerPlace, StepInputs
from quire.tensors.native import lib


class NativeStep:
    """A step of one store. `handle`: quire._native.Step, what a program attends in."""

    def __init__(self, handle: Any, inputs: StepInputs, num_threads: int) -> None:
        self.handle, self._inputs, self._num_threads = handle, inputs, num_threads  # whose memory the handle reads

    @property
    def staged_layers(self) -> list[int]:
        """The layer_idx of every layer that has staged keys and values here."""
        return list(self.handle.staged_layers)

    def commit(self, slots: Sequence[torch.Tensor]) -> None:
        """Write them to pages; see `AttentionBackend.commit`. `slots[g]` int64 [T] of group g."""
        self.handle.commit([x.data_ptr() for x in slots], self._num_threads)


class NativeSteps:
    """Makes the steps of one store, quire._native.Store. Inputs are looked over once, however many steps they are given to."""

    def __init__(self, store: Any, num_threads: int) -> None:
        self._store, self._num_threads = store, num_threads
        self._inputs: StepInputs | None = None
        self._tables: tuple[Any, ...] = ()

    def __call__(self, inputs: StepInputs, num_tokens: int) -> NativeStep:
        """A step of so many tokens. Raises ValueError where a table is not as `StepInputs` says."""
        if inputs is not self._inputs:
            self._tables, self._inputs = _tables(inputs), inputs
        query_start, num_committed, num_seqs, places = self._tables
        handle = lib.Step(self._store, query_start, num_committed, num_seqs, num_tokens, places)
        return NativeStep(handle, inputs, self._num_threads)


def _tables(inputs: StepInputs) -> tuple[Any, ...]:
    """Addresses of query starts and committed lengths, how many, and of each group's table."""
    tables = [table for group in inputs.tables for table in (group.page_ids, group.page_start)]
    for x in (inputs.query_start, inputs.num_committed, *tables):
        if x.dtype != torch.int32 or not x.is_contiguous() or not x.is_cpu:
            raise ValueError(f"a step's table is {x.dtype} {tuple(x.shape)} on {x.device}: must be contiguous int32 on the CPU")
    num_seqs = inputs.num_committed.shape[0]
    starts = (inputs.query_start, *tables[1::2])
    if any(x.shape != (num_seqs + 1,) for x in starts):
        raise ValueError(f"a step of {num_seqs} sequences has tables of {[x.shape[0] for x in starts]} entries: must be one more each")
    places = [(ids.data_ptr(), start.data_ptr(), ids.shape[0]) for ids, start in zip(tables[::2], tables[1::2], strict=True)]
    return inputs.query_start.data_ptr(), inputs.num_committed.data_ptr(), num_seqs, places


def native_store(pages: torch.Tensor, places: Iterable[LayerPlace]) -> Any:
    """quire._native.Store: where each layer's rows lie in pages [P,page_bytes] uint8, which must outlive it. Raises ValueError."""
    if pages.dim() != 2 or pages.dtype != torch.uint8 or not pages.is_contiguous() or not pages.is_cpu:
        raise ValueError(f"pages {tuple(pages.shape)} {pages.dtype} on {pages.device}: must be [P,page_bytes] contiguous uint8 on the CPU")
    forms = [
        (
            x.layer_idx, x.group, x.page_size, x.num_kv_heads,
            x.k_offset, x.k.dim, x.k.code, x.k.num_bytes, x.v_offset, x.v.dim, x.v.code, x.v.num_bytes,
        )
        for x in places
    ]  # fmt: skip
    return lib.Store(pages.data_ptr(), *pages.shape, forms)
