"""How much memory a step's tensors take at once, found by watching two forwards of different lengths in which nothing is multiplied."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quire.tensors.models.facts import ordinary_tokens
from quire.tensors.models.geometry import NoAttention, NoProducts
from quire.tensors.models.model import CausalModel

NUM_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Workspace:
    """Bytes that the tensors of a forward take at their most: `fixed`, and `per_token` of its packed tokens, keys, values and states staged included,
    and `per_row` of logits, which are as many as its sequences at least: each stages its states behind its last token, too."""

    fixed: int
    per_token: int
    per_row: int

    def bytes(self, num_tokens: int, num_rows: int) -> int:
        """For a step of so many tokens that gives so many rows of logits."""
        return self.fixed + self.per_token * num_tokens + self.per_row * num_rows

    def most_tokens(self, num_bytes: int, num_tokens: int, num_rows: int) -> int:
        """The most tokens, up to `num_tokens`, that a step may have within `num_bytes`, when each of the first `num_rows` gives logits; may be 0."""
        low, high = 0, num_tokens
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.bytes(middle, min(middle, num_rows)) <= num_bytes else (low, middle - 1)
        return low


class LiveBytes(TorchDispatchMode):
    """While on, counts the bytes of storages that operators make. `peak` is the most that were alive at once.

    What an operator takes and gives back within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._tensors: dict[int, int] = {}  # storage address -> tensors on it that are alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in _tensors(out):
            self._note(x, (args, kwargs))
        return out

    def _note(self, x: torch.Tensor, given: object) -> None:
        storage = x.untyped_storage()
        address, num_bytes = storage.data_ptr(), storage.nbytes()
        if address not in self._tensors:
            if not num_bytes or any(address == y.untyped_storage().data_ptr() for y in _tensors(given)):  # a view of what was there before
                return
            self._tensors[address] = 0
            self.now += num_bytes
            self.peak = max(self.peak, self.now)
        self._tensors[address] += 1
        weakref.finalize(x, self._gone, address, num_bytes).atexit = False

    def _gone(self, address: int, num_bytes: int) -> None:
        self._tensors[address] -= 1
        if not self._tensors[address]:
            del self._tensors[address]
            self.now -= num_bytes


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """Those in an operator's arguments or results; torch's own walk through them took longer than all else here."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def measure(model: CausalModel, page_size: int = 1) -> Workspace:
    """The workspace of a model's forwards, which stage a state for each page of so many tokens. Of layers that are one program, in a model without
    code of its own, the first is watched, and the last of all: what goes into the very first is held by the model, too, and would be missed."""
    programs = model.lowered if not model.owned else None
    alike = [(layer, forward) for layer, forward in programs.alike.items() if forward.passes] if programs is not None else []
    with programs.first_of_each() if programs is not None else nullcontext(), model.with_products(NoProducts(), forwards=dict(alike[:-1])):
        short, long = _peak(model, NUM_TOKENS), _peak(model, 2 * NUM_TOKENS)
    per_token = -(-(long - short) // NUM_TOKENS)
    sizes = [layer.state_bytes for layer in model.layers]
    staged, at_once = sum(sizes), max(sizes)  # by all layers; and one that runs has rows of its convolution twice
    fixed, per_row = max(0, short - per_token * NUM_TOKENS), model.vocab_size * model.dtype.itemsize + staged + at_once
    return Workspace(fixed, per_token - -staged // page_size, per_row)


def _peak(model: CausalModel, num_tokens: int) -> int:
    token = ordinary_tokens(model.transformers_model.config, 64)[0]
    positions = torch.arange(num_tokens, device=model.where) % model.context_len
    live = LiveBytes()
    with live:
        model.forward(NoAttention(), torch.full_like(positions, token), positions, positions[:0])
    staged = sum(layer.num_kv_heads * (layer.k_dim + layer.v_dim) for layer in model.layers) * model.dtype.itemsize
    return live.peak + staged * num_tokens  # by the time that the last layer runs, all have staged
