"""Who computes how many tokens in the next step, under one token budget.

There is no prefill phase and no decode phase: a sequence computes the next of the tokens it has in hand and not in the cache (the idea is
vLLM's). Sequences that lack one token go first, then those with more, oldest first, then waiting ones in the order they came. When pages run
out the newest running sequence is preempted: its pages stay cached, so resuming is mostly hits, and it waits at the front. The oldest is
never preempted, so the engine always moves on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice

from quire.errors import IntegrityError
from quire.policy.cache import PageCache
from quire.policy.plan import StepPlan, Work
from quire.policy.sequence import Sequence

MAX_DEFERRED = 64  # bounds a plan: never linear in the queue


class Scheduler:
    """Waiting and running sequences over one PageCache. `plan`, then after the step `commit`, or `abandon` if it failed."""

    def __init__(self, cache: PageCache, *, max_tokens_per_step: int, max_sequences: int) -> None:
        self.cache = cache
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self._budget = max_tokens_per_step
        self._max_sequences = max_sequences
        self._waiting: OrderedDict[int, Sequence] = OrderedDict()
        self._running: dict[int, Sequence] = {}
        self._no_room_for: tuple[int, int, int] | None = None  # (arrival, num_running, pages available) when a start last failed

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no page yet, or none any more."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return len(self._running)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. Arrivals must rise."""
        self._waiting[seq.arrival] = seq

    def finish(self, seq: Sequence, *, keep: bool = True) -> None:
        """Take a sequence out, wherever it is, and let its pages go; `keep` as in `PageCache.release`."""
        self._waiting.pop(seq.arrival, None)
        self._running.pop(seq.arrival, None)
        self.cache.release(seq, keep=keep)

    def plan(self) -> StepPlan | None:
        """The next step, or None when nothing runs or waits. Takes pages; next comes `commit` or `abandon`, before any other change."""
        works: dict[int, Work] = {}
        budget = self._plan_running(works)
        # Nothing new starts while one that runs waits for room, nor while the first in the queue is known to find none.
        if budget and self._waiting and len(works) == len(self._running) < self._max_sequences and not self._no_room_yet():
            self._admit(works, budget)
        if works:
            return StepPlan(tuple(works.values()), self.cache.take_copies())
        if self._running or self._waiting:
            raise IntegrityError(f"no progress with {self.num_running} sequences running and {self.num_waiting} waiting")
        return None

    def commit(self, plan: StepPlan) -> None:
        """Every work of the plan was computed and its keys and values are in their pages."""
        self.cache.copied(plan.copies)
        for seq, num_tokens in plan.works:
            self.cache.commit(seq, num_tokens)

    def abandon(self, plan: StepPlan) -> None:
        """The step failed: nothing of it was committed, and all its sequences end. What they had committed before stays cached."""
        self.cache.copied(plan.copies)
        unsure = {copy.target for copy in plan.copies}  # the failure may have come before the copy
        for seq, _ in plan.works:
            self.finish(seq, keep=all(unsure.isdisjoint(table) for table in seq.tables))

    def preempt_all(self) -> None:
        """Make everything running wait, newest first, so that nothing holds a page."""
        for seq in sorted(self._running.values(), key=lambda s: -s.arrival):
            self._preempt(seq)

    def _plan_running(self, works: dict[int, Work]) -> int:
        ready, ending, longer = [], [], []
        for seq in self._running.values():
            if len(seq.tokens) - seq.num_committed > 1:
                longer.append(seq)
            elif seq.num_committed < seq.capacity:
                ready.append(seq)
            else:
                ending.append(seq)
        if ending and self.cache.grow_by_one(ending):
            ready += ending
            ending = []
        for seq in ready[: self._budget]:
            works[seq.arrival] = Work(seq, 1)
        budget = self._budget - len(works)
        for seq in ending + longer:
            if budget and seq.arrival in self._running:
                budget = self._plan_with_room(seq, min(seq.num_remaining, budget), budget, works)
        return budget

    def _plan_with_room(self, seq: Sequence, num_tokens: int, budget: int, works: dict[int, Work]) -> int:
        """Grow and plan it, preempting newer sequences while there is no room; the newest itself just waits a step. Returns the budget left."""
        while not self.cache.grow(seq, num_tokens):
            victim = self._running[max(self._running)]
            if victim is seq:
                return budget
            if victim.arrival in works:
                budget += works.pop(victim.arrival).num_tokens
            self._preempt(victim)
        works[seq.arrival] = Work(seq, num_tokens)
        return budget - num_tokens

    def _preempt(self, seq: Sequence) -> None:
        del self._running[seq.arrival]
        self.cache.release(seq)
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self._wait_in_front(seq)

    def _admit(self, works: dict[int, Work], budget: int) -> None:
        """Start waiting sequences in order, until one does not fit. One that would compute what another computes in this step waits for it."""
        coming = self._pages_coming(works.values())
        deferred: list[Sequence] = []
        while budget and self._waiting and len(self._running) < self._max_sequences and len(deferred) < MAX_DEFERRED:
            seq = next(iter(self._waiting.values()))
            if coming and self._would_compute(seq, coming):
                deferred.append(self._waiting.pop(seq.arrival))
                continue
            if not self._start(seq, budget):
                break
            works[seq.arrival] = work = Work(seq, min(seq.num_remaining, budget))
            coming |= self._pages_coming([work])
            budget -= work.num_tokens
        for seq in reversed(deferred):
            self._wait_in_front(seq)

    def _start(self, seq: Sequence, budget: int) -> bool:
        """Let a waiting sequence run if all it has in hand fits beside one more page for each that runs."""
        pool, headroom = self.cache.pool, len(self._running) * len(self.cache.groups)
        for partial in (True, False):  # a copied page and its source may be just what is missing
            self.cache.match(seq, partial=partial)
            hit = seq.num_committed
            fits = not headroom or self.cache.pages_wanted(seq, seq.num_known) + headroom <= pool.num_available
            if fits and self.cache.grow(seq, min(seq.num_remaining, budget)):
                del self._waiting[seq.arrival]
                self._running[seq.arrival] = seq
                self.num_cached_tokens += hit
                return True
            self.cache.release(seq)
        self._no_room_for = (seq.arrival, len(self._running), pool.num_available)
        return False

    def _no_room_yet(self) -> bool:
        """Whether the first in the queue found no room before and nothing has changed for the better since."""
        if self._no_room_for is None:
            return False
        arrival, num_running, num_available = self._no_room_for
        return arrival == next(iter(self._waiting)) and 0 < num_running <= len(self._running) and self.cache.pool.num_available <= num_available

    def _wait_in_front(self, seq: Sequence) -> None:
        self._waiting[seq.arrival] = seq
        self._waiting.move_to_end(seq.arrival, last=False)

    def _would_compute(self, seq: Sequence, coming: set[bytes]) -> bool:
        size = self.cache.unit
        chain = seq.chain(size, (seq.num_known - 1) // size, self.cache.hash_bytes)
        return any(key.digest in coming for key in islice(chain, 1, None))

    def _pages_coming(self, works: Iterable[Work]) -> set[bytes]:
        """Digests of the pages that prompts in this step will complete."""
        coming: set[bytes] = set()
        size = self.cache.unit
        for seq, num_tokens in works if self.cache.sharing else ():
            if num_tokens > 1 or seq.num_committed < seq.num_prompt:
                first, end = seq.num_committed // size, (seq.num_committed + num_tokens) // size
                coming.update(key.digest for key in seq.chain(size, end, self.cache.hash_bytes)[first + 1 : end + 1])
        return coming

    def check_integrity(self) -> None:
        """Raise IntegrityError unless a sequence is waiting or running, not both, only running ones hold pages, and the cache is sound."""
        if self._waiting.keys() & self._running.keys():
            raise IntegrityError("a sequence is both waiting and running")
        if any(seq.num_pages for seq in self._waiting.values()):
            raise IntegrityError("a waiting sequence holds pages")
        self.cache.check_integrity()
        if not self._running and self.cache.pool.num_held:
            raise IntegrityError(f"{self.cache.pool.num_held} pages are held and nothing runs")
