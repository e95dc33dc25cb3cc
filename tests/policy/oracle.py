"""The policy's oracle: a store that remembers which token prefix lies in every slot, and a driver that plays the engine over it.

Before a step's "forward" the driver looks up, for every sequence and group, each committed position that the step's queries may see, and
demands that the page and slot hold exactly that sequence's prefix; a page of a group that carries has one slot, for the last prefix that wrote it.
It writes what the step computes through the same tables, so a page that is shared too early, evicted too late, merged wrongly or copied at the
wrong time shows as a wrong prefix, whoever is to blame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from hypothesis import settings

from quire.engine.keeper import CacheKeeper
from quire.policy.cache import PageCache
from quire.policy.copies import PageCopy
from quire.policy.drafts import PromptLookup
from quire.policy.groups import Group
from quire.policy.plan import StepPlan, Work
from quire.policy.prefix import PrefixKey, blake2b_128, pack
from quire.policy.scheduler import Scheduler
from quire.policy.sequence import Sequence as TokenSequence
from quire.tensors.models.geometry import STATE_REACH
from quire.tensors.store import PageStore
from tests.policy.stand_ins import Poisoned, Prefixes

SOAK = settings.get_current_profile_name() == "soak"


def full(page_size: int, group_id: int = 0) -> Group:
    return Group(group_id, page_size, 0, 0, ())


def sliding(page_size: int, window: int, group_id: int = 0) -> Group:
    return Group(group_id, page_size, window, 0, ())


def chunked(page_size: int, chunk: int, group_id: int = 0) -> Group:
    return Group(group_id, page_size, 0, chunk, ())


def carried(page_size: int, group_id: int = 0) -> Group:
    return Group(group_id, page_size, STATE_REACH, 0, (), carries=True)


def numbered(*groups: Group) -> tuple[Group, ...]:
    """The groups, with their place as their id."""
    return tuple(replace(g, group_id=i) for i, g in enumerate(groups))


def one_bit(data: bytes) -> bytes:
    """A hash with two values: nearly everything collides."""
    return bytes([blake2b_128(data)[0] & 1])


@dataclass(eq=False)
class Client:
    """A request as the driver sees it."""

    seq: TokenSequence
    max_tokens: int
    seed: int
    num_unborn: int = 0
    numbers: list[int] = field(default_factory=list)
    num_drawn: int = 0
    num_computed: int = 0
    num_accepted: int = 0
    num_hit: int = 0
    num_starts: int = 0
    peak_pages: int = 0
    done: bool = False


class Driver:
    """Engine, model and store in one: every token it "computes" is the number of the prefix it stands for."""

    def __init__(
        self,
        groups: Iterable[Group],
        num_pages: int,
        *,
        budget: int = 64,
        max_sequences: int = 64,
        sharing: bool = True,
        hash_bytes: Callable[[bytes], bytes] = blake2b_128,
        vocab: int = 3,
        drafts: int = 0,
    ) -> None:
        self.cache = PageCache(tuple(groups), num_pages, sharing=sharing, identity=b"model", hash_bytes=hash_bytes)
        self.scheduler = Scheduler(self.cache, max_tokens_per_step=budget, max_sequences=max_sequences)
        self.groups, self.budget, self.max_sequences, self.vocab = self.cache.groups, budget, max_sequences, vocab
        self.drafts = drafts
        self.prefixes = Prefixes()
        self.pages: list[dict[int, tuple[int, int]]] = [{} for _ in range(num_pages)]  # page -> slot -> (group, prefix number)
        self.clients: dict[int, Client] = {}
        self.keeper = CacheKeeper(self.scheduler, cast(PageStore, Poisoned(self.pages)), None)
        self._numbered: dict[int, tuple[PrefixKey, list[Any]]] = {}
        self.num_steps = self.num_arrivals = self.num_computed = self.num_copies = 0
        take = self.cache.pool.take

        def take_and_poison(num_pages: int) -> list[int]:
            page_ids = take(num_pages)
            for page_id in page_ids:
                self.pages[page_id] = {}
            return page_ids

        self.cache.pool.take = take_and_poison  # type: ignore[method-assign]

    # -- what a caller does ---------------------------------------------------------------------------------------------------------------

    def fits(self, num_tokens: int) -> bool:
        return self.cache.pages_to_finish(num_tokens) <= self.keeper.num_pages_for_requests

    def add(
        self,
        prompt: Sequence[int],
        max_tokens: int = 1,
        *,
        seed: int = 0,
        root: PrefixKey | None = None,
        namespace: str = "",
        priority: int = 0,
        n: int = 1,
    ) -> Client:
        """The last token drawn is never computed, so a request commits one token less than it has. Sister i of n draws with seed + i."""
        num_tokens = len(prompt) + max_tokens - 1
        assert self.fits(num_tokens), "the driver refuses what can never fit, as the engine does"
        own_root = f"request {self.num_arrivals}" if n > 1 and not self.cache.sharing else ""
        seq = self.keeper.sequence(prompt, namespace, arrival=self.num_arrivals, own_root=own_root)
        if root is not None:
            seq = TokenSequence(self.num_arrivals, prompt, root)
        seq.num_at_most, seq.pages_at_most = num_tokens, self.cache.pages_to_finish(num_tokens)
        seq.drafter = PromptLookup(self.drafts) if self.drafts else None
        client = self.clients[self.num_arrivals] = Client(seq, max_tokens, seed, num_unborn=n - 1)
        self.num_arrivals += n
        self.scheduler.add(seq, priority=priority, num_tokens=len(prompt) + n * max_tokens)
        return client

    def cancel(self, client: Client, *, keep: bool = True) -> None:
        self.scheduler.finish(client.seq, keep=keep, sisters=sum(one.seq.root is client.seq.root for one in self.clients.values()) > 1)
        self._close(client)

    def reset(self) -> None:
        """New weights: everything computed so far is worthless, so the store is emptied."""
        self.keeper.reset()
        assert self.cache.pool.num_free == self.cache.pool.num_usable and len(self.cache.index) == 0
        for held in self.pages:
            held.clear()

    def step(self, *, fail_at: float | None = None) -> StepPlan | None:
        """One engine step; with `fail_at` in [0, 1] it fails after that part of its copies and writes."""
        plan = self.scheduler.plan()
        self.num_steps += 1
        if plan is None:
            assert self.scheduler.num_running == self.scheduler.num_waiting == 0
            return None
        self._check_plan(plan)
        actions: list[Callable[[], None]] = [lambda c=copy: self._copy(c) for copy in plan.copies]  # type: ignore[misc]
        actions.append(lambda: self._check_reads(plan))
        actions += self._writes(plan)
        end = len(actions) if fail_at is None else int(fail_at * (len(actions) - 1))
        for action in actions[:end]:
            action()
        if fail_at is not None:
            self.scheduler.abandon(plan)
            for work in plan.works:
                self._close(self.clients[work.sequence.arrival])
            return plan
        drawing = [work for work in plan.works if work.draws]
        started = {work.sequence.arrival: work.sequence.num_committed for work in plan.works}
        self.scheduler.commit(plan)
        for work in plan.works:
            seq, client = work.sequence, self.clients[work.sequence.arrival]
            assert seq.num_committed == started[seq.arrival] + work.num_sure
            client.num_computed += work.num_tokens
            self.num_computed += work.num_tokens
        for work in drawing:
            seq, client = work.sequence, self.clients[work.sequence.arrival]
            self._draw(client)
            for draft in work.drafts:
                if client.done or seq.tokens[-1] != draft:
                    break
                self.scheduler.accept(seq)
                client.num_accepted += 1
                self._draw(client)
        self.scheduler.settle(plan)
        return plan

    def run(self, max_steps: int, *, check: bool = True) -> None:
        """Step until all is done, within a bound."""
        for _ in range(max_steps):
            if self.step() is None:
                assert not self.clients
                return
            if check:
                self.check()
        raise AssertionError(f"{len(self.clients)} requests unfinished after {max_steps} steps")

    # -- the model, the store and what must hold of them ----------------------------------------------------------------------------------

    def _draw(self, client: Client) -> None:
        number, seq = self.numbers(client)[-1], client.seq
        born = [client]
        for i in range(1, client.num_unborn + 1):
            sister = Client(seq.fork(seq.arrival + i), client.max_tokens, client.seed + i)
            sister.seq.drafter = PromptLookup(self.drafts) if self.drafts else None
            self.clients[sister.seq.arrival] = sister
            born.append(sister)
        client.num_unborn = 0
        for one in born:
            one.seq.tokens.append(hash((number, one.seed)) % self.vocab)
            one.num_drawn += 1
            if one.num_drawn == one.max_tokens:
                self.cancel(one)
            elif one is not client:
                self.scheduler.add_fork(one.seq)

    def _close(self, client: Client) -> None:
        client.peak_pages = client.seq.peak_pages
        client.done = True
        self.clients.pop(client.seq.arrival, None)

    def numbers(self, client: Client, drafts: Sequence[int] = ()) -> list[int]:
        seq = client.seq
        bridge = (seq.num_shared, seq.root.tokens) if seq.num_shared else None
        numbers = self.prefixes.extend(client.numbers, seq.tokens, seq.shared_root.tokens, bridge)
        return self.prefixes.extend([*numbers], [*seq.tokens, *drafts], seq.shared_root.tokens, bridge) if drafts else numbers

    def _copy(self, copy: PageCopy) -> None:
        self.num_copies += 1
        end = math.inf if self.groups[copy.group_id].carries else copy.num_tokens
        self.pages[copy.target].update({slot: held for slot, held in self.pages[copy.source].items() if slot < end})

    def _check_plan(self, plan: StepPlan) -> None:
        pool, index = self.cache.pool, self.cache.index
        self.cache.check_integrity()
        assert plan.works and plan.num_tokens <= self.budget
        assert self.scheduler.num_running <= self.max_sequences
        assert len({work.sequence.arrival for work in plan.works}) == len(plan.works)
        for work in plan.works:
            seq, client = work.sequence, self.clients[work.sequence.arrival]
            end = seq.num_committed + work.num_tokens
            assert work.num_sure >= 1 and end - len(work.drafts) <= seq.num_known
            assert not work.drafts or (work.draws and end <= seq.num_at_most), "a draft that nobody wants"
            if client.num_starts <= seq.num_preemptions:
                assert len(plan.works) == self.scheduler.num_running, "one starts while another that runs waits for room"
                client.num_starts = seq.num_preemptions + 1
                client.num_hit += seq.num_committed
            for group, table in zip(self.groups, seq.tables, strict=True):
                assert len(table) * group.page_size >= end
                if group.kind == "full":
                    assert len(table) == -(-end // group.page_size), "more pages than tokens need"
                    assert -1 not in table
        targets = {copy.target for copy in plan.copies}
        assert len(targets) == len(plan.copies) and targets.isdisjoint(copy.source for copy in plan.copies)
        assert all(pool.references(target) == 1 and target not in index for target in targets)

    def _check_reads(self, plan: StepPlan) -> None:
        for seq in (work.sequence for work in plan.works):
            numbers = self.numbers(self.clients[seq.arrival])
            for group, table in zip(self.groups, seq.tables, strict=True):
                first = max(0, seq.num_committed - 1) if group.carries else group.first_visible(seq.num_committed)
                for position in range(first, seq.num_committed):
                    page_id, slot = table[position // group.page_size], slot_of(group, position)
                    assert page_id >= 0, f"position {position} of {seq.num_committed} is visible and not stored, group {group}"
                    held = self.pages[page_id].get(slot)
                    assert held == (group.group_id, numbers[position]), f"position {position} of {seq.arrival} reads {held}, group {group}"

    def _writes(self, plan: StepPlan) -> list[Callable[[], None]]:
        return [lambda w=work: self._write(w) for work in plan.works]  # type: ignore[misc]

    def _write(self, work: Work) -> None:
        seq, num_tokens = work.sequence, work.num_tokens
        numbers = self.numbers(self.clients[seq.arrival], work.drafts)
        for group, table in zip(self.groups, seq.tables, strict=True):
            for position in range(seq.num_committed, seq.num_committed + num_tokens):
                page_id = table[position // group.page_size]
                if page_id >= 0:
                    # Copies and pins hold the part that is indexed; who fills the page goes on behind it.
                    holders = self.cache.pool.references(page_id) - self.cache.copies.sources(in_step=True).count(page_id)
                    holders -= self.cache.pool._aside[page_id]
                    assert holders == 1, "a shared page is written"
                    key = self.cache.index._pages.get(page_id)  # it may be indexed under the part it had when its prompt ended
                    part = 0 if group.carries else position % group.page_size
                    assert key is None or len(key.tokens) // 4 <= part, "an indexed slot is written"
                    self.pages[page_id][slot_of(group, position)] = (group.group_id, numbers[position])

    def check(self) -> None:
        """Between steps: the policy's own integrity, and every indexed page holds what its key says."""
        self.scheduler.check_integrity()
        assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.clients)
        for client in self.clients.values():
            assert client.seq.num_known - client.seq.num_committed >= 1
        for key in self.cache.index._keys.values():
            numbers = self._key_numbers(key)
            for group, page_id in zip(self.groups, key.pages, strict=True):
                held = {slot_of(group, slot): (group.group_id, number) for slot, number in enumerate(numbers)}
                for slot, number in held.items() if page_id >= 0 else ():
                    assert self.pages[page_id].get(slot) == number, f"page {page_id} does not hold what it is indexed under"

    def _key_numbers(self, key: PrefixKey) -> list[int]:
        """The prefix numbers of a key's own tokens."""
        path: list[PrefixKey] = []
        while id(key) not in self._numbered and key.parent is not None:
            path.append(key)
            key = key.parent
        known: list[Any] = self._numbered.get(id(key), (key, []))[1] or [key.tokens]
        for child in reversed(path):
            if child.tokens.startswith(b"model/"):  # a bridge from the shared region into a namespace
                known = [(known[-1], child.tokens)]
            else:
                known = self.prefixes.extend([], memoryview(child.tokens).cast("i").tolist(), known[-1])
            self._numbered[id(child)] = (child, known)  # the key is kept, so that its id stays its own
        return known


def slot_of(group: Group, position: int) -> int:
    return 0 if group.carries else position % group.page_size


def key_of(driver: Driver, tokens: Sequence[int], page_size: int) -> list[PrefixKey]:
    """The keys of the complete pages of `tokens`, root first."""
    keys = [driver.cache.namespaces.root("")]
    for i in range(0, len(tokens) - page_size + 1, page_size):
        keys.append(PrefixKey(keys[-1], pack(tokens[i : i + page_size]), driver.cache.hash_bytes))
    return keys
