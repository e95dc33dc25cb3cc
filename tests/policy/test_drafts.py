"""Drafts: what is guessed, how much, and what a guess may take. That guesses change nothing is shown by test_random and engine/test_drafts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.policy.drafts import FIRST_LENGTH, MAX_DRAWN, MAX_NGRAM, MIN_NGRAM, PromptLookup
from quire.policy.groups import Group
from tests.policy.oracle import Driver, chunked, full, numbered, sliding

# Some of these repeat one byte, so that tokens are found across tokens, too.
token = st.sampled_from([0, 1, 2, 0x01010101, 0x0101, 0x010101])


def plainly(tokens: list[int], count: int) -> tuple[int, ...]:
    """What `PromptLookup` guesses, by looking at every place."""
    for size in range(MAX_NGRAM, MIN_NGRAM - 1, -1):
        places = [i for i in range(size, len(tokens)) if tokens[i - size : i] == tokens[-size:]]
        if places:
            guessed: list[int] = []
            for i in range(count):  # of what follows, and of what has been guessed to
                guessed.append([*tokens, *guessed][places[-1] + i])
            return tuple(guessed)
    return ()


@settings(deadline=None)
@given(st.lists(token, min_size=1, max_size=30), st.integers(0, 20))
def test_the_guess_is_what_followed_the_longest_end_last_time(tokens: list[int], room: int) -> None:
    assert PromptLookup(FIRST_LENGTH).guess(tokens, room) == plainly(tokens, min(room, FIRST_LENGTH))


@settings(deadline=None)
@given(st.lists(token, min_size=1, max_size=40), st.data())
def test_tokens_may_come_in_any_parts(tokens: list[int], data: st.DataObject) -> None:
    lookup, end = PromptLookup(3), 0
    while end < len(tokens):
        end += data.draw(st.integers(1, 7))
        count = len(lookup.guess(tokens[:end], 3))
        assert lookup.guess(tokens[:end], 3) == plainly(tokens[:end], count)


def test_the_length_follows_what_was_right() -> None:
    tokens = [1, 2, 3] * 8
    lookup = PromptLookup(12)
    guesses = []
    for right in (4, 8, 12, 3, 0, 0, 1):
        guess = lookup.guess(tokens, 20)
        guesses.append(len(guess))
        tokens += [*guess[:right], guess[right] if right < len(guess) and right else 9] if right else [9]
        tokens += [1, 2, 3, 1, 2, 3]  # so that there is something to guess again
    assert guesses[:4] == [4, 8, 12, 12] and guesses[4] < 12 and guesses[6] <= 2


def test_wrong_guesses_become_rare_and_a_right_one_is_believed() -> None:
    pairs = [token for i in range(200) for token in (i, i + 1, 999)]  # each pair of what comes, and what never does
    lookup, tokens, guesses = PromptLookup(8, pairs), [0], []
    for token in range(1, 128):
        tokens.append(token)
        guesses.append(lookup.guess(tokens, 8))
    assert all(guess[0] == 999 for guess in guesses if guess) and 5 <= sum(map(bool, guesses)) <= 10
    while not (guess := lookup.guess(tokens, 8)):
        tokens.append(tokens[-1] + 1)
    tokens += [*guess, 150, 151]
    assert lookup.guess(tokens, 8), "at once"


def test_drafts_take_no_page_that_another_is_near_to_needing() -> None:
    """The second ends just before there would be too few; a page that the first takes ahead of its time would cost it its place."""
    driver = Driver(numbered(full(4)), 6, drafts=15, vocab=1)
    clients = [driver.add([0] * num_prompt, max_tokens) for num_prompt, max_tokens in ((6, 19), (4, 11))]
    driver.run(60)
    assert sum(client.num_accepted for client in clients) > 0 and driver.scheduler.num_preemptions == 0


GROUPS = [
    [sliding(1, 5)],
    [sliding(2, 3)],
    [chunked(2, 6)],
    [chunked(1, 4)],
    [full(4), sliding(4, 5)],
    [full(4), chunked(4, 8)],
    [full(8), sliding(2, 3)],
]


@pytest.mark.parametrize("groups", GROUPS, ids=lambda groups: " ".join(f"{one.kind}-{one.page_size}" for one in groups))
def test_wrong_drafts_move_no_window(groups: list[Group], monkeypatch: pytest.MonkeyPatch) -> None:
    """Had they been right, the window would have left pages that are still to be filled."""
    monkeypatch.setattr(PromptLookup, "guess", lambda self, tokens, room: (-1,) * min(room, 15))
    driver = Driver(numbered(*groups), 200, drafts=15, sharing=False)
    for i in range(3):
        driver.add([0, 1, 0, 1, 0][i:], 40, seed=i)
    driver.run(400)


def test_wrong_drafts_keep_no_page_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PromptLookup, "guess", lambda self, tokens, room: (-1,) * min(room, 15))
    for drafts in (0, 15):
        driver = Driver(numbered(full(1)), 26, drafts=drafts, sharing=False, vocab=50)
        for i, max_tokens in enumerate((20, 6)):
            driver.add([i] * 7, max_tokens)
        driver.run(60)
        assert (driver.num_computed > 26 + 12) == bool(drafts)
        assert driver.num_steps == 21 and driver.scheduler.num_preemptions == 0


def test_few_sequences_draft_and_many_do_not() -> None:
    for num_sequences in (1, 2, MAX_DRAWN - 1, MAX_DRAWN, MAX_DRAWN + 1):
        driver = Driver(numbered(full(16)), 200, drafts=15, vocab=1, budget=512)
        for i in range(num_sequences):
            driver.add([i, *[0] * 6], 30)
        driver.step()
        while (plan := driver.step()) is not None and len(plan.works) == num_sequences:
            drafts = sum(len(work.drafts) for work in plan.works)
            assert not drafts or num_sequences + drafts <= MAX_DRAWN
            assert drafts or num_sequences >= MAX_DRAWN or not all(work.sequence.num_at_most > work.sequence.num_known for work in plan.works)
