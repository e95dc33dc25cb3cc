"""What is kept beyond what a sequence needs, which of it leaves first, and what a step that is planned gets back from one that gives way."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from quire.policy.cache import PageCache
from quire.policy.groups import Group
from quire.policy.plan import StepPlan
from quire.policy.scheduler import MAX_SCORED, Outline
from quire.policy.sequence import Sequence
from tests.policy.oracle import Driver, chunked, full, numbered, sliding
from tests.policy.test_scheduling import tokens

B = 4
WINDOW = 9


class Watched(Driver):
    """Remembers of each sequence the pages it ever had in its last group: place -> page, in the order in which they came."""

    def _check_plan(self, plan: StepPlan) -> None:
        super()._check_plan(plan)
        for work in plan.works:
            pages = self.had.setdefault(work.sequence.arrival, {})
            pages.update({i: page_id for i, page_id in enumerate(work.sequence.tables[-1]) if page_id >= 0})

    def __init__(self, groups: Iterable[Group], num_pages: int, **options: Any) -> None:
        super().__init__(groups, num_pages, **options)
        self.had: dict[int, dict[int, int]] = {}


@pytest.mark.parametrize("num_hit", [0, 16 * B])
@pytest.mark.parametrize("num_prompt", [30 * B, 30 * B + 1, 30 * B + 3])
@pytest.mark.parametrize("group", [sliding(B, WINDOW), chunked(B, WINDOW)])
def test_of_pages_behind_a_window_those_at_the_ends_of_prompt_and_hit_leave_last(group: Group, num_prompt: int, num_hit: int) -> None:
    """They are as young as any page. All others leave before everything that is cached, who came behind the window last first of all."""
    driver = Watched(numbered(full(B), group), 400, budget=B)
    for first in (tokens(num_hit, 1) + tokens(1, 2), tokens(9 * B, 3)):
        driver.add(first)
        driver.run(100)
    older = list(driver.cache.pool.cached_pages())
    client = driver.add(tokens(num_hit, 1) + tokens(num_prompt - num_hit, 4), 12 * B)
    while client.seq.num_committed < num_prompt + 8 * B:
        driver.step()
    had, now = driver.had[client.seq.arrival], client.seq.tables[-1]
    assert client.num_hit == num_hit
    # The next turn's hit ends in the page that the prompt ends in, or before it, and sees a window from there.
    warm = {position // B for end in (num_prompt, num_hit) for position in range(end - WINDOW - B, end)}
    young = [page_id for i, page_id in had.items() if now[i] < 0 and i in warm]
    cold = [page_id for i, page_id in had.items() if now[i] < 0 and i not in warm]
    old = [page_id for page_id in older if page_id not in had.values() and not driver.cache.pool.references(page_id)]
    assert list(driver.cache.pool.cached_pages()) == [*reversed(cold), *old, *young]


@pytest.mark.parametrize("groups", [(sliding(B, WINDOW),), (sliding(B, WINDOW), full(B), sliding(B, WINDOW), chunked(B, 8))])
@pytest.mark.parametrize("sharing", [True, False])
def test_half_of_what_is_to_spare_keeps_pages_for_later_hits(groups: tuple[Group, ...], sharing: bool) -> None:
    """A long chunk moves the window past most of its own pages: those are kept as far as half the pages go that are not needed, the last ones."""
    groups, num_tokens = numbered(*groups), 40 * B
    entries = num_tokens // B
    needed = [entries - group.first_kept(num_tokens, B) for group in groups]
    for spare in (0, 1, 2, 7, 20, 2 * entries + 1, 1000):
        cache = PageCache(groups, sum(needed) + spare, sharing=sharing)
        seq = Sequence(0, tokens(num_tokens + 1), cache.namespaces.root(""))
        cache.match(seq)
        assert cache.grow(seq, num_tokens)
        optional, kept = spare // 2 if sharing else 0, dict[tuple[int, int], int]()
        for group, table in zip(groups, seq.tables, strict=True):
            mask, missing = (group.window, group.chunk), entries - needed[group.group_id]
            if mask not in kept:  # groups with one mask keep as much
                num_alike = sum((other.window, other.chunk) == mask for other in groups)
                kept[mask] = min(missing, optional // num_alike)
                optional -= kept[mask] * num_alike
            missing -= kept[mask]
            assert [page_id < 0 for page_id in table] == [True] * missing + [False] * (entries - missing)
        cache.check_integrity()
    cache = PageCache(groups, sum(needed) - 1, sharing=sharing)
    cache.match(seq := Sequence(0, tokens(num_tokens + 1), cache.namespaces.root("")))
    assert not cache.grow(seq, num_tokens) and cache.pool.num_available == sum(needed) - 1


def test_an_outline_gets_back_what_it_gave_to_one_that_gives_way() -> None:
    outline = Outline(100)
    scoring, plain, never = (
        Sequence(arrival, tokens(60), PageCache(numbered(full(B)), 1).namespaces.root(""), scores=arrival == 0) for arrival in range(3)
    )
    outline.put(scoring, 40)
    assert (outline.budget, outline.scores_left) == (60, MAX_SCORED - 40)
    outline.put(plain, 25)
    for dropped, left in ((never, (35, MAX_SCORED - 40)), (scoring, (75, MAX_SCORED)), (scoring, (75, MAX_SCORED)), (plain, (100, MAX_SCORED))):
        outline.drop(dropped)
        assert (outline.budget, outline.scores_left) == left and dropped.arrival not in outline.works
    assert not outline.works


def test_what_one_that_gives_way_would_have_computed_others_compute_in_that_step() -> None:
    driver = Driver(numbered(full(16)), 20, budget=8)
    best, worst = driver.add(tokens(12), 30, priority=2), driver.add(tokens(2, 1), 30)
    for _ in range(3):
        driver.step()
    middle = driver.add(tokens(60, 2), 1, priority=1)
    for _ in range(3):
        driver.step()
    driver.cache.pool.take_aside(driver.cache.pool.num_available)
    assert (best.seq.num_committed, best.seq.capacity, middle.seq.num_committed, middle.seq.capacity) == (16, 16, 18, 32)
    plan = driver.step()  # the worst has room and a token of its own in the step, until the best finds no page
    assert plan is not None and worst.seq.num_preemptions == 1
    assert [(work.sequence, work.num_tokens) for work in plan.works] == [(best.seq, 1), (middle.seq, 8 - 1)]


@pytest.mark.parametrize("drafts", [0, 15])
def test_slots_of_the_whole_context_all_run(drafts: int) -> None:
    """A sequence whose page will hold all it comes to needs no other: with pages kept for it half of the slots never ran."""
    driver = Driver(numbered(full(64), sliding(64, 20)), 2 * 6, max_sequences=6, drafts=drafts)
    for _ in range(9):
        driver.add(tokens(10), 30)
    driver.step()
    assert driver.scheduler.num_running == 6
    driver.run(400)
    assert driver.scheduler.num_preemptions == 0
