"""What prefix sharing must do: whole pages shared, parts copied, equal pages merged, windows given back, heads outliving tails."""

from __future__ import annotations

import random

import pytest

from quire.policy.groups import Group
from quire.policy.lookup import find
from quire.policy.prefix import PrefixKey
from tests.policy.oracle import Driver, carried, chunked, full, numbered, one_bit, sliding

B = 4
FULL = numbered(full(B))
HYBRID = numbered(full(B), sliding(B, 8), sliding(B, 8))
KINDS = [FULL, HYBRID, numbered(full(B), chunked(B, 8)), numbered(sliding(B, 8)), numbered(full(2 * B), full(3 * B), sliding(B, 9))]


def tokens(num: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(num)]


def run(driver: Driver, prompt: list[int], max_tokens: int = 1) -> int:
    """Run one request alone; returns how many tokens its first step found in the cache."""
    client = driver.add(prompt, max_tokens)
    driver.run(1000)
    assert client.num_hit + client.num_computed == len(prompt) + max_tokens - 1
    return client.num_hit


@pytest.mark.parametrize("groups", KINDS)
@pytest.mark.parametrize("num", [1, B - 1, B, B + 1, 6 * B - 1, 6 * B, 6 * B + 1, 12 * B, 12 * B + 1])
def test_a_repeat_hits_all_but_its_last_token(groups: tuple[Group, ...], num: int) -> None:
    """A hit may not reach the last token, whose logits are wanted. The part of a page counts where there is one page size."""
    driver = Driver(groups, 200, budget=1000, vocab=1000)
    assert run(driver, tokens(num)) == 0
    hit = run(driver, tokens(num))
    unit = driver.cache.unit
    assert hit == (num - 1 if unit == B else (num - 1) // unit * unit)
    assert driver.scheduler.num_cached_tokens == hit


@pytest.mark.parametrize("groups", [numbered(chunked(B, 2 * B)), numbered(sliding(B, 1)), numbered(chunked(B, B), sliding(2 * B, 1))])
def test_tokens_that_nobody_sees_any_more_are_no_hit_of_a_prompt_never_seen(groups: tuple[Group, ...]) -> None:
    """No group is full, and where a chunk begins none needs a page."""
    driver = Driver(groups, 200, budget=1000, vocab=1000)
    prompt, other = tokens(6 * B + 1), [*tokens(2 * B), *tokens(4 * B + 1, seed=1)]
    assert find(driver.cache, driver.keeper.sequence(prompt, "")).num_tokens == run(driver, prompt) == 0
    assert [run(driver, one) for one in (other, prompt, other)] == [2 * B, 6 * B, 6 * B]


@pytest.mark.parametrize("groups", [FULL, HYBRID])
def test_a_part_of_a_page_is_copied_and_its_source_kept_until_then(groups: tuple[Group, ...]) -> None:
    driver = Driver(groups, 100, budget=1000)
    prompt = tokens(3 * B)
    run(driver, prompt)
    other = driver.add([*prompt[: 2 * B + 2], 1, 2, 3])
    plan = driver.scheduler.plan()
    assert plan is not None and other.seq.num_committed == 2 * B + 2
    assert [copy.target for copy in plan.copies] == [table[2] for table in other.seq.tables]
    assert all(driver.cache.pool.references(copy.source) == 1 for copy in plan.copies)
    driver.scheduler.check_integrity()  # callable while the copies are on their way
    for copy in plan.copies:
        driver._copy(copy)
    driver._check_reads(plan)
    driver.scheduler.abandon(plan)
    driver.scheduler.check_integrity()


def test_a_running_prompt_shares_the_page_it_is_filling() -> None:
    """Four forks of one prompt: the first computes it, the others copy the part of its last page and compute one token each."""
    driver = Driver(HYBRID, 200, budget=1000, vocab=1000)
    clients = [driver.add(tokens(5 * B + 3), 12, seed=seed) for seed in range(4)]
    driver.run(1000)
    assert [client.num_hit for client in clients] == [0, *[5 * B + 2] * 3]
    assert driver.num_computed == 5 * B + 3 + 3 + 4 * 11


def test_a_part_longer_than_what_was_asked_and_a_part_that_differs() -> None:
    driver = Driver(FULL, 100, budget=1000)
    prompt = tokens(2 * B + 3)
    run(driver, prompt)
    assert run(driver, prompt[: 2 * B + 2]) == 2 * B + 1
    assert run(driver, [*prompt[: 2 * B + 1], 1, 1, 1]) == 2 * B + 1
    assert run(driver, [*prompt[: 2 * B], 1, 1, 1]) == 2 * B
    assert run(driver, [1, *prompt[1:]]) == 0


@pytest.mark.parametrize("groups", [FULL, HYBRID])
def test_the_next_turn_hits_prompt_and_output(groups: tuple[Group, ...]) -> None:
    driver = Driver(groups, 200, budget=1000, vocab=1000)
    client = driver.add(tokens(17), 30)
    driver.run(1000)
    assert run(driver, client.seq.tokens + tokens(9, 1)) == 17 + 30 - 1  # the last token drawn was never computed


@pytest.mark.parametrize("groups", [FULL, HYBRID])
def test_equal_pages_become_one(groups: tuple[Group, ...]) -> None:
    """Two that compute the same at the same time (the second came when the first had its pages half full) end up holding one page of each."""
    driver = Driver(groups, 200, budget=3 * B)
    first = driver.add(tokens(2), 40)
    driver.step()
    second = driver.add(tokens(2), 40)  # nothing of a page is there to wait for or to hit
    for _ in range(6 * B):
        driver.step()
        driver.check()
    done = min(first.seq.num_indexed, second.seq.num_indexed) // B
    assert done >= 4 and first.seq.tokens[: done * B] == second.seq.tokens[: done * B]
    for mine, other in zip(first.seq.tables, second.seq.tables, strict=True):
        assert mine[:done] == other[:done]
        assert all(driver.cache.pool.references(page_id) == 2 for page_id in mine[:done] if page_id >= 0)
    driver.run(1000)


@pytest.mark.parametrize("window", [1, 3, B, 9, 16])
def test_window_pages_go_back_to_the_pool(window: int) -> None:
    groups = numbered(full(B), sliding(B, window), chunked(B, 8))
    driver = Driver(groups, 500, budget=64, sharing=False)
    client = driver.add(tokens(5), 300)
    most = [0, 0]
    while not client.done:
        driver.step()
        driver.check()
        most = [max(old, sum(page_id >= 0 for page_id in table)) for old, table in zip(most, client.seq.tables[1:], strict=False)] or most
    span = -(-(window - 1) // B) + 1  # pages that a window can lie on
    assert most[0] <= span + 1 and most[1] <= 8 // B + 2
    assert driver.cache.pool.num_free == 500


@pytest.mark.parametrize("groups", [HYBRID, numbered(full(B), chunked(B, 8)), numbered(sliding(B, 6))])
def test_hybrids_hit_shared_prefixes(groups: tuple[Group, ...]) -> None:
    """A hit in the middle of an earlier prompt, far behind its window."""
    driver = Driver(groups, 400, budget=1000)
    shared = tokens(10 * B)
    run(driver, shared + tokens(10 * B, 1))
    before = driver.scheduler.num_cached_tokens
    assert run(driver, shared + tokens(10 * B, 2)) == 10 * B
    assert driver.scheduler.num_cached_tokens == before + 10 * B


def test_a_hybrid_hit_is_cut_where_a_window_page_is_gone() -> None:
    driver = Driver(HYBRID, 400, budget=1000)
    run(driver, tokens(12 * B))
    chain = driver.add(tokens(12 * B), 1).seq.chain(B, 11, driver.cache.hash_bytes)
    lost = driver.cache.index.find(chain[9])
    assert lost is not None
    driver.cache.index.forget([lost.pages[2]])  # page 8 of a sliding group with a window of two pages
    driver.cache.pool._cached.pop(lost.pages[2], None)
    found, length = driver.cache.finder.longest(driver.clients[1].seq, 11 * B)
    assert length == 11 * B  # pages 9 and 10 are there
    assert driver.cache.finder.longest(driver.clients[1].seq, 10 * B)[1] == 8 * B  # 10 and 9 pages would see page 8, 8 pages do not


def test_where_a_hit_ended_window_pages_stay_warm() -> None:
    """The end of a shared system prompt is hit again and again; its window pages are not the first to be evicted when the window moves on."""
    groups = numbered(full(B), sliding(B, 8))
    driver = Driver(groups, 120, budget=1000)
    shared = tokens(10 * B)
    run(driver, shared + tokens(3, 1))
    for seed in range(2, 20):
        assert run(driver, shared + tokens(12 * B, seed)) == 10 * B


def test_pages_a_window_left_are_evicted_first() -> None:
    """Hardly anybody will cut a prompt just there; an older request's pages are worth more."""
    driver = Driver(HYBRID, 200, budget=8 * B)
    old = tokens(10 * B)
    run(driver, old)
    run(driver, tokens(40 * B, 1))  # its 80 pages behind the windows are cached, the last to come
    fresh = 0
    while driver.cache.pool.num_free or fresh < 12:
        fresh += 1
        run(driver, tokens(B, 100 + fresh))
    assert run(driver, old) == 10 * B - 1


@pytest.mark.parametrize("groups", [FULL, numbered(full(B), full(2 * B)), numbered(full(3 * B), full(B))])
def test_tails_are_evicted_before_heads(groups: tuple[Group, ...]) -> None:
    driver = Driver(groups, sum(-(-40 * B // group.page_size) for group in groups) + 20, budget=1000)
    old = tokens(40 * B)
    run(driver, old)
    hits = []
    for fresh in range(18):
        run(driver, tokens(3 * B, 100 + fresh))
        hits.append(driver.cache.finder.longest(driver.add(old).seq, 40 * B - 1)[1])
        driver.cancel(driver.clients[driver.num_arrivals - 1])
    assert hits[0] >= 38 * B and hits == sorted(hits, reverse=True)
    assert any(10 * B <= hit <= 35 * B for hit in hits), "under pressure the head still hits, the tail does not"


def test_least_recently_used_leave_first() -> None:
    driver = Driver(FULL, 30, budget=1000)
    old, fresh = tokens(10 * B), tokens(10 * B, 1)
    run(driver, old)
    run(driver, fresh)
    assert run(driver, old) == 10 * B - 1  # used again: now the younger of the two
    run(driver, tokens(15 * B, 2))
    assert run(driver, old) == 10 * B - 1
    assert run(driver, fresh) < 10 * B - 1


@pytest.mark.parametrize("budget", [7, 16, 64, 1000])
@pytest.mark.parametrize("groups", [FULL, HYBRID, numbered(full(B), sliding(2 * B, 9))])
def test_a_prefix_that_many_bring_together_is_computed_once(groups: tuple[Group, ...], budget: int) -> None:
    driver = Driver(groups, 2000, budget=budget)
    shared = tokens(25 * B + 1)
    clients = [driver.add(shared + [seed] * 5, 3) for seed in range(20)]
    driver.run(1000)
    for client in clients[1:]:
        assert client.num_hit >= 25 * B // driver.cache.unit * driver.cache.unit
    assert driver.num_computed <= len(shared) + 20 * (5 + 2 + driver.cache.unit)


def test_nothing_is_shared_when_sharing_is_off() -> None:
    driver = Driver(FULL, 100, sharing=False)
    run(driver, tokens(20), 10)
    assert driver.cache.pool.num_cached == 0 and len(driver.cache.index) == 0
    assert run(driver, tokens(20), 10) == 0


def test_a_reset_forgets_everything_and_running_requests_start_over() -> None:
    driver = Driver(HYBRID, 200, budget=8, vocab=1000)
    client = driver.add(tokens(20), 20)
    for _ in range(8):
        driver.step()
    driver.reset()
    assert client.seq.num_committed == 0 and client.seq.num_known > 20
    driver.run(100)
    assert client.num_hit == 0 and client.num_computed > 39
    assert client.done


def test_namespaces_do_not_meet() -> None:
    driver = Driver(FULL, 100)
    roots = [PrefixKey(None, name, driver.cache.hash_bytes) for name in (b"a", b"b")]
    for root in roots:
        client = driver.add(tokens(20), root=root)
        driver.run(100)
        assert client.num_hit == 0
    again = driver.add(tokens(20), root=PrefixKey(None, b"a", driver.cache.hash_bytes))
    driver.run(100)
    assert again.num_hit == 19
    assert run(driver, tokens(20)) == 0


def test_colliding_hashes_give_misses() -> None:
    driver = Driver(FULL, 100, hash_bytes=one_bit)
    for seed in range(10):
        assert run(driver, tokens(5 * B + 1, seed)) < 5 * B + 1
        driver.check()
    assert len(driver.cache.index._keys) <= 2


def test_a_page_that_was_not_kept_is_not_hit() -> None:
    """What a request with NaN logits computed may be NaN; nobody shall hit it, though what others hold too stays."""
    driver = Driver(FULL, 100, budget=1000)
    run(driver, tokens(5 * B))
    client = driver.add(tokens(5 * B) + tokens(5 * B, 1), 5)
    driver.step()
    driver.cancel(client, keep=False)
    driver.check()
    assert run(driver, tokens(5 * B) + tokens(5 * B, 1)) <= 5 * B


@pytest.mark.parametrize("groups", [FULL, HYBRID])
@pytest.mark.parametrize("rest", [1, 3 * B])
def test_a_copy_that_failed_is_never_hit(groups: tuple[Group, ...], rest: int) -> None:
    """The step fails before the copy was made; the page it was for holds nothing, however many pages came after it."""
    driver = Driver(groups, 100, budget=1000)
    prompt = tokens(2 * B + 3)
    run(driver, prompt)
    driver.add(prompt[: 2 * B + 2] + tokens(rest, 1))
    driver.step(fail_at=0.0)
    driver.check()
    assert driver.cache.pool.num_held == 0
    run(driver, prompt[: 2 * B + 2] + tokens(rest, 1))


@pytest.mark.parametrize("num", [B, 3 * B, 3 * B + 3])
def test_a_prompt_is_there_for_others_as_soon_as_it_is_computed(num: int) -> None:
    """While it decodes a sequence tidies up once a page, each at another place; its prompt does not wait for that."""
    driver = Driver(FULL, 200, budget=1000)
    clients = [driver.add(tokens(num, seed), 3 * B) for seed in range(2 * B)]
    driver.step()
    assert all(client.seq.num_indexed == num for client in clients)
    turns = [client.seq.next_tidy for client in clients]
    assert sorted(turns) == sorted(2 * list(range(num + 1, num + B + 1))), "an equal part of them in each step"
    for client in clients:
        assert run_in_between(driver, client.seq.tokens[:num]) == num - 1


def run_in_between(driver: Driver, prompt: list[int]) -> int:
    client = driver.add(prompt)
    while not client.done:
        driver.step()
    return client.num_hit


def test_a_state_that_a_failed_commit_wrote_over_is_found_by_nobody() -> None:
    """The step's writes are done but for the last sequence's: that is no row behind those that were there, but another state in their place."""
    groups = numbered(full(4), carried(4))
    driver = Driver(groups, 20, vocab=1)
    for _ in range(2):
        driver.add([0] * 6, 3)
    driver.step()
    driver.step(fail_at=1.0)
    driver.check()
    again = driver.add([0] * 7, 2)
    driver.run(10)
    assert again.num_hit == 4  # the whole page, which nobody writes any more
