"""From runs to figures: medians, shares of the limit, ratios to Quire, and the marks that Quire is held to."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from bench.speed.limits import Limit, least_tokens
from bench.speed.processes import EngineRun
from bench.speed.workloads import Workload

# Shares of the limit; for int8 beyond W1, times as fast as Quire's own bf16 in the same run. There are none for int4.
SHARE_MARKS = {
    "none": {"W1": 0.90, "W2": 0.75, "W3": 0.65, "W4": 0.80, "W5": 0.75, "W6": 0.70},
    "int8": {"W1": 0.85},
}
RATIO_MARKS = {"int8": {"W2": 1.5, "W3": 1.4, "W4": 1.3, "W5": 1.4, "W6": 1.3}}


@dataclass(frozen=True)
class Figures:
    """One engine on one workload: medians over the repetitions that worked, or why there are none.

    `compared_s` is what the limit is compared with: seconds in all, or to the first token. `peak_bytes` is all that the process held at most during
    the workload, `beyond_base_bytes` the same less what it held before loading: weights, cache, what steps take. `decode_share` leaves the
    time to the first token out, of one stream. `share_beside`: of the limit by what memory gave just before and after a run.
    """

    problem: str | None = None
    repetitions: int = 0
    seconds: float = 0.0
    spread: float = 0.0
    tokens_s: float = 0.0
    first_token_s: float | None = None
    compared_s: float = 0.0
    share: float = 0.0
    decode_share: float | None = None
    share_beside: float | None = None
    peak_bytes: int = 0
    beyond_base_bytes: int = 0
    load_s: float = 0.0
    version: str = ""
    counters: dict[str, Any] | None = None


def _compared(workload: Workload, run: EngineRun) -> float:
    """Seconds of a run that the limit is compared with."""
    return statistics.median(run.first_token_s) if workload.kind == "first" and run.first_token_s else run.seconds


def figures(workload: Workload, limit: Limit, runs: list[EngineRun], limit_by: Callable[[float], Limit] | None = None) -> Figures:
    """Medians of runs; the first problem where none worked. `limit_by`: the limit where memory gives so many bytes a second."""
    good = [run for run in runs if run.problem is None]
    if not good:
        return Figures(problem=runs[0].problem if runs else "absent: not run")
    seconds = statistics.median(run.seconds for run in good)
    firsts = [statistics.median(run.first_token_s) for run in good if run.first_token_s]
    first = statistics.median(firsts) if firsts else None
    if workload.kind == "first" and first is None:
        return Figures(problem="failed: it does not tell when the first token came")
    compared = statistics.median(_compared(workload, run) for run in good)
    decode_share = None
    if workload.kind == "stream" and first is not None and workload.jobs[0].new > 1:
        new = workload.jobs[0].new
        decode_share = statistics.median((new - 1) / new * limit.seconds / (run.seconds - run.first_token_s[0]) for run in good if run.first_token_s)
    beside = [limit_by(run.read_bytes_s).seconds / _compared(workload, run) for run in good if limit_by is not None and run.read_bytes_s is not None]
    memory = [run.memory for run in good if run.memory]
    return Figures(
        repetitions=len(good),
        seconds=seconds,
        spread=(max(run.seconds for run in good) - min(run.seconds for run in good)) / seconds,
        tokens_s=workload.tokens_out / seconds,
        first_token_s=first,
        compared_s=compared,
        share=limit.seconds / compared,
        decode_share=decode_share,
        share_beside=statistics.median(beside) if beside else None,
        peak_bytes=int(statistics.median(m["peak"] for m in memory)),
        beyond_base_bytes=int(statistics.median(m["peak"] - m["base"] for m in memory)),
        load_s=statistics.median(run.load_s for run in good),
        version=good[0].version,
        counters=good[0].counters,
    )


def verdict(workload: Workload, quantization: str, ours: Figures, plain: Figures | None) -> tuple[str, bool | None]:
    """The mark for Quire's figures as a line, and whether it is reached; None where there is no mark or nothing to hold against it.

    `plain`: Quire's figures without quantization, of the same run.
    """
    if ours.problem is not None:
        return "", None
    share, ratio = SHARE_MARKS.get(quantization, {}).get(workload.name), RATIO_MARKS.get(quantization, {}).get(workload.name)
    parts, reached = [], None
    if share is not None:
        reached = ours.share >= share
        parts.append(f"mark {share:.0%} of the limit: {'reached' if reached else 'missed'}")
    if ratio is not None:
        if plain is None or plain.problem is not None:
            return f"mark {ratio} times bf16: bf16 was not run", None
        times = plain.compared_s / ours.compared_s
        reached = times >= ratio
        parts.append(f"mark {ratio} times bf16: {'reached' if reached else 'missed'} with {times:.2f}")
    if workload.shared and ours.counters is not None:
        computed, least = ours.counters["num_computed_tokens"], least_tokens(workload)
        once = computed - least < workload.shared
        parts.append(f"shared prefix {'computed once' if once else 'COMPUTED AGAIN'} ({computed:,} tokens computed, {least:,} at least)")
        reached = reached and once
    return "; ".join(parts), reached


def line(engine: str, own: Figures, quire: Figures | None) -> str:
    """One engine's figures as printed, with what it takes for Quire's time where both are there."""
    if own.problem is not None:
        return f"    {engine:<15} {own.problem}"
    first = f", first token {own.first_token_s:.2f} s" if own.first_token_s is not None else ", first token not told"
    memory = f"{own.peak_bytes / 2**20:,.0f} MB at peak ({own.beyond_base_bytes / 2**20:,.0f} beyond imports)"
    decode = f", {own.decode_share:.1%} after the first token" if own.decode_share is not None else ""
    beside = f" ({own.share_beside:.1%} by what memory gave beside it)" if own.share_beside is not None else ""
    ratio = f"; quire is {own.compared_s / quire.compared_s:.2f} times as fast" if quire is not None and quire.problem is None else ""
    spread = f" (median of {own.repetitions}, spread {own.spread:.0%})" if own.repetitions > 1 else ""
    share = f"{own.share:.1%} of the limit{beside}{decode}"
    return f"    {engine:<15} {own.seconds:8.2f} s{spread} {own.tokens_s:8.1f} tokens/s{first}, {memory}, {share}{ratio}"


def as_json(workload: Workload, quantization: str, limit: Limit, found: dict[str, Figures]) -> dict[str, Any]:
    """One workload's block of the JSON line."""
    about = {"title": workload.title, "shape": workload.shape.name, "tokens_in": workload.tokens_in, "tokens_out": workload.tokens_out}
    quire = found.get("quire")
    engines = {}
    for name, own in found.items():
        engines[name] = {key: value for key, value in asdict(own).items() if value is not None}
        if name != "quire" and quire is not None and own.problem is None and quire.problem is None:
            engines[name]["quire_times_as_fast"] = own.compared_s / quire.compared_s
    return {**about, "quantization": quantization, "limit": asdict(limit), "engines": engines}
