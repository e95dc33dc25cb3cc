"""Where keys and values lie, and the one moment at which they are written.

A step never writes the cache: layers stage their keys and values, attention reads pages and staged values together, and when the whole step has
succeeded `StagedStep.commit` writes all layers at once. A step that fails is simply dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from quire.errors import ConfigError
from quire.policy.copies import PageCopy
from quire.policy.groups import Arrangement, Group, Place
from quire.tensors.attention.base import AttentionBackend, LayerPlace, Mask, StatePlace, StepInputs, page_rows
from quire.tensors.attention.carried import CarriedStates, Recurrence
from quire.tensors.attention.convolve import Reach, convolve, reach
from quire.tensors.codec import RowFormat, row_format
from quire.tensors.device import CPU, Device
from quire.tensors.models.geometry import LayerGeometry


@dataclass(frozen=True, slots=True)
class CachedLayer:
    """What the cache must know of one layer: how its rows of keys and values lie, or how long its state is, and what decides its group. `window`,
    `chunk` and `state_bytes` 0: none."""

    layer_idx: int
    num_kv_heads: int
    k: RowFormat
    v: RowFormat
    window: int
    chunk: int
    state_bytes: int = 0

    @property
    def k_bytes(self) -> int:
        """Bytes of one token's keys of one head."""
        return self.k.num_bytes

    @property
    def v_bytes(self) -> int:
        """Bytes of one token's values of one head."""
        return self.v.num_bytes


def cached_layers(layers: Iterable[LayerGeometry], dtype: torch.dtype, k_codec: str | None, v_codec: str | None) -> list[CachedLayer]:
    """Layers whose keys and values are of `dtype`, as they are cached under codecs "int8", "int4" or None; what other layers keep is plain."""

    def cached(x: LayerGeometry) -> CachedLayer:
        k, v = (k_codec, v_codec) if x.v_dim else (None, None)
        rows = row_format(k, dtype, x.k_dim), row_format(v, dtype, x.v_dim)
        return CachedLayer(x.layer_idx, x.num_kv_heads, *rows, x.window, x.chunk, x.state_bytes)

    return [cached(x) for x in layers]


def layer_places(arrangement: Arrangement, layers: Iterable[CachedLayer]) -> list[LayerPlace | StatePlace]:
    """Where each layer's rows lie, or its state, as `arrange` put them."""
    shapes = {layer.layer_idx: layer for layer in layers}

    def placed(group: Group, at: Place) -> LayerPlace | StatePlace:
        shape, where = shapes[at.layer_idx], (at.layer_idx, group.group_id, group.page_size)
        if shape.state_bytes:
            return StatePlace(*where, at.k_offset, shape.state_bytes)
        return LayerPlace(*where, shape.num_kv_heads, shape.k, shape.v, at.k_offset, at.v_offset)

    return [placed(group, at) for group in arrangement.groups for at in group.places]


class PageStore:
    """All pages of all groups as one tensor [P, page_bytes] of bytes, and where each layer's share of a page is.

    The CPU's memory is taken from the system as pages are first written or when `preallocate` is called, an accelerator's when the store is made.
    """

    def __init__(
        self, places: Iterable[LayerPlace | StatePlace], num_pages: int, page_bytes: int, backend: AttentionBackend, device: Device = CPU
    ) -> None:
        """Raises ConfigError where the device has no room for so many pages."""
        every = list(places)
        self.places = {place.layer_idx: place for place in every if isinstance(place, LayerPlace)}
        self.states = {place.layer_idx: place for place in every if isinstance(place, StatePlace)}
        self.pages = device.room_for_pages(num_pages * page_bytes).view(num_pages, page_bytes)
        self.backend, self.device = backend, device
        self.program_steps = backend.program_steps(self.pages, self.places.values())

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.pages.shape[1]

    def preallocate(self, reserve_bytes: int, num_threads: int) -> None:
        """Take all pages' memory now. Raises ConfigError where that leaves others less than `reserve_bytes`; then nothing is taken."""
        most = max(0, self.device.available_bytes() - reserve_bytes)
        if self.pages.nbytes > most:
            raise ConfigError(
                f"preallocate=True: the pool of {self.pages.nbytes} bytes must be at most {most} (cache_bytes), available less reserve_bytes"
            )
        self.device.preallocate(self.pages, num_threads)

    def copy_pages(self, copies: Iterable[PageCopy]) -> None:
        """Copy the first tokens of pages; of a group that carries states, those."""
        for source, target, group_id, num_tokens in copies:
            for state in [state for state in self.states.values() if state.group == group_id]:
                self.pages[target, state.offset : state.offset + state.num_bytes] = self.pages[source, state.offset : state.offset + state.num_bytes]
            for place in [place for place in self.places.values() if place.group == group_id]:
                for rows in page_rows(self.pages, place):
                    rows[target, :, :num_tokens] = rows[source, :, :num_tokens]

    def bytes_of(self, page_id: int) -> memoryview:
        """One page's memory, on the CPU alone."""
        return self.pages[page_id].numpy().data

    def give_back(self, page_ids: Iterable[int]) -> None:
        """Let others have these pages' memory, where the device can."""
        for page_id in page_ids:
            self.device.give_back(self.pages[page_id])


