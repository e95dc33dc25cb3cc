"""What is asked for, and when: the same for every server, whenever it is run."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

LETTERS = string.ascii_lowercase.replace("w", "")  # a token each: the bench's tokenizer has one merge, and it begins with a w


@dataclass(frozen=True)
class Ask:
    """One streamed completion: a prompt of as many tokens as it has letters, and how many to generate, exactly."""

    prompt: str
    new: int


def poisson(rate: float, seconds: float, seed: str) -> list[float]:
    """Times of arrivals within `seconds`, `rate` a second on average, each independent of all others and of what became of them."""
    dice, times = random.Random(f"arrivals {rate} {seed}"), []
    at = dice.expovariate(rate)
    while at < seconds:
        times.append(at)
        at += dice.expovariate(rate)
    return times


def ragged(num: int, seed: str, scale: float = 1.0) -> list[Ask]:
    """Log-uniform lengths: 16 to 256 tokens in, 16 to 128 out, times `scale`."""
    dice = random.Random(f"ragged {seed}")

    def length(low: int, high: int) -> int:
        return max(2, round(scale * low * (high / low) ** dice.random()))

    return [_ask(dice, length(16, 256), length(16, 128)) for _ in range(num)]


def equal(num: int, length: int, new: int, seed: str) -> list[Ask]:
    """All of one length, no two alike."""
    dice = random.Random(f"equal {seed}")
    return [_ask(dice, length, new) for _ in range(num)]


def _ask(dice: random.Random, length: int, new: int) -> Ask:
    return Ask("".join(dice.choices(LETTERS, k=length)), new)
