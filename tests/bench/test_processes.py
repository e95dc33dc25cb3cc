"""Engines as processes: what one says is believed only as far as the protocol goes, and nothing is made up for one that says nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench.speed.processes import ENGINES, ROOT, EngineRun, read_answer, run_engine, run_process, task
from bench.speed.shapes import QWEN3
from bench.speed.workloads import Job, Workload

WORKLOAD = Workload("W3", "", "batch", QWEN3, (Job((300, 301, 302), 4), (Job((300, 9), 2))), shared=1)


def fake(scratch: Path, folder: str, job: str = "job.json") -> EngineRun:
    path = scratch / job
    path.write_text(json.dumps(task(WORKLOAD, Path(folder), "none", 3)))
    return run_process([sys.executable, "-m", "tests.bench.fake_engine", str(path)], WORKLOAD.tokens_out, 3, 60)


def test_a_run(tmp_path: Path) -> None:
    run = fake(tmp_path, "good")
    assert run.problem is None and run.seconds > 0 and run.first_token_s == (0.25, 0.25) and run.version == "fake 1"
    assert run.counters == {"calls": 2, "threads": 3, "prompts": [[300, 301, 302], [300, 9]]}  # warmed up once, on something else
    assert run.memory is not None and 0 < run.memory["base"] <= run.memory["load_peak"] and run.memory["peak"] > 0


@pytest.mark.parametrize(
    ("folder", "problem"),
    [
        ("absent", "absent: quantization=int8: there is none"),
        ("raises", "failed: RuntimeError: out of pages"),
        ("short", "failed: 5 tokens came, 6 were asked for"),
        ("dies", "failed: exit status 3: terminate called"),
    ],
)
def test_what_goes_wrong_is_told(tmp_path: Path, folder: str, problem: str) -> None:
    assert fake(tmp_path, folder) == EngineRun(problem=problem)


def test_a_module_that_is_missing_is_absent(tmp_path: Path) -> None:
    assert fake(tmp_path, "good", "missing.json").problem == "absent: ModuleNotFoundError: No module named 'no_such_module'"


def test_an_interpreter_that_is_not_there(tmp_path: Path) -> None:
    assert run_engine("vllm", WORKLOAD, tmp_path, "none", 1, {}, 5).problem == "absent: no interpreter given (--peer vllm=PYTHON)"
    run = run_engine("vllm", WORKLOAD, tmp_path, "none", 1, {"vllm": str(tmp_path / "python")}, 5)
    assert run.problem is not None and run.problem.startswith("absent: ") and "No such file" in run.problem


def test_time_runs_out_for_an_engine_and_all_that_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    run = run_process(["sh", "-c", f"sleep 600 & echo $! > {pid}; wait"], 1, 1, 2)
    assert run.problem == "failed: not done after 2 s"
    assert ends(pid)


def test_a_bench_that_is_told_to_end_ends_its_engine(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    engine = ["sh", "-c", f"echo $$ > {pid}.new; mv {pid}.new {pid}; exec sleep 600"]
    code = f"from bench.speed import processes as p; p.end_engines_when_told_to_end(); p.run_process({engine!r}, 1, 1, 600)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as bench:
        while not pid.exists():
            assert bench.poll() is None
            time.sleep(0.05)
        bench.terminate()
        assert bench.wait(60) == 143
    assert ends(pid)


def ends(pid: Path) -> bool:
    """Whether the process whose id is in the file is gone soon."""
    for _ in range(200):
        if subprocess.run(["kill", "-0", pid.read_text().strip()], capture_output=True).returncode:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("output", ["", "hello", "{", "[1]", "7\n"])
def test_what_is_no_answer(output: str) -> None:
    assert read_answer(output, "", 0, 1).problem == "failed: exit status 0: it said nothing"


def test_every_engine_has_a_script() -> None:
    scripts = {path.stem for path in (ROOT / "bench" / "speed" / "engines").glob("*.py")} - {"__init__", "protocol", "gguf_file"}
    assert scripts == set(ENGINES.values())
