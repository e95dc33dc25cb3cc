"""What keeps everybody going: virtual time, how often one gives way, how much room one asks for then, and what is remembered of others."""

from __future__ import annotations

import pytest

from quire.policy.fairness import MAX_GIVEN_WAY, FairShares, to_give_way
from tests.policy.oracle import Driver, full, numbered
from tests.policy.test_tenants import tokens

B = 4
FULL = numbered(full(B))


def test_a_namespace_that_comes_late_claims_nothing_of_what_was_served_before() -> None:
    shares = FairShares()
    for i in range(100):
        shares.started(shares.rank(i, "a", 0, 100))
    assert shares.rank(100, "b", 0, 100).tag == 9900
    shares.idle()
    assert shares.rank(101, "a", 0, 100).tag == 0, "and with nothing open nobody owes anything"


def test_who_gave_way_often_enough_gives_way_no_more() -> None:
    driver = Driver(FULL, 40)
    low = driver.add(tokens(8), 8)
    driver.step()
    high = driver.add(tokens(8, 1), 8, priority=1)
    for times in range(MAX_GIVEN_WAY + 2):
        low.seq.num_preemptions = times
        assert to_give_way(high.seq, [low.seq], 40, 2) is (low.seq if times < 3 else None)
    low.seq.num_preemptions = 0
    driver.run(100)


def test_each_preemption_asks_for_twice_the_room() -> None:
    started = []
    for num_preemptions in range(6):
        driver = Driver(FULL, 16, budget=64, vocab=1000)
        driver.add(tokens(4 * B), 4 * B)
        driver.step()
        late = driver.add(tokens(4 * B, 1), 8 * B)
        driver.cache.match(late.seq, partial=False)  # as if it had run
        driver.cache.release(late.seq)
        late.seq.num_preemptions = num_preemptions
        driver.step()
        started.append(driver.scheduler.num_running == 2)
        driver.run(500)
        assert late.done
    # Of 16 pages at least 4 are held, 4 are wanted and 1 must stay free for who runs; beside these 2, 4, then 8, which it may still need.
    assert started == [True, True, True, False, False, False]


def test_a_partial_hit_that_leaves_no_room_is_given_up() -> None:
    """A copied page and its source may be just what is missing in a pool that holds no more than this one request."""
    driver = Driver(FULL, 21, budget=1000)
    driver.add(tokens(78), 3)
    driver.run(100)
    client = driver.add(tokens(71) + tokens(11, 5), 2)
    driver.run(100)
    assert client.done


def test_what_was_evicted_is_remembered_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.policy.prefix.MAX_EVICTED_REMEMBERED", 3)
    driver = Driver(FULL, 12)
    for seed in range(6):
        driver.add(tokens(8 * B, seed), 1)
        driver.run(100)
    assert len(driver.cache.index._evicted) == 3
