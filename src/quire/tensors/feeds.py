"""How a step's numbers become tensors: where they lie, on the CPU; in one copy of all of them, on an accelerator."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Protocol

import torch

_ALIGNMENT = 16  # bytes: Triton compiles another kernel for a pointer that is less aligned, and a step's tensors shall meet one


class Feed(Protocol):
    """Makes a step's tensors of its numbers, one step after another."""

    def tensors(self, arrays: Sequence[array[int]]) -> tuple[torch.Tensor, ...]:
        """One tensor for each array, int64 of typecode "q" and int32 of "i", valid until the next call. If each has the length it had in the last
        call they may be the tuple of that call, written anew."""
        ...


class HostFeed:
    """On the CPU a tensor is the array's own memory: decoding goes on for many steps in which nothing but the numbers changes."""

    def __init__(self) -> None:
        self._arrays: Sequence[array[int]] = ()
        self._tensors: tuple[torch.Tensor, ...] = ()

    def tensors(self, arrays: Sequence[array[int]]) -> tuple[torch.Tensor, ...]:
        """See `Feed`."""
        if not self._arrays or [len(values) for values in arrays] != [len(values) for values in self._arrays]:
            self._arrays, self._tensors = arrays, tuple(map(_tensor, arrays))
        else:
            for kept, values in zip(self._arrays, arrays, strict=True):
                if values:
                    kept[:] = values
        return self._tensors


class CopyFeed:
    """On an accelerator they are parts of one copy of all arrays."""

    def __init__(self, where: torch.device) -> None:
        self._where = where

    def tensors(self, arrays: Sequence[array[int]]) -> tuple[torch.Tensor, ...]:
        """See `Feed`."""
        return _parts(_pinned(arrays).to(self._where, non_blocking=True), arrays)


class FixedFeed:
    """On an accelerator, always to the same place, where a captured graph reads them."""

    def __init__(self, where: torch.device, room: Sequence[array[int]]) -> None:
        """`room`: arrays of the lengths to come; the last may be shorter then."""
        flat = _flat(room)
        self._memory = torch.frombuffer(flat, dtype=torch.uint8).to(where)
        self._tensors = _parts(self._memory, room)

    def tensors(self, arrays: Sequence[array[int]]) -> tuple[torch.Tensor, ...]:
        """See `Feed`; the same tuple at each call, and behind a last array that is shorter what lay there before."""
        pinned = _pinned(arrays)
        self._memory[: len(pinned)].copy_(pinned, non_blocking=True)
        return self._tensors


def _pinned(arrays: Sequence[array[int]]) -> torch.Tensor:
    """All of them in pinned memory, new each time: torch takes it back when the tensor is gone, and gives it to nobody before a copy is done."""
    return torch.frombuffer(_flat(arrays), dtype=torch.uint8).pin_memory()


def _flat(arrays: Sequence[array[int]]) -> bytearray:
    flat = bytearray()
    for values in arrays:
        flat += memoryview(values).cast("B")
        flat += bytes(-len(flat) % _ALIGNMENT)
    return flat


def _parts(memory: torch.Tensor, arrays: Sequence[array[int]]) -> tuple[torch.Tensor, ...]:
    """A tensor for each array, where `_flat` put it."""
    tensors, at = [], 0
    for values in arrays:
        size = len(values) * values.itemsize
        tensors.append(memory[at : at + size].view(_dtype(values)))
        at += size + -size % _ALIGNMENT
    return tuple(tensors)


def _tensor(values: array[int]) -> torch.Tensor:
    return torch.frombuffer(values, dtype=_dtype(values)) if values else torch.empty(0, dtype=_dtype(values))


def _dtype(values: array[int]) -> torch.dtype:
    return torch.int64 if values.typecode == "q" else torch.int32
