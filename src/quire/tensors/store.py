"""Where keys and values lie, and the one moment at which they are written.

A step never writes the cache: layers stage their keys and values, attention reads pages and staged values together, and when the whole step has
succeeded `StagedStep.commit` writes all layers at once. A step that fails is simply dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from quire.tensors.attention.base import AttentionBackend, LayerPlace, Mask, StepInputs


class PageStore:
    """All pages of all groups as one tensor [P, E], and where each layer's share of a page is.

    Memory is taken from the system as pages are first written, not when the store is made.
    """

    def __init__(self, places: Iterable[LayerPlace], num_pages: int, page_elements: int, dtype: torch.dtype, backend: AttentionBackend) -> None:
        self.places = {place.layer_idx: place for place in places}
        self.pages = torch.empty(num_pages, page_elements, dtype=dtype)
        self.backend = backend

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.pages.shape[1] * self.pages.element_size()

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages, (source, target) each."""
        for source, target in pairs:
            self.pages[target].copy_(self.pages[source])


class StagedStep:
    """One step over a store: what a running forward calls for each of its attention layers."""

    def __init__(self, store: PageStore, inputs: StepInputs, slots: Sequence[torch.Tensor]) -> None:
        """`slots[g]` int64 [T]: where each packed token of group g goes (page * B + offset), -1 for nowhere."""
        self._store, self._inputs, self._slots = store, inputs, slots
        self._staged: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Stage k [T,Hkv,Dk] and v [T,Hkv,Dv], and attend q [T,Hq,Dk] to the cache and to them; returns [T,Hq,Dv]."""
        k, v = _own(k), _own(v)
        self._staged[layer_idx] = (k, v)
        return self._store.backend.attend(q, k, v, self._store.pages, self._store.places[layer_idx], self._inputs, mask)

    def commit(self) -> None:
        """Write what was staged, for all layers. Called once, when everything else in the step has succeeded."""
        if self._staged.keys() != self._store.places.keys():
            missing = sorted(self._store.places.keys() - self._staged.keys())
            raise RuntimeError(f"layers {missing} staged nothing in this step")
        for layer_idx, (k, v) in self._staged.items():
            place = self._store.places[layer_idx]
            self._store.backend.commit(k, v, self._store.pages, place, self._slots[place.group])


def _own(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied if it is a small part of a larger tensor that staging would keep alive (fused QKV projections)."""
    if x.untyped_storage().nbytes() <= 2 * x.numel() * x.element_size():
        return x
    return x.clone(memory_format=torch.contiguous_format)
