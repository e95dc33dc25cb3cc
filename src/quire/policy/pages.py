"""The one pool of equal-sized pages: reference counts, a free list, and the order in which cached pages leave.

A page that is not retired (given back to the system) is in exactly one state:

    free ──take──> held (references >= 1) ──last release──> cached, if the prefix index knows it ──take──> held by another
      ^                      ^                                │
      └──────────────────────┼── last release, not indexed ───┤
                             └────────── retain (a hit) ──────┘

Cached pages leave least recently used first. A sequence releases its tail before its head, so heads outlive the tails that need them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Container, Iterable, Sequence
from typing import Protocol

from quire.errors import IntegrityError

STATES = ("free", "held", "shared", "cached", "pinned", "moving", "retired")
FREE, HELD, SHARED, CACHED, PINNED, MOVING, RETIRED = range(len(STATES))
STATE_BITS = 0x07
PIN_MARK = 0x08  # beside any state of a page that is pinned
DISK_MARK = 0x10  # beside any state of a page that lies on disk too


class Contents(Protocol):
    """What knows whether a page's contents may still be hit, and must be told before they go."""

    def __contains__(self, page_id: int) -> bool: ...
    def forget(self, page_ids: Iterable[int]) -> None: ...
    def evict(self, page_ids: Iterable[int]) -> None: ...


