"""Many callers over one cache: namespaces, the region they share, forks, priorities, fair shares, pins and a pool that shrinks."""

from __future__ import annotations

from typing import Any

import pytest

from quire.errors import InvalidRequestError
from quire.policy.fairness import MAX_GIVEN_WAY
from quire.policy.groups import Group
from quire.policy.pins import MAX_PINNED_SHARE
from quire.policy.scheduler import MAX_SCORED
from tests.policy.oracle import Client, Driver, full, numbered, one_bit, sliding

B = 4
FULL = numbered(full(B))
HYBRID = numbered(full(B), sliding(B, 2 * B), sliding(B, 2 * B))
KINDS = [FULL, HYBRID, numbered(full(B), full(2 * B), sliding(4 * B, 9))]


def tokens(count: int, seed: int = 0) -> list[int]:
    return [(7 * i + 13 * seed + i * i % 5) % 97 for i in range(count)]


def run(driver: Driver, prompt: list[int], max_tokens: int = 1, **options: object) -> Client:
    client = driver.add(prompt, max_tokens, **options)  # type: ignore[arg-type]
    driver.run(1000)
    return client


# -- namespaces -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", KINDS)
def test_a_hit_in_another_namespace_does_not_exist(groups: tuple[Group, ...]) -> None:
    driver = Driver(groups, 300)
    whole = driver.cache.unit * (39 // driver.cache.unit)
    for namespace in ("", "a", "b"):
        assert run(driver, tokens(40), namespace=namespace).num_hit == 0
        assert run(driver, tokens(40), namespace=namespace).num_hit >= whole


@pytest.mark.parametrize("wanted", [{"scores": True}, {"pooling": "mean"}])
def test_what_needs_its_whole_prompt_computed_is_not_let_among_what_others_computed(wanted: dict[str, Any]) -> None:
    keeper = Driver(FULL, 300).keeper
    with pytest.raises(AssertionError):
        keeper.sequence(tokens(5), "a", **wanted)
    alone = keeper.sequence(tokens(5), "a", own_root="request 0", **wanted)
    assert alone.own_root and {name: getattr(alone, name) for name in wanted} == wanted


@pytest.mark.parametrize("groups", KINDS)
def test_what_the_operator_declares_is_shared_and_nothing_behind_it(groups: tuple[Group, ...]) -> None:
    driver = Driver(groups, 300)
    unit = driver.cache.unit
    system = tokens(2 * unit + 1)
    assert driver.keeper.share(system) == 2 * unit
    first = run(driver, system + tokens(30, 1), namespace="a")
    again = run(driver, system + tokens(30, 1), namespace="a")
    other = run(driver, system + tokens(30, 1), namespace="b")
    assert first.num_hit == 0 and again.num_hit >= 2 * unit + 30 // unit * unit - unit
    assert other.num_hit == 2 * unit, "the shared part, and nothing of what followed it elsewhere"


def test_a_prompt_that_leaves_the_shared_region_early_is_private_from_there() -> None:
    driver = Driver(FULL, 300)
    driver.keeper.share(tokens(6 * B))
    run(driver, tokens(6 * B) + [1], namespace="a")
    strayed = tokens(2 * B) + tokens(20, 5)
    assert run(driver, strayed, namespace="a").num_hit == 2 * B
    assert run(driver, strayed, namespace="b").num_hit == 2 * B
    assert run(driver, strayed, namespace="b").num_hit == len(strayed) - 1


def test_namespaces_with_colliding_hashes_do_not_meet_either() -> None:
    driver = Driver(FULL, 300, hash_bytes=one_bit)
    driver.keeper.share(tokens(2 * B))
    for namespace in ("a", "b", "c", "a", "b"):
        run(driver, tokens(30), 5, namespace=namespace)
        driver.check()


# -- forks ------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("num_prompt", [1, B - 1, B, 5 * B, 5 * B + 3])
def test_a_fork_computes_the_prompt_once_and_shares_its_pages(num_prompt: int, sharing: bool) -> None:
    driver = Driver(FULL, 500, sharing=sharing, vocab=1000)
    driver.add(tokens(num_prompt), 10, n=8)
    most = 0
    while driver.step() is not None:
        driver.check()
        most = max(most, driver.cache.pool.num_held)
    assert driver.num_computed == num_prompt + 8 * 9
    assert most <= -(-num_prompt // B) + 8 * (-(-10 // B) + 1)
    assert sharing or not driver.cache.pool.num_cached, "nobody else may hit them, so nothing stays"


@pytest.mark.parametrize("groups", KINDS)
def test_a_fork_draws_as_separate_requests_would(groups: tuple[Group, ...]) -> None:
    together, apart = Driver(groups, 500, vocab=50), Driver(groups, 500, vocab=50, sharing=False)
    apart.prefixes = together.prefixes  # what the model sees decides what it draws
    first = together.add(tokens(21), 12, seed=3, n=4)
    sisters = {0: first}
    while together.step() is not None:
        together.check()
        sisters |= {client.seq.arrival: client for client in together.clients.values()}
    for i, sister in sisters.items():
        assert sister.seq.tokens == run(apart, tokens(21), 12, seed=3 + i).seq.tokens
    assert len(sisters) == 4


def test_a_sister_that_does_not_fit_waits() -> None:
    driver = Driver(FULL, 12, vocab=1000)
    driver.add(tokens(6 * B), 4 * B, n=8)
    driver.run(1000)
    assert driver.scheduler.num_preemptions > 0 or driver.num_steps > 3 * 4 * B


# -- ranks ------------------------------------------------------------------------------------------------------------------------------------


def order_of_starts(driver: Driver) -> list[int]:
    started: list[int] = []
    while (plan := driver.step()) is not None:
        started += [work.sequence.arrival for work in plan.works if work.sequence.arrival not in started]
    return started


def test_higher_priorities_start_first() -> None:
    driver = Driver(FULL, 200, max_sequences=1)
    for priority in (0, 5, -1, 5, 0):
        driver.add(tokens(5, priority), 2, priority=priority)
    assert order_of_starts(driver) == [1, 3, 0, 4, 2]


@pytest.mark.parametrize("limits", [{"budget": 3}, {"budget": 3, "max_sequences": 8}, {"budget": 64, "max_sequences": 3}])
def test_a_higher_priority_need_not_wait_until_one_ends_where_as_many_run_as_may(limits: dict[str, int]) -> None:
    """As many as there are tokens in a step is as many as there may be."""
    driver = Driver(FULL, 200, **limits)
    low = [driver.add(tokens(5, seed), 40) for seed in range(5)]
    while sum(client.num_drawn > 0 for client in low) < 3:
        driver.step()
    high = driver.add(tokens(5, 9), 5, priority=1)
    for _ in range(10):  # five for its prompt, where others have all but one token of a step, and four more for what it draws
        driver.step()
    assert high.done and driver.scheduler.num_preemptions == 1 and not any(client.done for client in low)
    driver.run(1000)
    assert all(client.done for client in low) and driver.scheduler.num_preemptions == 1, "of one priority nobody gives way"


def test_nobody_gives_way_to_what_waits_for_rows_of_logits() -> None:
    driver = Driver(FULL, 400, budget=MAX_SCORED + 1, max_sequences=2)
    scheduler = driver.scheduler
    plain, *scored = (driver.keeper.sequence(tokens(3 * MAX_SCORED if i else 2, i), "", arrival=i, own_root=str(i), scores=i > 0) for i in range(3))
    scheduler.add(plain)
    plan = scheduler.plan()
    assert plan is not None
    scheduler.commit(plan)
    plain.tokens.append(1)
    for seq, priority in zip(scored, (2, 1), strict=True):
        scheduler.add(seq, priority=priority)
    plan = scheduler.plan()
    assert plan is not None and [(work.sequence, work.num_tokens) for work in plan.works] == [(plain, 1), (scored[0], MAX_SCORED)]
    assert scored[1].waits_for == "logits"


def test_a_higher_priority_takes_the_place_of_a_lower_one() -> None:
    driver = Driver(FULL, 12, budget=64, vocab=1000)
    low = [driver.add(tokens(4 * B, i), 20) for i in range(2)]
    driver.step()
    high = driver.add(tokens(8 * B, 9), 4, priority=1)
    driver.step()
    assert high.num_starts == 1 and sum(client.seq.num_preemptions for client in low) >= 1
    driver.run(500)


def test_a_long_queue_of_one_namespace_does_not_keep_another_waiting() -> None:
    driver = Driver(FULL, 400, max_sequences=2, budget=64)
    for i in range(20):
        driver.add(tokens(10, i), 5, namespace="busy")
    driver.step()
    late = driver.add(tokens(10, 50), 5, namespace="quiet")
    started = order_of_starts(driver)
    assert started.index(late.seq.arrival) <= 3, started


def test_a_namespace_beyond_its_share_of_pages_gives_way() -> None:
    driver = Driver(FULL, 20, budget=64, vocab=1000)
    greedy = [driver.add(tokens(8 * B, i), 8, namespace="greedy") for i in range(2)]
    driver.step()
    small = driver.add(tokens(5 * B, 9), 2, namespace="small")
    driver.step()
    assert small.num_starts == 1 and [client.seq.num_preemptions for client in greedy] == [0, 1]
    driver.run(500)


def test_memory_for_little_more_than_one_request_serves_twenty() -> None:
    """No livelock: what is computed again is bounded."""
    for names in (["a"], ["a", "b", "c"]):
        driver = Driver(FULL, 12, budget=16, vocab=1000)
        clients = [driver.add(tokens(20, i), 20, namespace=names[i % len(names)], priority=i % 2) for i in range(20)]
        driver.run(4000)
        assert max(client.seq.num_preemptions for client in clients) <= MAX_GIVEN_WAY + 2
        assert driver.num_computed <= 2 * 20 * 39


# -- pins and size ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", KINDS)
def test_a_pinned_prompt_outlives_pressure(groups: tuple[Group, ...]) -> None:
    driver = Driver(groups, 80, budget=1000)
    run(driver, tokens(20))
    pin = driver.keeper.pin(tokens(20), "", None)
    assert pin is not None and driver.keeper.stats()["num_pinned_pages"] == pin.num_pages > 0
    for seed in range(10):
        run(driver, tokens(60, seed + 1))
    assert run(driver, tokens(20)).num_hit >= 20 // driver.cache.unit * driver.cache.unit - driver.cache.unit
    driver.keeper.unpin(pin.pin_id)
    with pytest.raises(InvalidRequestError, match="pin=1: must be a pin"):
        driver.keeper.unpin(pin.pin_id)
    for seed in range(10):
        run(driver, tokens(60, seed + 1))
    assert run(driver, tokens(20)).num_hit == 0


def test_pins_expire_and_are_capped() -> None:
    driver = Driver(FULL, 40, budget=1000)
    now = [0.0]
    driver.keeper._pins._clock = lambda: now[0]
    assert driver.keeper.pin(tokens(20), "", None) is None, "it is not cached"
    run(driver, tokens(20))
    run(driver, tokens(80, 1))
    driver.keeper.pin(tokens(20), "", 5.0)
    with pytest.raises(InvalidRequestError, match=f"at most {int(40 * MAX_PINNED_SHARE)} pages"):
        driver.keeper.pin(tokens(80, 1), "", None)
    now[0] = 4.9
    assert len(driver.keeper.pins()) == 1
    now[0] = 5.0
    assert driver.keeper.pins() == [] and driver.keeper.stats()["num_pinned_pages"] == 0
    driver.add(tokens(25 * B, 7), 1)
    with pytest.raises(InvalidRequestError, match="at most 15 pages"):
        driver.keeper.pin(tokens(80, 1), "", None)
    driver.run(10)


def test_the_pool_shrinks_under_what_runs_and_grows_again() -> None:
    driver = Driver(FULL, 40, budget=64, vocab=1000)
    clients = [driver.add(tokens(20, i), 20) for i in range(4)]
    for _ in range(5):
        driver.step()
    with pytest.raises(InvalidRequestError, match="cache_bytes=9: must be from 10, what open requests"):
        driver.keeper.resize(9)
    with pytest.raises(InvalidRequestError, match="cache_bytes=41"):
        driver.keeper.resize(41)
    assert driver.keeper.resize(12) == 12 == driver.cache.pool.num_usable
    driver.check()
    assert sum(client.seq.num_preemptions for client in clients) >= 2
    driver.step()
    assert driver.keeper.resize(40) == 40
    driver.run(500)
    assert driver.keeper.stats()["num_retired_pages"] == 0


def test_the_pool_makes_room_for_others_and_takes_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are of one byte here, so that a byte is a page."""
    driver = Driver(FULL, 100, budget=1000)
    driver.keeper._reserve_bytes = 50
    available, now = [1000], [0.0]
    monkeypatch.setattr("quire.engine.keeper.available_bytes", lambda: available[0])
    monkeypatch.setattr("quire.engine.keeper.time.monotonic", lambda: now[0])

    def usable_when(num_bytes: int) -> int:
        available[0] = num_bytes
        now[0] += 1.0
        driver.keeper.tend()
        driver.check()
        return driver.cache.pool.num_usable

    run(driver, tokens(80))
    assert usable_when(50) == 100
    assert usable_when(40) == 90 and usable_when(20) == 60
    assert usable_when(80) == 60, "not at once: it would go to and fro"
    assert usable_when(140) == 80 and usable_when(1000) == 100
    driver.keeper.resize(70)
    assert usable_when(1000) == 70, "never beyond what was asked for"
    driver.add(tokens(40 * B, 1), 1)
    assert usable_when(0) == 40, "never below what is open may need"
    driver.run(10)


def test_a_pinned_part_of_a_page_may_still_be_filled_by_its_owner() -> None:
    driver = Driver(FULL, 40, vocab=1000)
    driver.add(tokens(B + 2), 10)
    driver.step()
    pin = driver.keeper.pin(tokens(B + 2), "", None)
    assert pin is not None and pin.num_tokens == B + 2
    driver.run(100)
    assert run(driver, tokens(B + 2)).num_hit == B + 1
    driver.keeper.unpin(pin.pin_id)
    driver.check()


@pytest.mark.parametrize("num_before", range(B))
def test_a_pinned_part_of_a_page_outlives_a_twin_that_fills_its_own_first(num_before: int) -> None:
    """Of two sequences that end up sharing one page, which is first depends on when they came."""
    driver = Driver(FULL, 40, vocab=1000)
    for _ in range(num_before):
        run(driver, tokens(1, 9))
    driver.add(tokens(B + 2), 10)
    driver.step()
    pin = driver.keeper.pin(tokens(B + 2), "", None)
    driver.add(tokens(B + 2), 10)
    driver.run(100)
    for seed in range(10):
        run(driver, tokens(60, seed + 1))
    assert pin is not None and run(driver, tokens(B + 2)).num_hit == pin.num_tokens - 1
    driver.keeper.unpin(pin.pin_id)
    driver.check()
