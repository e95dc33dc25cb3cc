"""Who computes how many tokens in the next step, under one token budget.

There is no prefill phase and no decode phase: a sequence computes the next of the tokens it has in hand and not in the cache (the idea is
vLLM's). Sequences that lack one token go first, then those with more, oldest first, then waiting ones in the order they came. When pages run
out the newest running sequence is preempted: its pages stay cached, so resuming is mostly hits, and it waits at the front. The oldest is
never preempted, so the engine always moves on.
"""

from __future__ import annotations

from collections import OrderedDict

from quire.errors import IntegrityError
from quire.policy.cache import PageCache
from quire.policy.plan import StepPlan, Work
from quire.policy.sequence import Sequence


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
        """The next step, or None when nothing runs or waits. Takes pages; call `commit` or `abandon` before the next."""
        works: dict[int, Work] = {}
        budget = self._plan_running(works)
        if budget and self._waiting:
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
            self.finish(seq, keep=unsure.isdisjoint(table[-1] for table in seq.tables if table))

    def preempt_all(self) -> None:
        """Make everything running wait, newest first, so that nothing holds a page."""
        for seq in sorted(self._running.values(), key=lambda s: -s.arrival):
            self._preempt(seq)

    def _plan_running(self, works: dict[int, Work]) -> int:
        budget = self._budget
        running = list(self._running.values())
        for decoding in (True, False):
            for seq in running:
                remaining = len(seq.tokens) - seq.num_committed
                if budget == 0 or (remaining == 1) != decoding or seq.arrival not in self._running:
                    continue
                num_tokens = min(remaining, budget)
                if num_tokens + seq.num_committed > seq.capacity:
                    budget += self._make_room(seq, num_tokens, works)
                    if num_tokens + seq.num_committed > seq.capacity:
                        continue
                works[seq.arrival] = Work(seq, num_tokens)
                budget -= num_tokens
        return budget

    def _make_room(self, seq: Sequence, num_tokens: int, works: dict[int, Work]) -> int:
        """Grow, preempting newer sequences while that fails; the budget their planned work gives back. The newest itself just waits a step."""
        returned = 0
        while not self.cache.grow(seq, num_tokens):
            victim = max(self._running.values(), key=lambda s: s.arrival)
            if victim is seq:
                break
            work = works.pop(victim.arrival, None)
            returned += work.num_tokens if work else 0
            self._preempt(victim)
        return returned

    def _preempt(self, seq: Sequence) -> None:
        del self._running[seq.arrival]
        self.cache.release(seq)
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self._waiting[seq.arrival] = seq
        self._waiting.move_to_end(seq.arrival, last=False)

    def _admit(self, works: dict[int, Work], budget: int) -> None:
        """Start waiting sequences in order, until one does not fit. One that would compute what another computes in this step waits for it."""
        coming = self._pages_coming(works)
        for seq in list(self._waiting.values()):
            if budget == 0 or len(self._running) >= self._max_sequences:
                return
            self.cache.match(seq)
            if self._next_page(seq) in coming:
                self.cache.release(seq)
                continue
            if not self._start(seq, budget):
                return
            work = Work(seq, min(seq.num_remaining, budget))
            works[seq.arrival] = work
            coming.update(self._pages_coming({0: work}))
            budget -= work.num_tokens

    def _start(self, seq: Sequence, budget: int) -> bool:
        """Let a matched sequence run if all it has in hand fits beside one more page for each that runs; else let it go again."""
        headroom = len(self._running) * len(self.cache.groups)
        for partial in (True, False):
            if not partial:
                # The copied page and its source may be just what is missing.
                self.cache.match(seq, partial=False)
            cached = seq.num_committed
            fits = not headroom or self.cache.pages_wanted(seq, seq.num_known) + headroom <= self.cache.pool.num_available
            if fits and self.cache.grow(seq, min(seq.num_remaining, budget)):
                del self._waiting[seq.arrival]
                self._running[seq.arrival] = seq
                self.num_cached_tokens += cached
                return True
            self.cache.release(seq)
        return False

    def _next_page(self, seq: Sequence) -> bytes | None:
        """Digest of the first complete page it would compute."""
        if not self.cache.sharing:
            return None
        size = self.cache.groups[0].page_size
        chain = seq.chains.get(size, ())
        page = seq.num_committed // size + 1
        return chain[page].digest if page < len(chain) else None

    def _pages_coming(self, works: dict[int, Work]) -> set[bytes]:
        """Digests of the pages that prompts in this step will complete."""
        if not self.cache.sharing:
            return set()
        size = self.cache.groups[0].page_size
        coming = set()
        for seq, num_tokens in works.values():
            if num_tokens > 1:
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
