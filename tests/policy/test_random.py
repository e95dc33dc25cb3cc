"""Random lives of the cache: any order of add, fork, step, cancel, fail, pin, share, resize and reset, over random groups, budgets and pools."""

from __future__ import annotations

import contextlib
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from quire.errors import InvalidRequestError
from quire.policy.groups import Group
from quire.policy.prefix import Hash, blake2b_128
from tests.policy.oracle import SOAK, Client, Driver, carried, chunked, full, numbered, one_bit, sliding

MOST_TOKENS = 50
GROUPS = [
    lambda b: numbered(full(b)),
    lambda b: numbered(sliding(b, 5)),
    lambda b: numbered(sliding(b, 1)),
    lambda b: numbered(full(b), sliding(b, 7)),
    lambda b: numbered(full(b), sliding(b, 2 * b), sliding(b, 2 * b), sliding(b, 2 * b + 1)),
    lambda b: numbered(full(b), chunked(b, 6)),
    lambda b: numbered(full(b), chunked(b, 2 * b)),
    lambda b: numbered(full(b), full(2 * b), sliding(4 * b, 9)),
    lambda b: numbered(full(2 * b), full(3 * b), sliding(b, 3 * b)),
    lambda b: numbered(full(b), carried(b)),
    lambda b: numbered(full(b), carried(b), carried(b), sliding(b, 7)),
    lambda b: numbered(full(b), full(2 * b), carried(b)),
]
any_group = st.builds(
    lambda page_size, kind, reach: [full(page_size), sliding(page_size, reach), chunked(page_size, reach), carried(page_size)][kind],
    st.sampled_from([1, 2, 3, 4, 5, 8]),
    st.integers(0, 3),
    st.integers(1, 20),
)
group_sets = st.one_of(
    st.builds(lambda make, b: make(b), st.sampled_from(GROUPS), st.sampled_from([1, 4, 16])),
    st.lists(any_group, min_size=1, max_size=3).map(lambda groups: numbered(*groups)),
)
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=MOST_TOKENS - 20)


