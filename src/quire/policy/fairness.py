"""Ranks: who starts first and who gives way. Priority first, then fair shares between namespaces, then order of arrival.

Fair shares are start-time fair queueing (Goyal, Vin & Cheng 1996), in tokens: a sequence's tag is where its namespace's last one ends in virtual
time, or now if that has passed. A namespace with a long queue therefore cannot keep another's one request waiting, and with a single namespace
tags rise with arrivals, so that the order is first come, first served.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator

from quire.policy.sequence import Rank, Sequence

MAX_ENDS = 1024  # namespaces remembered beyond those that are owed or owe something
MAX_GIVEN_WAY = 3  # a sequence preempted this often gives way no more to those that are not running


class FairShares:
    """Virtual time, and where in it each namespace's last sequence ends."""

    def __init__(self) -> None:
        self._now = 0
        self._ends: dict[str, int] = {}

    def rank(self, arrival: int, namespace: str, priority: int, num_tokens: int) -> Rank:
        """The rank of a new sequence that will take `num_tokens` tokens of work."""
        tag = max(self._now, self._ends.get(namespace, 0))
        if len(self._ends) >= MAX_ENDS:  # what lies in the past says nothing
            self._ends = {name: end for name, end in self._ends.items() if end > self._now}
        self._ends[namespace] = tag + max(1, num_tokens)
        return Rank(-priority, tag, arrival)

    def started(self, rank: Rank) -> None:
        """Virtual time is where the last start was."""
        self._now = max(self._now, rank.tag)

    def idle(self) -> None:
        """Nothing is open: what was owed is forgotten."""
        self._now = 0
        self._ends.clear()


class Line:
    """Sequences that wait, best rank first."""

    def __init__(self) -> None:
        self._line: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._line)

    def __getitem__(self, place: int) -> Sequence:
        return self._line[place]

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._line)

    def add(self, seq: Sequence) -> None:
        """Take its place by rank."""
        self._line.insert(bisect_left(self._line, seq.rank, key=by_rank), seq)

    def remove(self, seq: Sequence) -> None:
        """Leave the line, if it is in it."""
        place = bisect_left(self._line, seq.rank, key=by_rank)
        if place < len(self._line) and self._line[place] is seq:
            del self._line[place]


def to_give_way(seq: Sequence, running: Iterable[Sequence], num_pages: int, needed: int) -> Sequence | None:
    """The running sequence that makes room for a waiting one that needs `needed` pages; None if it has no claim.

    Any of lower priority does, the worst of rank first. Of equal priority, only one of a namespace that holds more than its equal share of the
    pool, for one that stays within its own. Who gave way often enough does so no more, so that everybody ends.
    """
    candidates = [other for other in running if other.num_preemptions < MAX_GIVEN_WAY]
    worst = max(candidates, key=by_rank, default=None)
    if worst is None or worst.rank.order > seq.rank.order:
        return worst
    held: dict[str, int] = {seq.namespace: 0}
    for other in running:
        held[other.namespace] = held.get(other.namespace, 0) + other.num_pages
    share = num_pages // len(held)
    if held[seq.namespace] + needed > share:
        return None
    greedy = [
        other for other in candidates if other.rank.order == seq.rank.order and other.namespace != seq.namespace and held[other.namespace] > share
    ]
    return max(greedy, key=lambda other: (held[other.namespace], other.rank), default=None)


def by_rank(seq: Sequence) -> Rank:
    """What sequences are ordered by, the best first."""
    return seq.rank
