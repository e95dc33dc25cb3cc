"""Who computes how many tokens in the next step, under one token budget.

There is no prefill phase and no decode phase: a sequence computes the next of the tokens it has in hand and not in the cache (the idea is
vLLM's). Sequences that lack one token go first, then those with more, best rank first, then waiting ones, best rank first (`policy/fairness.py`).
When pages run out the running sequence of the worst rank is preempted: its pages stay cached, so resuming is mostly hits. The best is never
preempted for room, so the engine always moves on, and who was preempted starts again only with more room each time.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from quire.errors import IntegrityError
from quire.policy.cache import PageCache
from quire.policy.drafts import MAX_DRAWN
from quire.policy.fairness import FairShares, Line, by_rank, to_give_way
from quire.policy.plan import StepPlan, Work
from quire.policy.sequence import Sequence
from quire.policy.tier import NoTier, Tier

MAX_DEFERRED = 64  # bounds a plan: never linear in the queue
MAX_SCORED = 128  # prompt tokens scored in a step: each takes a row of logits


class Outline:
    """A step while it is planned."""

    def __init__(self, budget: int) -> None:
        self.works: dict[int, Work] = {}
        self.budget = budget
        self.scores_left = MAX_SCORED

    def most(self, seq: Sequence) -> int:
        """How many of the tokens that a sequence has in hand this step may compute."""
        num_tokens = min(seq.num_remaining, self.budget)
        return min(num_tokens, self.scores_left) if self._scores(seq) else num_tokens

    def lacks_rows(self, seq: Sequence) -> bool:
        """Whether the prompts that are scored leave it no row, with whatever budget."""
        return self._scores(seq) and not self.scores_left

    def _scores(self, seq: Sequence) -> bool:
        return seq.scores and seq.num_committed < seq.num_prompt - 1

    def put(self, seq: Sequence, num_tokens: int) -> None:
        """Have it compute so many tokens."""
        work = self.works[seq.arrival] = Work(seq, num_tokens)
        self.budget -= num_tokens
        self.scores_left -= work.num_scored

    def put_drafts(self, seq: Sequence, drafts: tuple[int, ...]) -> None:
        """Have it compute these behind all that it has in hand."""
        self.works[seq.arrival] = Work(seq, self.works[seq.arrival].num_tokens + len(drafts), drafts)
        self.budget -= len(drafts)

    def drop(self, seq: Sequence) -> None:
        """Have it compute nothing, whether it was to or not. Its tokens are others' then; it must stand where it stood."""
        work = self.works.pop(seq.arrival, None)
        if work is not None:
            self.budget += work.num_tokens
            self.scores_left += work.num_scored


