"""Figures out of runs, and the marks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from bench.speed.limits import Limit
from bench.speed.processes import EngineRun
from bench.speed.report import as_json, figures, line, verdict
from bench.speed.shapes import QWEN3
from bench.speed.workloads import Job, Workload

W1 = Workload("W1", "", "stream", QWEN3, (Job((300,) * 8, 11),))
W3 = Workload("W3", "", "batch", QWEN3, (Job((300,) * 8, 4), Job((300,) * 8, 4)), shared=6)
W4 = replace(W1, name="W4", kind="first")
LIMIT = Limit(2.2, "memory", 1.0, 1.0, 1)
MEMORY = {"base": 100, "load_peak": 500, "loaded": 300, "peak": 400}


def ran(seconds: float, first: float | None = 0.5, **counters: int) -> EngineRun:
    return EngineRun(seconds=seconds, first_token_s=None if first is None else (first,), memory=MEMORY, counters=counters, version="x")


def test_medians_of_what_worked() -> None:
    found = figures(W1, LIMIT, [ran(4.0), ran(2.5), ran(3.0, 1.0), EngineRun(problem="failed: late")])
    assert (found.repetitions, found.seconds, found.spread, found.first_token_s) == (3, 3.0, 0.5, 0.5)
    assert found.tokens_s == pytest.approx(11 / 3) and found.share == pytest.approx(2.2 / 3)
    # Ten tokens after the first, of a limit of 0.2 each, in 3.5, 2.0 and 2.0 seconds.
    assert found.decode_share == pytest.approx(1.0)
    assert (found.peak_bytes, found.beyond_base_bytes) == (400, 300)


def test_each_run_is_held_to_what_memory_gave_beside_it() -> None:
    def limit_by(rate: float) -> Limit:
        return replace(LIMIT, seconds=2e9 / rate)

    runs = [replace(ran(seconds, first), read_bytes_s=rate) for seconds, first, rate in ((4.0, 2.5, 1e9), (2.0, 1.25, 2e9), (4.0, 1.0, 4e9))]
    whole, first = figures(W1, LIMIT, runs, limit_by), figures(W4, LIMIT, runs, limit_by)
    assert (whole.share_beside, first.share_beside) == (pytest.approx(0.5), pytest.approx(0.8))
    assert "(50.0% by what memory gave beside it)" in line("quire", whole, None)
    assert figures(W1, LIMIT, [ran(4.0)], limit_by).share_beside is None


def test_the_first_token_is_what_a_long_prompt_is_held_to() -> None:
    assert figures(W4, LIMIT, [ran(9.0, 2.75)]).share == pytest.approx(0.8)
    assert figures(W4, LIMIT, [ran(9.0, None)]).problem == "failed: it does not tell when the first token came"


def test_a_problem_is_told_and_no_figure_with_it() -> None:
    found = {"quire": figures(W1, LIMIT, [ran(2.3)]), "vllm": figures(W1, LIMIT, [EngineRun(problem="absent: no")])}
    assert line("vllm", found["vllm"], found["quire"]).split() == ["vllm", "absent:", "no"]
    told = as_json(W1, "none", LIMIT, found)["engines"]["vllm"]
    assert told["problem"] == "absent: no" and "quire_times_as_fast" not in told


def test_ratios() -> None:
    quire, other = figures(W1, LIMIT, [ran(2.5)]), figures(W1, LIMIT, [ran(5.0)])
    assert "quire is 2.00 times as fast" in line("generate", other, quire)
    assert as_json(W1, "none", LIMIT, {"quire": quire, "generate": other})["engines"]["generate"]["quire_times_as_fast"] == 2.0


def test_marks() -> None:
    assert verdict(W1, "none", figures(W1, LIMIT, [ran(2.4)]), None) == ("mark 90% of the limit: reached", True)
    assert verdict(W1, "none", figures(W1, LIMIT, [ran(2.5)]), None) == ("mark 90% of the limit: missed", False)
    assert verdict(W1, "int8", figures(W1, LIMIT, [ran(2.5)]), None)[1] is True
    assert verdict(W1, "int4", figures(W1, LIMIT, [ran(2.5)]), None) == ("", None)
    assert verdict(W1, "none", figures(W1, LIMIT, [EngineRun(problem="failed: x")]), None) == ("", None)


def test_int8_is_held_against_bf16_of_the_same_run() -> None:
    plain, ours = figures(W3, LIMIT, [ran(6.0)]), figures(W3, LIMIT, [ran(4.0, num_computed_tokens=16)])
    assert verdict(W3, "int8", ours, plain)[0].startswith("mark 1.4 times bf16: reached with 1.50")
    assert verdict(W3, "int8", ours, None) == ("mark 1.4 times bf16: bf16 was not run", None)


def test_a_shared_prefix_must_be_computed_once() -> None:
    # At least 6 shared tokens, and twice 2 of a suffix and 3 that are drawn and computed: 16.
    for computed, once in ((16, True), (21, True), (22, False)):
        told, reached = verdict(W3, "none", figures(W3, LIMIT, [ran(3.0, num_computed_tokens=computed)]), None)
        assert reached is once and ("computed once" in told) is once and f"({computed} tokens computed, 16 at least)" in told
