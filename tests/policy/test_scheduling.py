"""What the scheduler must hold: budgets, growth on demand, preemption that ends, bounds that are true, costs that do not grow with the cache."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from quire.errors import IntegrityError
from quire.policy.cache import PageCache
from quire.policy.groups import Group
from quire.policy.hits import HitFinder
from quire.policy.prefix import PrefixIndex, pack
from quire.policy.scheduler import MAX_DEFERRED, Outline, Scheduler
from quire.policy.sequence import Sequence
from tests.policy.oracle import SOAK, Driver, blake2b_128, chunked, full, numbered, one_bit, sliding

B = 4
FULL = numbered(full(B))
HYBRID = numbered(full(B), sliding(B, 8), sliding(B, 8))
KINDS = [FULL, HYBRID, numbered(full(B), chunked(B, 8)), numbered(sliding(B, 8)), numbered(full(2 * B), full(3 * B), sliding(B, 9))]


def tokens(num: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(num)]


def longest(groups: tuple[Group, ...], num_tokens: int) -> int:
    return PageCache(groups, 1).pages_to_finish(num_tokens)


def counting(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> Callable[[], int]:
    """Counts the calls of a method from here on."""
    original, calls = getattr(owner, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return lambda: calls[0]


# -- one step -----------------------------------------------------------------------------------------------------------------------------


def test_nothing_to_do_is_no_plan() -> None:
    assert Driver(FULL, 10).step() is None


def test_running_sequences_go_first_then_waiting_ones_in_order() -> None:
    driver = Driver(FULL, 200, budget=10)
    for seed in range(4):
        driver.add(tokens(6, seed), 9)
    assert [(w.sequence.arrival, w.num_tokens) for w in driver.step().works] == [(0, 6), (1, 4)]
    assert [(w.sequence.arrival, w.num_tokens) for w in driver.step().works] == [(0, 1), (1, 2), (2, 6), (3, 1)]
    assert [(w.sequence.arrival, w.num_tokens) for w in driver.step().works] == [(0, 1), (1, 1), (2, 1), (3, 5)]


def test_a_work_draws_when_it_reaches_what_is_known() -> None:
    driver = Driver(FULL, 100, budget=7)
    driver.add(tokens(15), 2)
    plans = []
    while (plan := driver.scheduler.plan()) is not None:
        plans.append((plan.works[0].num_tokens, plan.works[0].draws, plan.num_tokens))
        driver.scheduler.commit(plan)
        if plans[-1][1]:
            driver._draw(driver.clients[0])
    assert plans == [(7, False, 7), (7, False, 7), (1, True, 1), (1, True, 1)]


@pytest.mark.parametrize("groups", KINDS)
@pytest.mark.parametrize("budget", [1, 7, 64])
def test_pages_grow_on_demand(groups: tuple[Group, ...], budget: int) -> None:
    """The oracle checks every plan: a full group never has more pages than its tokens need. Here: never fewer steps' worth than that either."""
    driver = Driver(groups, 500, budget=budget, sharing=False)
    client = driver.add(tokens(50), 40)
    while not client.done:
        driver.step()
        for group, table in zip(groups, client.seq.tables, strict=True):
            assert len(table) in (0, -(-client.seq.num_committed // group.page_size))
    for group in groups:
        if group.kind == "full":
            assert client.peak_pages <= 90 * len(groups) // min(g.page_size for g in groups) + len(groups)


def test_max_sequences_is_a_bound() -> None:
    driver = Driver(FULL, 500, budget=64, max_sequences=3)
    for seed in range(10):
        driver.add(tokens(5, seed), 5)
    while driver.step() is not None:
        assert driver.scheduler.num_running <= 3


def test_a_bigger_request_in_front_is_not_overtaken_for_ever() -> None:
    """What does not fit waits at the front, and smaller ones behind it wait too."""
    driver = Driver(FULL, 20, budget=64)
    driver.add(tokens(40), 20)
    driver.step()
    big = driver.add(tokens(60, 1), 2)
    small = [driver.add(tokens(4, seed), 4) for seed in range(2, 30)]
    driver.run(200)
    assert big.num_starts == 1 and all(client.done for client in small)


# -- memory -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [*KINDS, numbered(sliding(B, 1)), numbered(sliding(1, 7)), numbered(chunked(B, 6), full(B))])
@pytest.mark.parametrize("budget", [1, 3, 16, 1000])
def test_pages_to_finish_is_a_true_bound(groups: tuple[Group, ...], budget: int) -> None:
    """In a pool of just that size a request ends, alone or first hit by what others left; and it never holds more."""
    for num_prompt, max_tokens in ((1, 1), (1, 30), (17, 1), (33, 20), (80, 3)):
        bound = longest(groups, num_prompt + max_tokens - 1)
        for sharing in (True, False):
            driver = Driver(groups, bound, budget=budget, sharing=sharing)
            for seed in (0, 1, 0, 0):
                client = driver.add(tokens(num_prompt, seed), max_tokens)
                driver.run(num_prompt + max_tokens + 5)
                assert client.peak_pages <= bound and driver.scheduler.num_preemptions == 0
        roomy = Driver(groups, 1000, budget=budget, sharing=False)
        client = roomy.add(tokens(num_prompt), max_tokens)
        roomy.run(num_prompt + max_tokens + 5)
        assert client.peak_pages <= bound


def test_the_bound_is_not_far_above_what_is_needed() -> None:
    """The worst case happens: a step that moves the window wholly."""
    groups = numbered(sliding(B, 9))
    driver = Driver(groups, 1000, budget=11, sharing=False)
    client = driver.add(tokens(60), 2)
    driver.run(100)
    assert longest(groups, 61) - 3 <= client.peak_pages <= longest(groups, 61)


def test_what_can_never_fit_is_a_bug_by_the_time_it_is_planned() -> None:
    """The engine refuses such a request; a scheduler that is given one says so instead of looping."""
    cache = PageCache(FULL, 3)
    scheduler = Scheduler(cache, max_tokens_per_step=64, max_sequences=4)
    scheduler.add(Sequence(0, tokens(13), cache.namespaces.root("")))
    with pytest.raises(IntegrityError, match="no progress"):
        scheduler.plan()


def test_nothing_starts_that_would_have_to_give_way_at_once() -> None:
    """A start leaves one page of each group for every sequence that runs."""
    driver = Driver(FULL, 10, budget=64)
    driver.add(tokens(4 * B), 2 * B)
    driver.step()
    late = driver.add(tokens(5 * B, 1), 2)  # just fits beside the five pages that the other has by then
    driver.run(30)
    assert driver.scheduler.num_preemptions == 0 and late.num_starts == 1


@pytest.mark.parametrize("groups", [FULL, numbered(full(B), chunked(B, 8)), numbered(full(B), full(2 * B))])
def test_a_preempted_sequence_resumes_from_hits(groups: tuple[Group, ...]) -> None:
    """Two long generations in a pool for one and a half: the newer gives way, and what it computes again is what the older needed room for."""
    driver = Driver(groups, int(1.5 * longest(groups, 199)), budget=64, vocab=1000)
    old, new = driver.add(tokens(20), 180), driver.add(tokens(20, 1), 180)
    driver.run(600)
    assert old.seq.num_preemptions == 0 and old.num_computed == 199
    assert 1 <= new.seq.num_preemptions <= 2 and new.num_hit >= 80
    assert new.num_computed + new.num_hit <= 199 * (1 + new.seq.num_preemptions)
    assert new.num_computed <= 1.5 * 199


@pytest.mark.parametrize("groups", [*KINDS, numbered(full(B), sliding(B, 6)), numbered(full(B), sliding(1, 6), chunked(2, 10))])
def test_what_a_sequence_holds_is_always_enough_to_resume_from(groups: tuple[Group, ...]) -> None:
    """Wherever it stands, and with nothing else cached: no window has given back a page that its last whole pages need to be hit."""
    unit = PageCache(groups, 1).unit
    for num_prompt in (1, 13, 60):
        for num_steps in range(2, 30, 3):
            driver = Driver(groups, 300, budget=64)
            client = driver.add(tokens(num_prompt), 60)
            for _ in range(num_steps):
                driver.step()
            pool = driver.cache.pool
            pool.release(pool.take(pool.num_available))  # whatever was cached is gone
            committed = client.seq.num_committed
            driver.scheduler.preempt_all()
            driver.step()
            assert client.num_hit == (committed if len({g.page_size for g in groups}) == 1 else committed // unit * unit)


@pytest.mark.parametrize("groups", KINDS)
@pytest.mark.parametrize("sharing", [True, False])
def test_a_pool_for_little_more_than_one_serves_twenty(groups: tuple[Group, ...], sharing: bool) -> None:
    driver = Driver(groups, int(1.2 * longest(groups, 64 + 39)), budget=32, sharing=sharing, vocab=1000)
    clients = [driver.add(tokens(24 + 2 * seed, seed), 40) for seed in range(20)]
    needed = sum(client.seq.num_known + 39 for client in clients)
    driver.run(3000)
    assert driver.num_computed <= (1.5 if sharing else 2.5) * needed, "computed again and again"
    for client in clients:
        assert client.seq.num_preemptions <= 6


@pytest.mark.parametrize("seed", range(300 if SOAK else 12))
def test_every_request_ends_under_random_load(seed: int) -> None:
    """Random groups, pools, budgets, arrivals, prefixes, cancels and failures; each request ends within steps in proportion to the work."""
    rng = random.Random(seed)

    def group() -> Group:
        size, reach = rng.choice([1, 2, 3, 4, 8, 16]), rng.choice([1, 2, 5, 8, 16, 17, 40])
        return rng.choice([full(size), sliding(size, reach), chunked(size, reach)])

    groups = numbered(*[group() for _ in range(rng.choice([1, 1, 2, 4]))])
    if rng.random() < 0.5:
        groups = numbered(*[Group(0, groups[0].page_size, g.window, g.chunk, ()) for g in groups], full(groups[0].page_size))
    most = rng.choice([30, 120])
    driver = Driver(
        groups,
        int(longest(groups, most) * rng.choice([1, 1.2, 2, 8])),
        budget=rng.choice([1, 2, 7, 33, 500]),
        max_sequences=rng.choice([1, 2, 64]),
        hash_bytes=rng.choice([blake2b_128, blake2b_128, one_bit, lambda data: b""]),
        vocab=rng.choice([1, 2, 50]),
    )
    earlier: list[list[int]] = [[0]]
    for _ in range(60):
        if rng.random() < 0.4 and len(driver.clients) < 30:
            max_tokens = rng.randint(1, 20)
            prompt = (rng.choice(earlier)[: rng.randint(0, most)] + tokens(rng.randint(1, 20), rng.randrange(3)))[-(most - max_tokens) :]
            for _ in range(rng.choice([1, 1, 4])):
                earlier.append(driver.add(prompt, max_tokens, seed=rng.randrange(2)).seq.tokens)
        driver.step(fail_at=rng.random() if rng.random() < 0.03 else None)
        if driver.clients and rng.random() < 0.03:
            driver.cancel(rng.choice(list(driver.clients.values())), keep=rng.random() < 0.5)
        driver.check()
    driver.run(10 + sum(4 * (-(-client.seq.num_known // driver.budget) + client.max_tokens) for client in driver.clients.values()))
    assert driver.cache.pool.num_held == 0


# -- costs --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", KINDS)
def test_a_lookup_is_linear_in_the_prompt_and_blind_to_the_cache(groups: tuple[Group, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """One lookup for each page and page size, whatever is cached; and comparing tokens never walks up the chain again."""
    unit = PageCache(groups, 1).unit
    pages = sum(400 // unit * unit // size for size in {g.page_size for g in groups})
    lookups = []
    for num_others in (0, 40):
        driver = Driver(groups, 8000, budget=1000)
        for seed in range(num_others):
            driver.add(tokens(100, seed + 1), 1)
            driver.run(10, check=False)
        for _ in range(2):
            with monkeypatch.context() as patch:
                calls = counting(patch, PrefixIndex, "find")
                driver.add(tokens(401), 1)
                driver.scheduler._admit(Outline(1))
                lookups.append(calls())
            driver.run(10, check=False)
    first_miss = 1 if any(group.kind == "full" for group in groups) else pages
    assert lookups == [first_miss, pages] * 2


def test_comparing_tokens_is_linear_in_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each lookup compares one page: what matched before is the index's own key, where the walk up stops."""

    class Counted(bytes):
        compared = 0

        def __ne__(self, other: object) -> bool:
            Counted.compared += 1
            return bytes.__ne__(self, other)

    driver = Driver(HYBRID, 2000, budget=1000)
    for seed in range(3):  # each computes the last pages of the prefix anew, behind pages of the one before
        driver.add(tokens(200) + tokens(200, seed), 1)
        driver.run(10, check=False)
    monkeypatch.setattr("quire.policy.sequence.pack", lambda tokens: Counted(pack(tokens)))
    client = driver.add(tokens(200) + tokens(200, 2), 1)
    driver.run(10, check=False)
    assert client.num_hit == 399 and Counted.compared <= 3 * 400 // B


def test_cutting_a_hit_is_linear_in_the_pages() -> None:
    """One sliding group has every page, the other none: each shorter length must not look at the whole window again."""
    groups = numbered(sliding(1, 300), sliding(1, 300), full(1))

    class Counted(list[int]):
        reads = 0

        def __getitem__(self, i: Any) -> Any:
            Counted.reads += 1
            return super().__getitem__(i)

    num = 1000
    found = [Counted([1] * num), Counted([-1] * num), Counted([1] * num)]
    assert HitFinder(groups, PrefixIndex(), blake2b_128)._longest_covered(found, num) == 0
    assert Counted.reads <= 2 * num + 2


def test_a_queue_costs_a_plan_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 000 may wait. A step that cannot start the first of them does not look at it again until something has changed, nor at the others."""
    driver = Driver(FULL, 30, budget=64)
    driver.add(tokens(8), 100)
    driver.step()
    for seed in range(1, 500):
        driver.add(tokens(110, seed), 1)
    driver.step()
    matches = counting(monkeypatch, PageCache, "match")
    chains = counting(monkeypatch, Sequence, "chain")
    for _ in range(20):
        driver.step()
    assert matches() == 0 and chains() <= 20


def test_what_waits_for_the_same_prefix_is_looked_at_in_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(FULL, 4000, budget=256)
    shared = tokens(250)
    for seed in range(4 * MAX_DEFERRED):
        driver.add([*shared, seed], 2)
    asked = counting(monkeypatch, Scheduler, "_would_compute")
    driver.step()
    assert 0 < asked() <= MAX_DEFERRED
    assert [seq.arrival for seq in driver.scheduler._waiting] == list(range(1, 4 * MAX_DEFERRED)), "the order of the queue is kept"
    driver.run(1000, check=False)
    assert driver.num_computed <= 251 + 4 * MAX_DEFERRED * 4
