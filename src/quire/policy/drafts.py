"""Drafts: guesses at a sequence's next tokens, computed with the one in hand and kept as far as what is then drawn is what was guessed.

Nothing that a sequence draws depends on a guess, so a wrong one costs the rows it took and a right one saves a step. The guess is what followed when
the last tokens stood there before: prompt lookup (A. Saxena 2023; transformers' `prompt_lookup_num_tokens`).

    ... the quick brown fox | jumps over ... | the quick brown   ->   fox jumps over
        `--- 3 tokens ----'                    `--- 3 tokens --'
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Tokens
from typing import Protocol

from quire.config import MAX_DRAFTS

MAX_NGRAM = 4  # the longest end of a sequence that is looked for
MIN_NGRAM = 2
FIRST_LENGTH = 4
MAX_MISSES = 5  # after which no wait is longer: 31 tokens
MAX_DRAWN = MAX_DRAFTS + 1  # a step with fewer rows of logits may have drafts, up to so many rows: with more, arithmetic is what it waits for


class Drafter(Protocol):
    """What guesses for one sequence."""

    def guess(self, tokens: Tokens[int], room: int) -> tuple[int, ...]:
        """At most `room` tokens that may come after `tokens`, which are those of the last call and what has come since."""


class PromptLookup:
    """Guesses that what was said before is said again: twice as many tokens after all were right, else one more than were.

    After guesses of which nothing was right it waits, twice as long each time: text that repeats its pairs of words and nothing more costs little.
    """

    def __init__(self, most: int, before: Tokens[int] = ()) -> None:
        """`most`: of tokens guessed at once, >= 1. `before`: tokens to be looked through as if they came before the sequence's own."""
        self._most, self._length = most, min(most, FIRST_LENGTH)
        self._text = bytearray(array("i", before).tobytes())  # all that is looked through, 4 bytes a token
        self._num_before = len(before)
        self._guessed: tuple[int, ...] = ()
        self._misses = self._resume_at = 0

    def guess(self, tokens: Tokens[int], room: int) -> tuple[int, ...]:
        """See `Drafter`."""
        came = tokens[len(self._text) // 4 - self._num_before :]
        self._learn(came, len(tokens))
        self._text += array("i", came).tobytes()
        after = self._after_the_same() if len(tokens) >= self._resume_at else 0
        followed = memoryview(self._text[4 * after :][: 4 * self._length]).cast("i")
        # What followed may reach into the end itself; it is as if it went on in that manner.
        count = max(0, min(self._length, room)) if after else 0
        self._guessed = tuple(followed[i % len(followed)] for i in range(count))
        return self._guessed

    def _learn(self, came: Tokens[int], num_tokens: int) -> None:
        both = list(zip(self._guessed, came, strict=False))  # of what was guessed fewer may have been computed
        if both:
            right = next((i for i, (guess, token) in enumerate(both) if guess != token), len(both))
            self._length = min(self._most, 2 * self._length if right == len(both) else right + 1)
            self._misses = 0 if right else min(self._misses + 1, MAX_MISSES)
            self._resume_at = num_tokens + 2**self._misses - 1

    def _after_the_same(self) -> int:
        """The place behind the latest earlier one of the longest end that was there before, or 0."""
        text = self._text
        for size in range(4 * MAX_NGRAM, 4 * MIN_NGRAM - 1, -4):
            ending = text[-size:]
            at = text.rfind(ending, 0, len(text) - 4) if size < len(text) else -1
            while at % 4 and at >= 0:  # across tokens
                at = text.rfind(ending, 0, at + size - 1)
            if at >= 0:
                return (at + size) // 4
        return 0