class StagedStep:
    """One step over a store: the `AttentionStep` of the engine."""

    def __init__(self, store: PageStore, inputs: StepInputs, slots: Sequence[torch.Tensor]) -> None:
        """`slots[g]` int64 [T]: where each packed token of group g goes (page * B + offset), -1 for nowhere."""
        self._store, self._inputs, self._slots = store, inputs, slots
        self._staged: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._reach: dict[tuple[int, int], Reach] = {}
        self._carried = CarriedStates(store.pages, inputs, slots, store.backend.carried)
        num_tokens = slots[0].shape[0] if slots else 0
        self.of_programs = store.program_steps(inputs, num_tokens) if store.program_steps is not None else None  # see `AttentionStep`

    def attend(self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Stage k [T,Hkv,Dk] and v [T,Hkv,Dv], and attend q [T,Hq,Dk] to the cache and to them; returns [T,Hq,Dv].

        They are staged in the format of pages, so that a key is the same number in the step that computes it and in all later ones.
        """
        place, backend = self._store.places[layer_idx], self._store.backend
        k = _own(backend.encode(k, place.k))
        v = _own(backend.encode(v, place.v))
        self._staged[layer_idx] = (k, v)
        return backend.attend(q, k, v, self._store.pages, place, self._inputs, mask)

    def convolve(self, layer_idx: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Stage x [T,C], and convolve it along each sequence, whose earlier rows are in the cache; returns [T,C]."""
        place, width = self._store.places[layer_idx], weight.shape[1]
        self._staged[layer_idx] = (x.unsqueeze(1), x.new_empty(x.shape[0], 1, 0))
        if (place.group, width) not in self._reach:
            self._reach[place.group, width] = reach(self._inputs, place, width, x.shape[0])
        return convolve(x, weight, bias, self._store.pages, place, self._reach[place.group, width])

    def convolve_carried(self, layer_idx: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Convolve x [T,C] along each sequence, and stage its last rows as part of the layer's state; returns [T,C]."""
        return self._carried.convolve(self._store.states[layer_idx], x, weight, bias)

    def recur(self, layer_idx: int, given: Recurrence) -> torch.Tensor:
        """Go on from the states in the cache, and stage those behind the step; returns [T,Hv,Dv]."""
        return self._carried.recur(self._store.states[layer_idx], given)

    def commit(self) -> None:
        """Write what was staged, for all layers. Called once, when everything else in the step has succeeded."""
        programs, store = self.of_programs, self._store
        staged = self._staged.keys() | self._carried.layers | set(programs.staged_layers if programs is not None else ())
        missing = (store.places.keys() | store.states.keys()) - staged
        if missing:
            raise RuntimeError(f"layers {sorted(missing)} staged nothing in this step")
        if programs is not None:
            programs.commit(self._slots)
        self._carried.commit()
        for layer_idx, (k, v) in self._staged.items():
            place = self._store.places[layer_idx]
            self._store.backend.commit(k, v, self._store.pages, place, self._slots[place.group])


def _own(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied if it is a small part of a larger tensor that staging would keep alive (fused QKV projections)."""
    if x.untyped_storage().nbytes() <= 2 * x.numel() * x.element_size():
        return x
    return x.clone(memory_format=torch.contiguous_format)
