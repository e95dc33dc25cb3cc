"""Looking a prompt up: what it would find in the cache, and why not more."""

from __future__ import annotations

import pytest

from quire.policy.groups import Group
from tests.policy.oracle import Driver, carried, full, numbered, sliding

B = 4
FULL = numbered(full(B))
HYBRID = numbered(full(B), sliding(B, 2 * B), sliding(B, 2 * B))
KINDS = [FULL, HYBRID, numbered(full(B), full(2 * B), sliding(4 * B, 9))]


def tokens(count: int, seed: int = 0) -> list[int]:
    return [(7 * i + 13 * seed + i * i % 5) % 97 for i in range(count)]


def run(driver: Driver, prompt: list[int]) -> None:
    driver.add(prompt, 1)
    driver.run(1000)


@pytest.mark.parametrize("groups", KINDS)
def test_explaining_foresees_the_hit_and_takes_nothing(groups: tuple[Group, ...]) -> None:
    driver = Driver(groups, 300)
    run(driver, tokens(45))
    for prompt in (tokens(45), tokens(60), tokens(30) + tokens(30, 2), tokens(9, 3)):
        held, cached = driver.cache.pool.num_held, list(driver.cache.pool.cached_pages())
        told = driver.keeper.explain(prompt, "")
        assert (held, cached) == (driver.cache.pool.num_held, list(driver.cache.pool.cached_pages()))
        client = driver.add(prompt, 1)
        driver.step()
        assert client.num_hit == told.cached_tokens and told.fits
        driver.run(100)


def test_why_a_prompt_missed() -> None:
    driver = Driver(FULL, 30, budget=1000)
    explain = driver.keeper.explain
    assert explain(tokens(20), "").reason == "never seen"
    run(driver, tokens(20))
    told = explain([*tokens(10), 96, *tokens(20)], "")
    assert (told.miss_index, told.reason) == (10, "never seen")
    assert explain(tokens(20), "").miss_index is None
    assert (explain(tokens(20), "b").miss_index, explain(tokens(20), "b").reason) == (0, "other namespace")
    run(driver, tokens(29 * B, 1))
    assert explain(tokens(20), "").reason == "evicted"


def test_what_was_seen_where_no_state_is_kept_is_not_called_never_seen() -> None:
    """States are kept at the ends of pages and of texts alone."""
    driver = Driver(numbered(full(B), carried(B)), 30, budget=1000)
    run(driver, tokens(2 * B + 3))

    def explain(prompt: list[int], namespace: str = "") -> tuple[int | None, str | None]:
        told = driver.keeper.explain(prompt, namespace)
        return told.miss_index, told.reason

    assert explain([*tokens(2 * B + 2), 96, 96]) == (2 * B, "not kept")
    assert explain([*tokens(2 * B + 2), *[96] * B]) == (2 * B, "not kept")
    assert explain(tokens(2 * B + 3)) == (2 * B, "not kept"), "its last token must be computed, and no state is before it"
    assert explain([*tokens(2 * B + 3), 96, 96]) == (2 * B + 3, "never seen"), "a hit at the very end, behind which nothing was"
    assert explain([*tokens(2 * B), 96, 96]) == (2 * B, "never seen")
    assert explain([96, *tokens(3 * B)]) == (0, "never seen")
    assert explain([*tokens(3), 96, 96], "b") == (0, "never seen"), "nobody learns from another namespace's parts of pages"
    assert explain(tokens(2 * B + 3), "b") == (0, "other namespace")
    for seed in (1, 2):
        run(driver, tokens(22 * B, seed))
    assert explain(tokens(2 * B + 3)) == (0, "evicted")


@pytest.mark.parametrize("kind", [carried(B), sliding(B, 2 * B)])
def test_what_a_long_step_did_not_keep_is_not_called_evicted(kind: Group) -> None:
    """Its whole pages are there, and not the states or the windows behind them, for which there was no plenty of room."""
    driver = Driver(numbered(full(B), *[kind] * 3), 30, budget=1000)
    run(driver, tokens(8 * B))
    told = driver.keeper.explain([*tokens(3 * B), *[96] * B], "")
    assert (told.miss_index, told.reason) == (0, "not kept")


def test_what_does_not_fit_is_told() -> None:
    driver = Driver(FULL, 10, budget=1000)
    driver.add(tokens(6 * B), 2)
    driver.step()
    told = driver.keeper.explain(tokens(5 * B, 1), "")
    assert (told.pages_needed, told.fits) == (5, False)
    assert driver.keeper.explain(tokens(3 * B, 1), "").fits
