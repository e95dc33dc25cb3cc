"""The one pool of equal-sized pages: reference counts, a free list, and the order in which cached pages leave.

A page is in exactly one state:

    free ──take──> held (references >= 1) ──last release──> cached, if the prefix index knows it ──take──> held by another
      ^                      ^                                │
      └──────────────────────┼── last release, not indexed ───┤
                             └────────── retain (a hit) ──────┘

Cached pages leave least recently used first. A sequence releases its tail before its head, so heads outlive the tails that need them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from quire.errors import IntegrityError


class PagePool:
    """Owns every page id in [0, num_pages). `forget` is called with a cached page just before it is given to someone else."""

    def __init__(self, num_pages: int, forget: Callable[[int], None]) -> None:
        self.num_pages = num_pages
        self._forget = forget
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

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
        return self.num_pages - self.num_available

    def references(self, page_id: int) -> int:
        """How many hold the page."""
        return self._references[page_id]

    def take(self) -> int:
        """A page with one reference and no contents; evicts the least recently used cached page when none is free.

        The caller has checked `num_available`.
        """
        if self._free:
            page_id = self._free.pop()
        else:
            page_id, _ = self._cached.popitem(last=False)
            self._forget(page_id)
        self._references[page_id] = 1
        return page_id

    def retain(self, page_id: int) -> None:
        """One more holder of a page that is held or cached."""
        if self._references[page_id] == 0:
            del self._cached[page_id]
        self._references[page_id] += 1

    def release(self, page_id: int, *, cached: bool, cold: bool = False) -> None:
        """One holder less. The last one leaves the page cached (`cold`: next to be evicted) or free."""
        self._references[page_id] -= 1
        if self._references[page_id] > 0:
            return
        if cached:
            self._cached[page_id] = None
            if cold:
                self._cached.move_to_end(page_id, last=False)
        else:
            self._free.append(page_id)

    def cached_pages(self) -> Iterable[int]:
        """The pages nobody holds whose contents may still be hit, next to leave first."""
        return self._cached.keys()

    def drop_cached(self) -> None:
        """Make every cached page free."""
        while self._cached:
            page_id, _ = self._cached.popitem(last=False)
            self._forget(page_id)
            self._free.append(page_id)

    def check_integrity(self, holders: list[int]) -> None:
        """Raise IntegrityError unless free + held + cached = total, disjoint, and references equal `holders` (counted by the caller)."""
        free, cached = set(self._free), set(self._cached)
        if len(free) != len(self._free) or free & cached:
            raise IntegrityError("a page is free twice, or free and cached")
        for page_id, count in enumerate(holders):
            if self._references[page_id] != count:
                raise IntegrityError(f"page {page_id} has {self._references[page_id]} references and {count} holders")
            if (count == 0) != (page_id in free or page_id in cached):
                raise IntegrityError(f"page {page_id} with {count} holders is {'not ' if count == 0 else ''}in the free list or the cache")
