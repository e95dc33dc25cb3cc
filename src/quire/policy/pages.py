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
from collections.abc import Iterable
from typing import Protocol

from quire.errors import IntegrityError


class Contents(Protocol):
    """What knows whether a page's contents may still be hit, and must be told before they go."""

    def __contains__(self, page_id: int) -> bool: ...
    def forget(self, page_ids: Iterable[int]) -> None: ...


class PagePool:
    """Owns every page id in [0, num_pages). `contents` forgets a cached page just before it is given to someone else."""

    def __init__(self, num_pages: int, contents: Contents) -> None:
        self.num_pages = num_pages
        self._contents = contents
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
            self._contents.forget(evicted)
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

    def cached_pages(self) -> Iterable[int]:
        """The pages nobody holds whose contents may still be hit, next to leave first."""
        return self._cached.keys()

    def drop_cached(self) -> None:
        """Make every cached page free."""
        self._contents.forget(self._cached)
        self._free.extend(self._cached)
        self._cached.clear()

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