class Scheduler:
    """Waiting and running sequences over one PageCache. `plan`, then after the step `commit`, or `abandon` if it failed."""

    def __init__(self, cache: PageCache, *, max_tokens_per_step: int, max_sequences: int, tier: Tier | None = None) -> None:
        self.cache = cache
        self.tier: Tier = tier or NoTier()
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self._budget = max_tokens_per_step
        self._max_sequences = min(max_sequences, max_tokens_per_step)  # each takes a token of every step, at least
        self._waiting = Line()
        self._running: dict[int, Sequence] = {}
        self._shares = FairShares()
        self._no_room_for: tuple[int, int, int] | None = None  # (arrival, num_running, pages available) when a start last failed

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no page yet, or none any more."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return len(self._running)

    @property
    def pages_at_most(self) -> int:
        """The most pages any open sequence may need to finish, alone."""
        return max((seq.pages_at_most for seq in (*self._running.values(), *self._waiting)), default=0)

    def add(self, seq: Sequence, *, priority: int = 0, num_tokens: int = 1) -> None:
        """Queue a sequence that will take about `num_tokens` tokens of work; higher priorities go first. Arrivals must rise."""
        seq.rank = self._shares.rank(seq.arrival, seq.namespace, priority, num_tokens)
        self._waiting.add(seq)

    def add_fork(self, seq: Sequence) -> None:
        """Queue a sister of a sequence, whose rank it has."""
        self._waiting.add(seq)

    def finish(self, seq: Sequence, *, keep: bool = True, sisters: bool = False) -> None:
        """Take a sequence out, wherever it is, and let its pages go; `keep` as in `PageCache.release`.

        Under a root of its own they stay for as long as there are `sisters`, who may have yet to start.
        """
        self._waiting.remove(seq)
        self._running.pop(seq.arrival, None)
        if seq.own_root and not sisters:
            self.cache.forget(seq.root)
        self._release(seq, keep=keep and (sisters or not seq.own_root))
        if not self._running and not self._waiting:
            self._shares.idle()

    def plan(self) -> StepPlan | None:
        """The next step, or None when nothing runs or waits, or all that waits waits for the tier.

        Takes pages; next comes `commit` or `abandon`, before any other change.
        """
        outline = Outline(self._budget)
        self._plan_running(outline)
        # Nothing new starts while one that runs waits for room, nor while the first in the queue is known to find none.
        may_start = outline.budget or self._is_full
        if may_start and self._waiting and len(outline.works) == len(self._running) and not self._no_room_yet():
            self._admit(outline)
        if len(outline.works) < MAX_DRAWN:
            self._draft(outline)
        if outline.works:
            return StepPlan(tuple(outline.works.values()), self.cache.copies.take())
        if (self._running or self._waiting) and not self.tier.busy:
            raise IntegrityError(f"no progress with {self.num_running} sequences running and {self.num_waiting} waiting")
        return None

    def commit(self, plan: StepPlan) -> None:
        """Every work of the plan was computed and its keys and values are in their pages; those of drafts count when they are accepted."""
        self.cache.copies.done(plan.copies)
        for work in plan.works:
            self.cache.commit(work.sequence, work.num_sure)

    def accept(self, seq: Sequence) -> None:
        """The next of the tokens drafted for it in the last plan was drawn and is in hand."""
        self.cache.commit(seq, 1)

    def settle(self, plan: StepPlan) -> None:
        """All that the step drew is in hand: pages that only wrong drafts needed are anybody's again."""
        for work in plan.works:
            if work.drafts:
                self.cache.shrink(work.sequence)

    def abandon(self, plan: StepPlan) -> None:
        """The step failed: nothing of it was committed, and all its sequences end. What they had committed before stays cached."""
        self.cache.copies.done(plan.copies)
        unsure = {copy.target for copy in plan.copies}  # the failure may have come before the copy
        for seq in (work.sequence for work in plan.works):
            if not self.cache.takes_back:  # the failure may have come when the state behind what it had was written over, at the commit
                self.cache.forget_end(seq)
            self.finish(seq, keep=all(unsure.isdisjoint(table) for table in seq.tables))

    def preempt_all(self) -> None:
        """Make everything running wait, worst rank first, so that no sequence holds a page."""
        for seq in sorted(self._running.values(), key=by_rank, reverse=True):
            self._preempt(seq)

    def preempt_worst(self) -> None:
        """Make the running sequence of the worst rank wait."""
        self._preempt(max(self._running.values(), key=by_rank))

    def _release(self, seq: Sequence, *, keep: bool) -> None:
        if keep and seq.num_pages and not seq.own_root:
            self.cache.index_complete(seq)
            self.tier.offer(seq)
        self.cache.release(seq, keep=keep)

    def _plan_running(self, outline: Outline) -> None:
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
            outline.put(seq, 1)
        for seq in sorted(ending, key=by_rank) + sorted(longer, key=by_rank):
            if outline.most(seq) and seq.arrival in self._running:
                self._plan_with_room(seq, outline.most(seq), outline)

    def _plan_with_room(self, seq: Sequence, num_tokens: int, outline: Outline) -> None:
        """Grow and plan it, preempting those of worse rank while there is no room; the worst itself just waits a step."""
        while not self.cache.grow(seq, num_tokens):
            victim = max(self._running.values(), key=by_rank)
            if victim is seq:
                return
            outline.drop(victim)
            self._preempt(victim)
        outline.put(seq, num_tokens)

    def _draft(self, outline: Outline) -> None:
        """Let sequences guess, in rows that the step has left and in pages that nobody is near to needing."""
        drawing = [work.sequence for work in outline.works.values() if work.draws]
        able = [(seq, seq.drafter) for seq in drawing if seq.drafter is not None and seq.num_known > seq.num_prompt]
        rows = min(MAX_DRAWN - len(outline.works), outline.budget)
        for i, (seq, drafter) in enumerate(able):
            drafts = drafter.guess(seq.tokens, min(rows // (len(able) - i), seq.num_at_most - seq.num_known))
            spare = self.cache.pool.num_available - self.cache.pages_wanted(seq, seq.num_known + len(drafts))
            if spare < self._pages_soon():
                drafts = drafts[: seq.capacity - seq.num_known]
            if drafts and self.cache.grow(seq, seq.num_remaining + len(drafts), len(drafts)):
                rows -= len(drafts)
                outline.put_drafts(seq, drafts)

    def _preempt(self, seq: Sequence) -> None:
        del self._running[seq.arrival]
        self._release(seq, keep=True)
        seq.num_preemptions += 1
        self.num_preemptions += 1
        seq.waits_for = "pages"
        seq.asked_below = seq.num_known
        self._waiting.add(seq)

    def _admit(self, outline: Outline) -> None:
        """Start waiting sequences in order, until one does not fit. One that would compute what another computes in this step waits for it.

        Without budget, too, where as many run as may: one that gives way gives its tokens back.
        """
        coming = self._pages_coming(outline.works.values())
        place = 0  # those before it wait for what is coming
        while (outline.budget or self._is_full) and place < min(len(self._waiting), MAX_DEFERRED):
            seq = self._waiting[place]
            if coming and self._would_compute(seq, coming):
                seq.waits_for = "prefix"
                place += 1
            elif outline.lacks_rows(seq):
                seq.waits_for = "logits"
                place += 1
            elif self.tier.fetch(seq):
                seq.waits_for = "disk"
                place += 1
            elif self._start(seq, outline):
                coming |= self._pages_coming([outline.works[seq.arrival]])
            else:
                break

    def _start(self, seq: Sequence, outline: Outline) -> bool:
        """Let a waiting sequence run, if need be in the place of others."""
        while not self._start_in_free_room(seq, outline):
            needed = self.cache.pages_to_finish(seq.num_known)
            victim = to_give_way(seq, self._running.values(), self.cache.pool.num_usable, needed)
            if victim is None:
                return False
            outline.drop(victim)
            self._preempt(victim)
        return True

    def _start_in_free_room(self, seq: Sequence, outline: Outline) -> bool:
        """Let a waiting sequence run if all it has in hand fits beside the next page of each that runs."""
        if self._is_full:
            seq.waits_for = "sequences"
            return False
        pool, num_groups, headroom = self.cache.pool, len(self.cache.groups), self._pages_soon()
        if headroom and seq.num_preemptions:  # twice the room each time, so that it is not preempted for ever
            headroom += min(2**seq.num_preemptions * num_groups, max(0, seq.pages_at_most - self.cache.pages_wanted(seq, seq.num_known)))
        for partial in (True, False):  # a copied page and its source may be just what is missing
            self.cache.match(seq, partial=partial)
            hit = seq.num_committed
            fits = not headroom or self.cache.pages_wanted(seq, seq.num_known) + headroom <= pool.num_available
            if fits and self.cache.grow(seq, outline.most(seq)):
                self._waiting.remove(seq)
                self._running[seq.arrival] = seq
                self._shares.started(seq.rank)
                self.num_cached_tokens += hit
                outline.put(seq, outline.most(seq))
                return True
            self.cache.release(seq)
        seq.waits_for = "pages"
        self._no_room_for = (seq.arrival, len(self._running), pool.num_available)
        return False

    @property
    def _is_full(self) -> bool:
        """Whether as many sequences run as may."""
        return len(self._running) >= self._max_sequences

    def _pages_soon(self) -> int:
        """The pages that all which run will next come to need, each one of every group; a slot of the whole context is all a sequence needs."""
        return len(self.cache.groups) * sum([seq.num_at_most > seq.capacity for seq in self._running.values()])

    def _no_room_yet(self) -> bool:
        """Whether the first in the queue found no room before and nothing has changed for the better since."""
        if self._no_room_for is None:
            return False
        arrival, num_running, num_available = self._no_room_for
        return arrival == self._waiting[0].arrival and 0 < num_running <= len(self._running) and self.cache.pool.num_available <= num_available

    def _would_compute(self, seq: Sequence, coming: set[bytes]) -> bool:
        size = self.cache.unit
        chain = seq.chain(size, (seq.num_known - 1) // size, self.cache.hash_bytes)
        return any(key.digest in coming for key in islice(chain, 1, None))

    def _pages_coming(self, works: Iterable[Work]) -> set[bytes]:
        """Digests of the pages that prompts in this step will complete."""
        coming: set[bytes] = set()
        size = self.cache.unit
        for work in works:
            seq, num_tokens = work.sequence, work.num_sure
            if self.cache.shares(seq) and (num_tokens > 1 or seq.num_committed < seq.num_prompt):
                first, end = seq.num_committed // size, (seq.num_committed + num_tokens) // size
                coming.update(key.digest for key in seq.chain(size, end, self.cache.hash_bytes)[first + 1 : end + 1])
        return coming

    def check_integrity(self) -> None:
        """Raise IntegrityError unless a sequence is waiting or running, not both, only running ones hold pages, and the cache is sound."""
        waiting = list(self._waiting)
        if any(seq.arrival in self._running for seq in waiting):
            raise IntegrityError("a sequence is both waiting and running")
        if [seq.rank for seq in waiting] != sorted({seq.rank for seq in waiting}):
            raise IntegrityError("the queue is not in the order of rank")
        if any(seq.num_pages for seq in waiting):
            raise IntegrityError("a waiting sequence holds pages")
        self.cache.check_integrity()
        if not self._running and self.cache.pool.num_held > self.cache.pool.num_set_aside:
            raise IntegrityError(f"{self.cache.pool.num_held} pages are held and nothing runs")
