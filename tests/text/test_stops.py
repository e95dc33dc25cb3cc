from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import InvalidRequestError
from quire.text.stops import StopMatcher, StopResult

CHARS = st.sampled_from("aab😀")
STOPS = st.lists(st.text(CHARS, min_size=1, max_size=5), max_size=5)
PUSHES = st.lists(st.tuples(st.text(CHARS, max_size=7), st.booleans()), max_size=12)


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """The oracle: (end, stop) of the match that completes first, the longest of those."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end, max(ending, key=len)
    return None


def held_back(text: str, stops: Sequence[str]) -> str:
    """The oracle: the longest end of the text that begins a stop string."""
    return next((text[i:] for i in range(len(text)) if any(stop.startswith(text[i:]) for stop in stops)), "")


def run(matcher: StopMatcher, pushes: Iterator[str] | Sequence[str]) -> tuple[str, str | None]:
    text, stop = "", None
    for push in pushes:
        result = matcher.push(push)
        text, stop = text + result.text, result.stop
    return text + matcher.flush(), stop


@settings(max_examples=200, deadline=None)
@given(stops=STOPS, pushes=st.lists(st.text(CHARS, max_size=7), max_size=12), include=st.booleans())
def test_against_a_search_of_the_whole_text(stops: list[str], pushes: list[str], include: bool) -> None:
    matcher = StopMatcher(stops, include)
    seen = shown = ""
    for push in pushes:
        seen += push
        result = matcher.push(push)
        shown += result.text
        found = first_stop(seen, stops)
        if found is not None:
            end, stop = found
            assert result.stop == stop
            assert shown == seen[: end if include else end - len(stop)]
            assert matcher.push("more") == StopResult("", stop)
            assert matcher.flush() == ""
            return
        assert result.stop is None
        assert shown + held_back(seen, stops) == seen
    assert shown + matcher.flush() == seen
    assert matcher.flush() == ""


@settings(max_examples=200, deadline=None)
@given(stops=STOPS, pushes=PUSHES, include=st.booleans())
def test_matches_that_may_not_stop_are_text(stops: list[str], pushes: list[tuple[str, bool]], include: bool) -> None:
    matcher = StopMatcher(stops, include)
    seen = shown = ""
    searched = 0  # where a match may begin: after the last one that did not count
    expected: str | None = None
    for push, may_stop in pushes:
        for char in push:
            seen += char
            found = first_stop(seen[searched:], stops)
            if found is not None and may_stop:
                expected = found[1]
                break
            if found is not None:
                searched = len(seen)
        result = matcher.push(push, may_stop=may_stop)
        shown += result.text
        assert result.stop == expected
        if expected is not None:
            assert shown == (seen if include else seen.removesuffix(expected))
            return
        assert shown + held_back(seen[searched:], stops) == seen
    assert shown + matcher.flush() == seen


@settings(max_examples=200, deadline=None)
@given(stops=STOPS, text=st.text(CHARS, max_size=40), cuts=st.lists(st.integers(0, 40)), include=st.booleans())
def test_the_cut_into_pushes_does_not_matter(stops: list[str], text: str, cuts: list[int], include: bool) -> None:
    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    parts = [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    assert run(StopMatcher(stops, include), parts) == run(StopMatcher(stops, include), [text]) == run(StopMatcher(stops, include), list(text))


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        (["\n\n"], "one\n\ntwo", ("one", "\n\n")),
        (["END"], "the EN", ("the EN", None)),
        (["END"], "the ENEND it", ("the EN", "END")),
        (["abcd", "bc"], "abcd", ("a", "bc")),  # completes first, although it starts later
        (["bc", "abc"], "xabc", ("x", "abc")),  # complete together: the longest
        (["ab", "abc"], "abc", ("", "ab")),
        (["a", "a"], "a", ("", "a")),
        (["aab"], "aaab", ("a", "aab")),
        ([], "anything", ("anything", None)),
        (["</s>"], "", ("", None)),
        (["É"], "e\u0301É", ("e\u0301", "É")),  # as code points, not as looks
    ],
)
def test_examples(stops: list[str], text: str, expected: tuple[str, str | None]) -> None:
    assert run(StopMatcher(stops), [text]) == expected
    assert run(StopMatcher(stops), list(text)) == expected
    shown, stop = expected
    assert run(StopMatcher(stops, include_stop_in_output=True), [text]) == (shown + (stop or ""), stop)


def test_only_what_may_begin_a_stop_is_held() -> None:
    matcher = StopMatcher(["<stop>", "top"])
    assert matcher.push("a <s") == StopResult("a ", None)
    assert matcher.push("to") == StopResult("", None)
    assert matcher.push("n") == StopResult("<ston", None)
    assert matcher.push("t") == StopResult("", None)
    assert matcher.flush() == "t"


def test_min_tokens_rule() -> None:
    matcher = StopMatcher(["aa"])
    assert matcher.push("aa", may_stop=False) == StopResult("aa", None)
    assert matcher.push("a") == StopResult("", None)  # the second a of an ignored match counts no more
    assert matcher.push("ab") == StopResult("", "aa")
    matcher = StopMatcher(["stop"])
    assert matcher.push("xst", may_stop=False) == StopResult("x", None)
    assert matcher.push("op") == StopResult("", "stop")  # began before, completed when it counts


def test_empty_stop_strings_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="not empty"):
        StopMatcher(["a", ""])


@pytest.mark.parametrize("stops", [["a" * 2000 + "b"], ["a" * n + "b" for n in range(1, 256)], ["ab" * 1000 + "c", "b" * 1000]])
def test_the_cost_is_linear_for_the_worst_stops(stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    text = "a" * 30_000 if "ab" * 5 not in stops[0] else "ab" * 15_000
    start = time.thread_time()
    shown = "".join(matcher.push(char).text for char in text) + matcher.flush()
    assert shown == text
    assert time.thread_time() - start < 1.5  # takes 0.05 s; looking at the held text again for each character takes minutes
