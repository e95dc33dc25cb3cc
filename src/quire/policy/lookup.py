"""What a prompt would find in the cache, and why not more: looked up without taking or holding anything."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal, NamedTuple

from quire.policy.cache import PageCache
from quire.policy.prefix import PrefixKey, pack
from quire.policy.sequence import Sequence

MissReason = Literal["never seen", "not kept", "evicted", "other namespace"]


@dataclass(frozen=True, slots=True)
class Miss:
    """The first token that was not found, of those that could have been, and why."""

    index: int
    reason: MissReason


class Found(NamedTuple):
    """What a sequence would find, were it to start now: tokens, pages it would still take for all its tokens, and whether they could be had."""

    num_tokens: int
    pages_needed: int
    fits: bool


def find(cache: PageCache, seq: Sequence) -> Found:
    """Look a sequence that holds nothing up."""
    needed, limit, pool = cache.pages_to_finish(seq.num_known), seq.num_known - 1, cache.pool
    if not cache.shares(seq):
        return Found(0, needed, needed <= pool.num_available)
    found, length = cache.finder.longest(seq, limit)
    hits = []
    for group, table in zip(cache.groups, found, strict=True):
        hits += table[group.first_kept(length, cache.unit) : length // group.page_size]
    needed = max(0, needed - len(hits))
    available = pool.num_available - _num_nobodys(cache, hits)
    sources, num_tokens = cache.part(seq, length, limit)
    if available - _num_nobodys(cache, sources) < len(sources):  # no room for a copy beside what it would be of
        num_tokens = 0
    return Found(length + num_tokens, needed, needed <= available)


def _num_nobodys(cache: PageCache, page_ids: Seq[int]) -> int:
    return sum(cache.pool.references(page_id) == 0 for page_id in page_ids)


def find_miss(cache: PageCache, seq: Sequence, num_cached: int) -> Miss | None:
    """Why a sequence found `num_cached` tokens and not all but its last; None if it did.

    A page is known by all its tokens, so what differs within one is found by its first tokens, and an incomplete page counts as never seen; where a
    part of a page is no hit, it is told whether one is there that begins so.
    """
    if num_cached >= seq.num_known - 1 or not cache.shares(seq):
        return None
    return Miss(num_cached, _reason(cache, seq, num_cached))


def _reason(cache: PageCache, seq: Sequence, num_cached: int) -> MissReason:
    unit, index = cache.unit, cache.index
    i = num_cached // unit
    if (i + 1) * unit <= seq.num_known:
        seen = _seen(cache, seq, i)
        if any(index.was_evicted(key) for key in seen):
            return "evicted"
        if index.find(seen[-1]) is not None:  # and was no hit: it lacks a state, or pages that a window would need
            return "not kept"
        if any(index.find(_under(cache, root, seq, i + 1)) is not None for root in cache.namespaces.others(seq.root)):
            return "other namespace"
    if not cache.keeps_parts:
        begins = pack(seq.tokens[i * unit : num_cached + 1])
        if index.goes_on(seq.parent_of(unit, i, cache.hash_bytes), begins):
            return "not kept"
    return "never seen"


def _seen(cache: PageCache, seq: Sequence, i: int) -> list[PrefixKey]:
    """The keys of page i of a sequence, the last, and of the pages before it without which it is no hit, though those up to it may be none."""
    end = (i + 1) * cache.unit
    first = min([i * cache.unit, *(group.first_visible(end) for group in cache.groups if group.kind != "full")])
    return seq.chain(cache.unit, i + 1, cache.hash_bytes)[first // cache.unit + 1 : i + 2]


def _under(cache: PageCache, root: PrefixKey, seq: Sequence, num_pages: int) -> PrefixKey:
    """The key of the sequence's page `num_pages` - 1, were it in another namespace."""
    key = root
    for start in range(0, num_pages * cache.unit, cache.unit):
        key = PrefixKey(key, pack(seq.tokens[start : start + cache.unit]), cache.hash_bytes)
    return key
