"""Reading or computing: whatever was measured, what is cheaper by all of it is done."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from quire.policy.costs import Costs

seconds = st.floats(1e-7, 10.0)
counts = st.integers(1, 2000)


@given(
    guess=seconds,
    reads=st.lists(st.tuples(counts, seconds), max_size=20),
    steps=st.lists(st.tuples(counts, seconds), min_size=1, max_size=20),
    num_pages=counts,
    num_tokens=counts,
)
def test_what_every_measurement_says_is_done(
    guess: float, reads: list[tuple[int, float]], steps: list[tuple[int, float]], num_pages: int, num_tokens: int
) -> None:
    """Each read and step as (how many, seconds of one). Where measurements disagree about what is cheaper, either may be done."""
    costs = Costs(guess)
    for num, each in reads:
        costs.note_read(num, num * each)
    for num, each in steps:
        costs.note_step(num, num * each)
    read = [num_pages * each for each in (guess, *[each for _, each in reads])]
    computed = [num_tokens * each for _, each in steps]
    if max(read) < min(computed) * 0.999:
        assert costs.reading_pays(num_pages, num_tokens)
    elif min(read) > max(computed) * 1.001:
        assert not costs.reading_pays(num_pages, num_tokens)


def test_tokens_cost_what_they_do_in_steps_of_their_size() -> None:
    """Decoding, of which there is more, does not make the tokens of a prompt dear."""
    costs = Costs(0.010)
    for _ in range(100):
        costs.note_step(300, 0.3)  # a millisecond a token
        for _ in range(50):
            costs.note_step(1, 0.1)
    assert not costs.reading_pays(40, 300) and not costs.reading_pays(400, 3000)
    assert costs.reading_pays(20, 300) and costs.reading_pays(1, 1)


def test_without_a_step_it_is_read() -> None:
    assert Costs(1e9).reading_pays(1, 1)


def test_the_latest_measurements_count() -> None:
    costs = Costs(1.0)
    costs.note_step(16, 16.0)
    for page_s, pays in ((1000.0, False), (0.001, True), (1000.0, False)):
        for _ in range(100):
            costs.note_read(1, page_s)
        assert costs.reading_pays(1, 16) is pays


def test_a_disk_that_stalled_once_is_read_again() -> None:
    costs = Costs(0.001)
    costs.note_step(16, 0.016)
    costs.note_read(1, 30.0)
    decisions = [costs.reading_pays(1, 16) for _ in range(2000)]
    assert not any(decisions[:100]) and decisions[-1]
