"""Workloads are the same every time, with the lengths they promise."""

from __future__ import annotations

import math
import statistics

import pytest
from bench.speed.shapes import GEMMA3, QWEN3, SMOLLM2
from bench.speed.workloads import make


def test_they_are_the_same_every_time() -> None:
    assert make(None, 1.0, QWEN3) == make(None, 1.0, QWEN3)
    # Each has dice of its own: the jobs of one do not depend on how many numbers the ones before took.
    assert make(None, 0.5, QWEN3)["W2"].jobs[0].prompt[:4] == make(2, 1.0, QWEN3)["W2"].jobs[0].prompt[:4]


def test_sizes() -> None:
    made = make(None, 1.0, QWEN3)
    assert [(len(job.prompt), job.new) for job in made["W1"].jobs] == [(128, 128)]
    assert [(len(job.prompt), job.new) for job in made["W4"].jobs] == [(8192, 16)]
    assert [(len(job.prompt), job.new, made["W5"].n) for job in made["W5"].jobs] == [(512, 64, 8)]
    assert made["W5"].tokens_out == 512
    assert {name: w.shape for name, w in made.items() if w.shape != QWEN3} == {"W6": GEMMA3}
    assert len(make(None, 1.0, SMOLLM2)["W4"].jobs[0].prompt) == 8192 - 16  # its context has no room for more


@pytest.mark.parametrize("name", ["W2", "W6"])
def test_ragged_lengths_are_log_uniform(name: str) -> None:
    jobs = make(None, 1.0, QWEN3)[name].jobs
    assert len(jobs) == 48
    for lengths, low, high in (([len(job.prompt) for job in jobs], 16, 512), ([job.new for job in jobs], 16, 256)):
        assert low <= min(lengths) and max(lengths) <= high
        middle, width = math.log(low * high) / 2, math.log(high / low)
        assert abs(statistics.mean(map(math.log, lengths)) - middle) < 0.15 * width  # 3.6 standard deviations of a mean of 48


def test_the_shared_prefix_is_shared_and_no_more() -> None:
    workload = make(None, 1.0, QWEN3)["W3"]
    prompts = [job.prompt for job in workload.jobs]
    assert len(prompts) == 24 and workload.shared == 768
    assert len({prompt[:768] for prompt in prompts}) == 1 and len({prompt[768] for prompt in prompts}) > 20
    assert all(768 + 16 <= len(prompt) <= 768 + 48 for prompt in prompts) and {job.new for job in workload.jobs} == {32}
