"""The workloads W1 to W6: what is asked of every engine, the same for all. Standard library only, and the same jobs on every machine."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from bench.speed.shapes import GEMMA3, Shape

Kind = Literal["stream", "batch", "first", "samples"]


@dataclass(frozen=True)
class Job:
    """A prompt's token ids and how many tokens to generate, exactly."""

    prompt: tuple[int, ...]
    new: int


@dataclass(frozen=True)
class Workload:
    """Jobs that are all there at the start.

    Fields:
        kind: which limit applies (limits.py): "stream" is one sequence, "batch" many, "first" a prompt whose first token counts, "samples"
            `n` sequences out of one prompt, drawn at random; all others are greedy, n = 1.
        shared: the first tokens that all prompts have in common.
        max_concurrent: the most sequences that may run at once.
    """

    name: str
    title: str
    kind: Kind
    shape: Shape
    jobs: tuple[Job, ...]
    n: int = 1
    shared: int = 0
    max_concurrent: int = 32

    @property
    def tokens_in(self) -> int:
        """Tokens of all prompts."""
        return sum(len(job.prompt) for job in self.jobs)

    @property
    def tokens_out(self) -> int:
        """Tokens that are generated."""
        return self.n * sum(job.new for job in self.jobs)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence at its end."""
        return max(len(job.prompt) + job.new for job in self.jobs)


def make(layers: int | None, scale: float, shape: Shape) -> dict[str, Workload]:
    """All workloads by name: W1 to W5 on `shape`, W6 on the hybrid, both cut to `layers`, lengths times `scale` (1 for figures that count)."""
    small, hybrid = shape.shortened(layers), GEMMA3.shortened(layers)

    def of(length: int) -> int:
        return max(2, round(length * scale))

    def w1(dice: random.Random) -> Workload:
        jobs = (Job(_prompt(dice, small, of(128)), of(128)),)
        return Workload("W1", "one stream", "stream", small, jobs)

    def w2(dice: random.Random) -> Workload:
        return Workload("W2", "48 ragged", "batch", small, _ragged(dice, small, of))

    def w3(dice: random.Random) -> Workload:
        stem = _prompt(dice, small, of(768))
        jobs = tuple(Job(stem + _prompt(dice, small, dice.randint(of(16), of(48))), of(32)) for _ in range(24))
        return Workload("W3", f"24 share {len(stem)}", "batch", small, jobs, shared=len(stem))

    def w4(dice: random.Random) -> Workload:
        new = of(16)
        length = min(of(8192), small.context - new)
        return Workload("W4", f"prompt of {length}", "first", small, (Job(_prompt(dice, small, length), new),))

    def w5(dice: random.Random) -> Workload:
        return Workload("W5", "8 samples", "samples", small, (Job(_prompt(dice, small, of(512)), of(64)),), n=8)

    def w6(dice: random.Random) -> Workload:
        return Workload("W6", "48 ragged, hybrid", "batch", hybrid, _ragged(dice, hybrid, of))

    makers: dict[str, Callable[[random.Random], Workload]] = {"W1": w1, "W2": w2, "W3": w3, "W4": w4, "W5": w5, "W6": w6}
    return {name: maker(random.Random(f"quire {name}")) for name, maker in makers.items()}


def _ragged(dice: random.Random, shape: Shape, of: Callable[[int], int]) -> tuple[Job, ...]:
    """48 jobs of log-uniform lengths: 16..512 in, 16..256 out."""

    def length(low: int, high: int) -> int:
        return of(round(low * (high / low) ** dice.random()))

    return tuple(Job(_prompt(dice, shape, length(16, 512)), length(16, 256)) for _ in range(48))


def _prompt(dice: random.Random, shape: Shape, length: int) -> tuple[int, ...]:
    return tuple(dice.randrange(256, shape.vocab) for _ in range(length))  # ids below are bytes and special tokens