class CacheMachine(RuleBasedStateMachine):
    """`check` follows every action; every read of every step is compared inside `Driver.step`."""

    hash_bytes: Hash = staticmethod(blake2b_128)

    @initialize(
        groups=group_sets,
        budget=st.sampled_from([1, 7, 64]),
        roominess=st.sampled_from([1.0, 1.2, 2.0, 6.0]),
        max_sequences=st.sampled_from([1, 3, 64]),
        sharing=st.sampled_from([True, True, True, False]),
        vocab=st.sampled_from([1, 2, 50]),
        drafts=st.sampled_from([0, 1, 4, 15]),
    )
    def start(self, groups: tuple[Group, ...], budget: int, roominess: float, max_sequences: int, sharing: bool, vocab: int, drafts: int) -> None:
        drafts = 0 if any(group.carries for group in groups) else drafts  # they are refused: no state takes one back
        driver = Driver(groups, 1, budget=budget)  # only to ask how many pages the longest request needs
        num_pages = int(driver.cache.pages_to_finish(MOST_TOKENS) * roominess)
        options: dict[str, Any] = {"budget": budget, "max_sequences": max_sequences, "sharing": sharing, "vocab": vocab, "drafts": drafts}
        self.driver = Driver(groups, num_pages, hash_bytes=self.hash_bytes, **options)
        self.history: list[list[int]] = []
        self.time = 0.0
        self.driver.keeper._pins._clock = lambda: self.time

    def _add(self, prompt: list[int], max_tokens: int, **options: Any) -> None:
        prompt = prompt[: MOST_TOKENS - max_tokens]
        if not self.driver.fits(len(prompt) + max_tokens - 1):  # not in a pool that has been made smaller
            return
        client = self.driver.add(prompt, max_tokens, seed=len(prompt) % 2, **options)
        self.history.append(client.seq.tokens)  # the very list: it grows with what is drawn
        self.driver.check()

    @rule(
        prompt=prompts,
        max_tokens=st.integers(1, 20),
        namespace=st.sampled_from(["", "", "a", "b"]),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        n=st.sampled_from([1, 1, 2, 4]),
    )
    def add_fresh(self, prompt: list[int], max_tokens: int, namespace: str, priority: int, n: int) -> None:
        self._add(prompt, max_tokens, namespace=namespace, priority=priority, n=n)

    @precondition(lambda self: self.history)
    @rule(data=st.data(), seconds=st.sampled_from([None, 1.0]))
    def pin_or_unpin(self, data: st.DataObject, seconds: float | None) -> None:
        """Pin what happens to be cached of an earlier prompt, or let a pin go, or let its time pass."""
        keeper = self.driver.keeper
        self.time += data.draw(st.sampled_from([0.0, 0.6]))
        if keeper.pins() and data.draw(st.booleans()):
            keeper.unpin(data.draw(st.sampled_from(keeper.pins())).pin_id)
        else:
            with contextlib.suppress(InvalidRequestError):  # more than may be pinned
                keeper.pin(data.draw(st.sampled_from(self.history[-6:]))[:], data.draw(st.sampled_from(["", "a"])), seconds)
        self.driver.check()

    @precondition(lambda self: self.history)
    @rule(data=st.data(), share=st.sampled_from([0.5, 0.9, 1.0]))
    def resize_or_share(self, data: st.DataObject, share: float) -> None:
        """A smaller or larger pool; now and then a prefix is declared no secret."""
        if self.driver.cache.sharing and data.draw(st.sampled_from([False] * 4 + [True])):
            self.driver.keeper.share(data.draw(st.sampled_from(self.history[-6:])))
        with contextlib.suppress(InvalidRequestError):  # less than what is open may need
            self.driver.keeper.resize(int(self.driver.cache.pool.num_pages * share))
        self.driver.check()

    @precondition(lambda self: self.history)
    @rule(data=st.data(), rest=prompts, max_tokens=st.integers(1, 20))
    def add_sharing_a_prefix(self, data: st.DataObject, rest: list[int], max_tokens: int) -> None:
        earlier = data.draw(st.sampled_from(self.history[-6:]))
        cut = data.draw(st.integers(0, len(earlier)))
        self._add(earlier[:cut] + rest, max_tokens)

    @precondition(lambda self: self.history)
    @rule(data=st.data(), max_tokens=st.integers(1, 20), copies=st.integers(1, 3))
    def add_again(self, data: st.DataObject, max_tokens: int, copies: int) -> None:
        """An exact repeat, or an earlier prompt with its output: the next turn."""
        earlier = list(data.draw(st.sampled_from(self.history[-6:])))
        for _ in range(copies):
            self._add(earlier, max_tokens)

    @rule(num_steps=st.integers(1, 10), fail_at=st.one_of(st.none(), st.none(), st.none(), st.floats(0, 1)))
    def step(self, num_steps: int, fail_at: float | None) -> None:
        """Some steps, of which the last may fail."""
        for i in range(num_steps):
            self.driver.step(fail_at=fail_at if i == num_steps - 1 else None)
            self.driver.check()

    @precondition(lambda self: self.driver.clients)
    @rule(data=st.data(), keep=st.booleans(), reset=st.sampled_from([False] * 9 + [True]))
    def cancel(self, data: st.DataObject, keep: bool, reset: bool) -> None:
        """One request ends early; now and then the model's weights change."""
        self.driver.cancel(data.draw(st.sampled_from(list(self.driver.clients.values()))), keep=keep)
        if reset:
            self.driver.reset()
        self.driver.check()

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.run(enough_steps(list(self.driver.clients.values()), self.driver.budget))
            assert self.driver.cache.pool.num_held == self.driver.keeper.stats()["num_pinned_pages"]


def enough_steps(clients: list[Client], budget: int) -> int:
    """A bound on the steps that any load may take: as if each ran alone, and were computed again from nothing three times."""
    return 10 + sum(4 * (-(-client.seq.num_known // budget) + client.max_tokens) for client in clients)


class CollidingCacheMachine(CacheMachine):
    """With a hash of one bit, nearly every lookup collides: hits may be missed, contents never wrong."""

    hash_bytes = staticmethod(one_bit)


_settings = {"deadline": None, "suppress_health_check": list(HealthCheck)}
TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=700 if SOAK else 60, stateful_step_count=100 if SOAK else 30, **_settings)
TestCollidingCache = CollidingCacheMachine.TestCase
TestCollidingCache.settings = settings(max_examples=300 if SOAK else 30, stateful_step_count=100 if SOAK else 30, **_settings)