class PagePool:
    """Owns every page id in [0, num_pages). `contents` evicts a cached page just before it is given to someone else."""

    def __init__(self, num_pages: int, contents: Contents) -> None:
        self.num_pages = num_pages
        self._contents = contents
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._retired: list[int] = []
        self._aside: Counter[int] = Counter()

    @property
    def num_usable(self) -> int:
        """Pages that are not retired."""
        return self.num_pages - len(self._retired)

    @property
    def num_free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages nobody holds whose contents may still be hit."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Pages that can be taken now."""
        return len(self._free) + len(self._cached)

    @property
    def num_held(self) -> int:
        """Pages with at least one reference."""
        return self.num_usable - self.num_available

    def references(self, page_id: int) -> int:
        """How many hold the page."""
        return self._references[page_id]

    def take(self, num_pages: int) -> list[int]:
        """Pages with one reference each and no contents; evicts the least recently used cached pages when too few are free.

        The caller has checked `num_available`.
        """
        free = self._free
        num_free = min(num_pages, len(free))
        pages = free[: -num_free - 1 : -1]
        del free[len(free) - num_free :]
        if num_free < num_pages:
            evicted = [self._cached.popitem(last=False)[0] for _ in range(num_pages - num_free)]
            self._contents.evict(evicted)
            pages += evicted
        for page_id in pages:
            self._references[page_id] = 1
        return pages

    def retain(self, page_ids: Iterable[int]) -> None:
        """One more holder of each page; all are held or cached."""
        references = self._references
        for page_id in page_ids:
            if references[page_id] == 0:
                del self._cached[page_id]
            references[page_id] += 1

    def release(self, page_ids: Iterable[int], *, cold: bool = False) -> None:
        """One holder less of each page. The last one leaves it cached (`cold`: next to be evicted) if its contents are known, else free."""
        references, cached = self._references, self._cached
        for page_id in page_ids:
            references[page_id] -= 1
            if references[page_id] > 0:
                continue
            if page_id not in self._contents:
                self._free.append(page_id)
                continue
            cached[page_id] = None
            if cold:
                cached.move_to_end(page_id, last=False)

    def touch(self, page_ids: Iterable[int]) -> None:
        """Of these pages, those that are cached count as used now, the last of them most."""
        for page_id in page_ids:
            if page_id in self._cached:
                self._cached.move_to_end(page_id)

    def cached_pages(self) -> Iterable[int]:
        """The pages nobody holds whose contents may still be hit, next to leave first."""
        return self._cached.keys()

    def drop(self, page_ids: Sequence[int]) -> None:
        """These pages stand for nothing any more; those that are cached become free."""
        self._contents.forget(page_ids)
        cached = [page_id for page_id in page_ids if page_id in self._cached]
        for page_id in cached:
            del self._cached[page_id]
        self._free += cached

    @property
    def num_set_aside(self) -> int:
        """Pages held by others than sequences: pins, and what is on its way to or from the tier below."""
        return len(self._aside)

    def set_aside(self, page_ids: Sequence[int]) -> None:
        """Hold pages that are held or cached, so that they are not evicted."""
        self.retain(page_ids)
        self._aside.update(page_ids)

    def take_aside(self, num_pages: int) -> list[int]:
        """Pages to be filled by someone else; fewer, or none, if there are not as many."""
        page_ids = self.take(min(num_pages, self.num_available))
        self._aside.update(page_ids)
        return page_ids

    def put_back(self, page_ids: Sequence[int]) -> None:
        """Let pages go that were set or taken aside."""
        self._aside -= Counter(page_ids)
        self.release(page_ids)

    def references_aside(self, page_id: int) -> int:
        """How many of those who hold the page have set it aside."""
        return self._aside[page_id]

    def num_cached_aside(self, pinned: Container[int]) -> int:
        """Pages whose contents may still be hit and that are set aside but not `pinned`, with no sequence that holds them: on their way to the tier
        below, or waited for by a hit."""
        return sum(self._references[p] == n and p in self._contents and p not in pinned for p, n in self._aside.items())

    def states(self, pinned: Container[int]) -> bytes:
        """Of each page its place in STATES, with PIN_MARK where it is `pinned`: held by one sequence or shared by several, else pinned, or moving to
        or from the tier below, else cached, free or retired. Made by passes over bytes: asking page by page takes longer than all of this."""
        try:
            counts = bytes(self._references)
        except ValueError:  # one page with more than 255 holders
            counts = bytes(min(count, 255) for count in self._references)
        # Nobody holds a free or a cached page; what is written one by one are those of which there are fewer.
        few_are_free = len(self._free) < len(self._cached)
        base, rarer, others = (CACHED, FREE, self._free) if few_are_free else (FREE, CACHED, self._cached)
        states = bytearray(counts.translate(bytes([base, HELD]) + bytes([SHARED]) * 254))
        for page_id in others:
            states[page_id] = rarer
        for page_id in self._retired:
            states[page_id] = RETIRED
        for page_id, aside in self._aside.items():
            holders, is_pinned = self._references[page_id] - aside, page_id in pinned
            alone = PINNED if is_pinned else MOVING
            states[page_id] = (alone if holders == 0 else HELD if holders == 1 else SHARED) | (PIN_MARK if is_pinned else 0)
        return bytes(states)

    def retire(self, num_pages: int) -> list[int]:
        """Take up to `num_pages` pages that nobody holds out of use, free ones first, and return them."""
        page_ids = self.take(min(num_pages, self.num_available))
        for page_id in page_ids:
            self._references[page_id] = 0
        self._retired += page_ids
        return page_ids

    def restore(self, num_pages: int) -> None:
        """Bring up to `num_pages` retired pages back into use, free."""
        num_pages = min(num_pages, len(self._retired))
        self._free += self._retired[len(self._retired) - num_pages :]
        del self._retired[len(self._retired) - num_pages :]

    def check_integrity(self, holders: list[int]) -> None:
        """Raise IntegrityError unless free + held + cached + retired = all, disjoint, and references equal `holders` (counted by the caller)."""
        free, cached = {*self._free, *self._retired}, set(self._cached)
        if len(free) != len(self._free) + len(self._retired) or free & cached:
            raise IntegrityError("a page is free or retired twice, or one of them and cached")
        for page_id, count in enumerate(holders):
            if self._references[page_id] != count:
                raise IntegrityError(f"page {page_id} has {self._references[page_id]} references and {count} holders")
            if (count == 0) != (page_id in free or page_id in cached):
                raise IntegrityError(f"page {page_id} with {count} holders is {'not ' if count == 0 else ''}in the free list or the cache")
