"""Finds the longest cached prefix of a sequence that every group can serve.

A full group must have all pages up to the hit, another only those that a query at the hit point can still see, so it can have holes:

    full      [x x x x x x .]           a hit after 6 pages would need sliding page 5, one after 5 pages needs page 4: 5 it is
    sliding   [. . . . x . .]  window of one page
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

from quire.policy.groups import Group
from quire.policy.prefix import Hash, PrefixIndex
from quire.policy.sequence import Sequence


class HitFinder:
    """Looks prefixes up in an index, one lookup a page for all groups of one page size.

    `unit`: a hit ends where a page of every group ends; with several page sizes, at a common multiple. `ids_by_size`: page size -> groups.
    `least`: as many tokens before a hit must be there though no group may see them.
    """

    def __init__(self, groups: Seq[Group], index: PrefixIndex, hash_bytes: Hash) -> None:
        self._groups, self._index, self._hash_bytes = groups, index, hash_bytes
        self._windowed = [g for g in groups if g.kind != "full"]
        # Where every group may see nothing of what comes before a hit, the page before it must be there all the same: else any prompt would hit.
        self.least = 0 if len(self._windowed) < len(groups) else 1
        self.unit = math.lcm(*(g.page_size for g in groups))
        by_length = sorted(groups, key=lambda g: (g.kind != "full", g.page_size))  # full ones first: they decide how long a hit can be
        self.ids_by_size = {g.page_size: [h.group_id for h in groups if h.page_size == g.page_size] for g in by_length}

    def longest(self, seq: Sequence, limit: int) -> tuple[list[list[int]], int]:
        """(each group's pages, -1 for a miss; the number of tokens, at most `limit`, for which all that can be seen is there)."""
        length = limit - limit % self.unit
        found: list[list[int]] = [[] for _ in self._groups]
        nothing = [-1] * len(self._groups)
        for size, group_ids in self.ids_by_size.items():
            chain = seq.chain(size, length // size, self._hash_bytes)
            full_ids = [g for g in group_ids if self._groups[g].kind == "full"]
            for i in range(length // size):
                key = self._index.find(chain[i + 1])
                pages = nothing if key is None else key.pages
                if any(pages[g] < 0 for g in full_ids):
                    length = i * size - i * size % self.unit
                    break
                for g in group_ids:
                    found[g].append(pages[g])
                if key is not None:
                    seq.intern(size, i, key)
        return found, self._longest_covered(found, length)

    def _longest_covered(self, found: list[list[int]], length: int) -> int:
        """Linear in the pages: a miss rules out every length that still sees it, and no page is looked at twice."""
        covered = [len(pages) for pages in found]  # of each group, all pages from this one to the end of the hit are there
        settled = False
        while length and not settled:
            settled = True
            for group in self._windowed:
                size, pages = group.page_size, found[group.group_id]
                first = max(0, min(group.first_visible(length), length - self.least)) // size
                i = min(covered[group.group_id], length // size)
                while i > first and pages[i - 1] >= 0:
                    i -= 1
                covered[group.group_id] = i
                if i > first:
                    missing = (i - 1) * size
                    length, settled = missing - missing % self.unit, False
        return length
