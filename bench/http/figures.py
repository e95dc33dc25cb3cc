"""From answers to figures: percentiles, rates, ratios, and the marks that Quire's server is held to."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.http.answers import Heard

MOST_OVERHEAD = 0.05  # of the engine's time for 32 streams
MOST_FIRST_TOKEN = 1.3  # times the engine's own


@dataclass(frozen=True)
class Cpu:
    """CPU seconds: of the server's event loop, of its whole process, and of the clients."""

    loop_s: float
    server_s: float
    clients_s: float


@dataclass(frozen=True)
class Figures:
    """What became of one load. Times are (p50, p99) in seconds, None where nothing came; CPU is microseconds for each token that came.

    `between_tokens_s` is the time between events that bring tokens, of all answers together. `tokens_s` counts from the first request to the last
    byte. `problems` say how often each kind of failure was met; figures are of what came all the same.
    """

    requests: int
    failures: int
    problems: dict[str, int]
    seconds: float
    tokens: int
    tokens_s: float
    first_token_s: tuple[float, float] | None
    between_tokens_s: tuple[float, float] | None
    loop_cpu_us: float
    server_cpu_us: float
    clients_cpu_us: float


def percentile(values: Sequence[float], share: float) -> float:
    """The least of `values` that at least this share of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def figures(answers: Sequence[Heard], cpu: Cpu) -> Figures:
    """All of one load."""
    firsts = [answer.event_s[0] - answer.sent_s for answer in answers if answer.event_s]
    gaps = [after - before for answer in answers for before, after in zip(answer.event_s, answer.event_s[1:], strict=False)]
    seconds = max(answer.end_s for answer in answers) - min(answer.sent_s for answer in answers)
    tokens = sum(answer.tokens for answer in answers)
    each = 1e6 / max(1, tokens)
    problems = Counter(answer.problem for answer in answers if answer.problem is not None)
    return Figures(
        requests=len(answers),
        failures=sum(problems.values()),
        problems=dict(problems),
        seconds=seconds,
        tokens=tokens,
        tokens_s=tokens / seconds if seconds else 0.0,
        first_token_s=(percentile(firsts, 0.5), percentile(firsts, 0.99)) if firsts else None,
        between_tokens_s=(percentile(gaps, 0.5), percentile(gaps, 0.99)) if gaps else None,
        loop_cpu_us=cpu.loop_s * each,
        server_cpu_us=cpu.server_s * each,
        clients_cpu_us=cpu.clients_s * each,
    )


def line(name: str, own: Figures) -> str:
    """One load's figures as printed."""

    def both(times: tuple[float, float] | None) -> str:
        return "none came" if times is None else f"{times[0] * 1000:,.1f} / {times[1] * 1000:,.1f} ms"

    failed = f", {own.failures} FAILED ({'; '.join(f'{n} x {problem}' for problem, n in list(own.problems.items())[:3])})" if own.failures else ""
    times = f"first token {both(own.first_token_s)}, between {both(own.between_tokens_s)}"
    cpu = f"CPU a token: event loop {own.loop_cpu_us:.0f} us, server {own.server_cpu_us:,.0f}, clients {own.clients_cpu_us:.0f}"
    return f"    {name:<19} {own.requests:4} requests, {own.tokens_s:7.1f} tokens/s, {times}; {cpu}{failed}"


@dataclass(frozen=True)
class Pair:
    """The same requests of one repetition, by the engine alone and through HTTP, in seconds."""

    engine_s: float
    http_s: float

    @property
    def ratio(self) -> float:
        """How many times as long it takes through HTTP."""
        return self.http_s / self.engine_s


def compared(title: str, pairs: Sequence[Pair], most: float) -> dict[str, Any]:
    """Print a comparison and return it: the median of the repetitions' ratios decides whether the mark `most` is reached."""
    ratio = statistics.median(pair.ratio for pair in pairs)
    engine, http = (statistics.median(times) for times in zip(*((pair.engine_s, pair.http_s) for pair in pairs), strict=True))
    reached, each = ratio <= most, ", ".join(f"{pair.ratio:.3f}" for pair in pairs)
    print(f"{title}: engine {engine:.4f} s, HTTP {http:.4f} s, {ratio:.3f} times ({each}); mark {most:g}: {'reached' if reached else 'missed'}")
    return {"engine_s": engine, "http_s": http, "ratio": ratio, "mark": most, "reached": reached, "pairs": [asdict(pair) for pair in pairs]}
