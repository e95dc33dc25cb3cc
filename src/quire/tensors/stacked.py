"""The stacked layout seen as one tensor: slots of the whole context, left-aligned, for those who want to read the cache themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quire.errors import ConfigError
from quire.tensors.store import PageStore


@dataclass(frozen=True, slots=True)
class StackedView:
    """Keys [L, S, Hkv, len, Dk] and values [L, S, Hkv, len, Dv] as views of the cache itself, in its dtype, layers in the model's order.

    `slots[(request_id, index)]` is the S of an open sequence and how many of its positions are in the cache. What lies beyond, and in slots of
    no open sequence, is anything. Steps go on writing to it; never write to it yourself.
    """

    keys: torch.Tensor
    values: torch.Tensor
    slots: dict[tuple[str, int], tuple[int, int]]


def stacked_view(store: PageStore, slots: dict[tuple[str, int], tuple[int, int]]) -> StackedView:
    """The view of a store whose pages are slots.

    Raises:
        ConfigError: layers of several kinds, or packed ones, have no such view.
    """
    if store.states:
        raise ConfigError("cache_layout='stacked': layers that carry a state have no such view")
    places = [store.places[layer_idx] for layer_idx in sorted(store.places)]
    first, dtype = places[0], places[0].k.dtype
    alike = {(place.group, place.num_kv_heads, place.k, place.v) for place in places}
    steps = {later.k_offset - one.k_offset for one, later in zip(places, places[1:], strict=False)}
    if dtype is None or first.v.dtype is None or len(alike) > 1 or len(steps) > 1:
        raise ConfigError("cache_layout='stacked': a view as one tensor needs layers of one kind, all of one shape, and no kv_codec")
    pages = store.pages.view(dtype)
    layer_step = next(iter(steps), 0) // dtype.itemsize

    def view(offset: int, dim: int) -> torch.Tensor:
        size = (len(places), pages.shape[0], first.num_kv_heads, first.page_size, dim)
        return pages.as_strided(size, (layer_step, pages.stride(0), first.page_size * dim, dim, 1), pages.storage_offset() + offset // dtype.itemsize)

    return StackedView(view(first.k_offset, first.k.dim), view(first.v_offset, first.v.dim), slots)
