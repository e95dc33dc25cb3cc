"""What a prompt would find in the cache, and why not more: looked up without taking or holding anything."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal, NamedTuple

from quire.policy.cache import PageCache
from quire.policy.prefix import PrefixKey, pack
from quire.policy.sequence import Sequence

MissReason = Literal["never seen", "evicted", "other namespace"]


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

    A page is known by all its tokens, so what differs within one is found by its first tokens, and an incomplete page counts as never seen.
    """
    if num_cached >= seq.num_known - 1 or not cache.shares(seq):
        return None
    unit = cache.unit
    i = num_cached // unit
    if (i + 1) * unit > seq.num_known:
        return Miss(num_cached, "never seen")
    key = seq.chain(unit, i + 1, cache.hash_bytes)[i + 1]
    # A key that is there and was no hit lacks the pages that a window would need.
    if cache.index.find(key) is not None or cache.index.was_evicted(key):
        return Miss(num_cached, "evicted")
    if any(cache.index.find(_under(cache, root, seq, i + 1)) is not None for root in cache.namespaces.others(seq.root)):
        return Miss(num_cached, "other namespace")
    return Miss(num_cached, "never seen")


def _under(cache: PageCache, root: PrefixKey, seq: Sequence, num_pages: int) -> PrefixKey:
    """The key of the sequence's page `num_pages` - 1, were it in another namespace."""
    key = root
    for start in range(0, num_pages * cache.unit, cache.unit):
        key = PrefixKey(key, pack(seq.tokens[start : start + cache.unit]), cache.hash_bytes)
    return key
