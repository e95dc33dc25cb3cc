"""Arranges layers in groups whose pages cost the same bytes, so that one pool serves them all.

Layers of one kind (same mask, same geometry) share page tables. With several kinds, each kind is cut into groups of the same number of
layers, so that a page of any group fills the same number of bytes (the idea is Jenga's, Zhang et al. 2025):

    18 layers, s = sliding, F = full:   s s s s s F  s s s s s F  s s s s s F
    six groups of three layers:         [sss] [sss] [sss] [sss] [sss] [FFF]        one page = 3 layers x B tokens, in every group

Where kinds differ in geometry, the tokens a page holds differ instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

ALIGNMENT = 4  # bytes; of the widest plain element
MAX_PADDING = 0.125  # of all layer places may stay empty in exchange for fewer, larger groups


class LayerShape(Protocol):
    """What of a layer decides its group. `window` and `chunk` are 0 where there is none; `k_bytes` and `v_bytes` are those of one token and head,
    `state_bytes` those of a state that it keeps in place of them, one a page."""

    @property
    def layer_idx(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def k_bytes(self) -> int: ...
    @property
    def v_bytes(self) -> int: ...
    @property
    def window(self) -> int: ...
    @property
    def chunk(self) -> int: ...
    @property
    def state_bytes(self) -> int: ...


class Place(NamedTuple):
    """Where in a page of its group one layer's rows of K [Hkv, B] and of V [Hkv, B] begin, in bytes."""

    layer_idx: int
    k_offset: int
    v_offset: int


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that share a page table. A page holds `page_size` tokens of all of them."""

    group_id: int
    page_size: int
    window: int
    chunk: int
    places: tuple[Place, ...]
    carries: bool = False  # a state a page, of the last of its tokens: no part of a page stands for fewer of them

    def first_visible(self, position: int) -> int:
        """The lowest position a query at `position` may see."""
        if self.window:
            return max(0, position - self.window + 1)
        return position - position % self.chunk if self.chunk else 0

    def first_kept(self, position: int, unit: int) -> int:
        """The first page that is kept when a query at `position` comes next: all that one at the last multiple of `unit`, a hit, may see."""
        return self.first_visible(position - position % unit) // self.page_size

    def pages_to_finish(self, num_tokens: int, unit: int) -> int:
        """The most pages a sequence of `num_tokens` may hold at once, however it is cut into steps."""
        pages, reach = -(-num_tokens // self.page_size), self.window or self.chunk
        if not reach:
            return pages
        kept = -(-(unit - 1) // self.page_size) + -(-(reach - 1) // self.page_size)
        return min(pages, 2 * kept + 1)  # kept before a step, one not yet given back, and kept after a step that moved the window wholly

    @property
    def kind(self) -> str:
        """`full`, `sliding`, `chunked` or `carried`."""
        return "carried" if self.carries else "sliding" if self.window else "chunked" if self.chunk else "full"


class Need(NamedTuple):
    """What the tables of alike groups must have: `end` entries, of which they have `have`; of new ones those before `first` may be without a page."""

    group_ids: list[int]
    have: int
    first: int
    end: int

    @property
    def num_pages(self) -> int:
        """Pages this takes, at least."""
        return (self.end - self.first) * len(self.group_ids)


class Alike(NamedTuple):
    """Groups with one page size and one mask. Their tables have one shape: what is decided for the `first` of them holds for all."""

    first: Group
    group_ids: list[int]

    def need(self, have: int, num_tokens: int, num_sure: int, unit: int) -> Need:
        """What tables of `have` entries must have for so many committed tokens; not the pages that the window will have left when `num_sure` are."""
        end = max(have, -(-num_tokens // self.first.page_size))
        return Need(self.group_ids, have, min(max(have, self.first.first_kept(num_sure, unit)), end), end)


def alike(groups: Sequence[Group]) -> list[Alike]:
    """The groups, those together that are alike."""
    found: dict[tuple[int, int, int], Alike] = {}
    for group in groups:
        found.setdefault((group.page_size, group.window, group.chunk), Alike(group, [])).group_ids.append(group.group_id)
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Arrangement:
    """All groups, and the bytes every page has."""

    groups: tuple[Group, ...]
    page_bytes: int

    def bytes_per_token(self) -> float:
        """Bytes of cache that one more token of a long sequence costs while no window has moved."""
        return sum(self.page_bytes / group.page_size for group in self.groups)


def arrange(layers: Sequence[LayerShape], page_size: int) -> Arrangement:
    """Group `layers`; full-attention pages hold `page_size` tokens (pages of the first kind, where there is no full one)."""
    kinds: dict[tuple[int, ...], list[LayerShape]] = {}
    for layer in sorted(layers, key=lambda x: (bool(x.window), bool(x.chunk), x.layer_idx)):
        kinds.setdefault((layer.window, layer.chunk, layer.num_kv_heads, layer.k_bytes, layer.v_bytes, layer.state_bytes), []).append(layer)
    members = list(kinds.values())
    per_group = _layers_per_group([len(m) for m in members])
    places = [min(per_group, len(m)) for m in members]
    page_bytes = max(places[0] * _layer_bytes(members[0][0], page_size), *(n * _layer_bytes(m[0], 1) for n, m in zip(places, members, strict=True)))
    groups: list[Group] = []
    for kind, n in zip(members, places, strict=True):
        tokens = _tokens_of(kind[0], page_bytes // n) or (groups[0].page_size if groups else page_size)
        for start in range(0, len(kind), per_group):
            group = tuple(_place(layer, i, tokens) for i, layer in enumerate(kind[start : start + per_group]))
            groups.append(Group(len(groups), tokens, kind[0].window, kind[0].chunk, group, bool(kind[0].state_bytes)))
    return Arrangement(tuple(groups), page_bytes)


def in_one_group(layers: Sequence[LayerShape], page_size: int) -> Arrangement:
    """All layers under one page table that keeps every page, whatever their windows: for a caller who keeps the table."""
    places, offset = [], 0
    for layer in layers:
        places.append(Place(layer.layer_idx, offset, offset + _rows_bytes(layer, layer.k_bytes, page_size)))
        offset += _layer_bytes(layer, page_size)
    return Arrangement((Group(0, page_size, 0, 0, tuple(places)),), offset)


def _rows_bytes(layer: LayerShape, row_bytes: int, tokens: int) -> int:
    """Bytes of all heads' rows of that many tokens, rounded up so that plain elements of any dtype are aligned behind them."""
    return -(-tokens * layer.num_kv_heads * row_bytes // ALIGNMENT) * ALIGNMENT


def _layer_bytes(layer: LayerShape, tokens: int) -> int:
    return _rows_bytes(layer, layer.k_bytes, tokens) + _rows_bytes(layer, layer.v_bytes, tokens) + layer.state_bytes


def _tokens_of(layer: LayerShape, num_bytes: int) -> int:
    """How many tokens' rows go into so many bytes; 0 for a state, into which any number does."""
    if layer.state_bytes:
        return 0
    tokens = num_bytes // (layer.num_kv_heads * (layer.k_bytes + layer.v_bytes))
    while _layer_bytes(layer, tokens) > num_bytes:
        tokens -= 1
    return tokens


def _place(layer: LayerShape, index: int, tokens: int) -> Place:
    base = index * _layer_bytes(layer, tokens)
    return Place(layer.layer_idx, base, base + _rows_bytes(layer, layer.k_bytes, tokens))


def _layers_per_group(counts: list[int]) -> int:
    """The largest group size that leaves at most MAX_PADDING of the places empty."""
    if len(counts) == 1:
        return counts[0]

    def padding(size: int) -> float:
        return sum(-count % size for count in counts) / sum(counts)

    return max(size for size in range(1, max(counts) + 1) if padding(size) <= MAX_PADDING and size <= min(counts))
