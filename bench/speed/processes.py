"""An engine as a process of its own: a job file in, one JSON line out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.speed.workloads import Workload

ROOT = Path(__file__).parent.parent.parent
ENGINES = {
    "quire": "quire_llm",
    "generate": "transformers_generate",
    "generate_batch": "transformers_batch",
    "llama.cpp": "llama_cpp_python",
    "openvino": "openvino_genai_pipeline",
    "vllm": "vllm_cpu",
}
OURS = ("quire", "generate", "generate_batch")  # run in the interpreter that runs the bench


@dataclass(frozen=True)
class EngineRun:
    """One run of an engine. `problem` is why there is nothing else, "absent: ..." or "failed: ...". `read_bytes_s`: what memory gave beside it."""

    problem: str | None = None
    seconds: float = 0.0
    first_token_s: tuple[float, ...] | None = None
    load_s: float = 0.0
    memory: dict[str, int] | None = None
    counters: dict[str, Any] | None = None
    version: str = ""
    read_bytes_s: float | None = None


def task(workload: Workload, folder: Path, quantization: str, threads: int) -> dict[str, Any]:
    """The job file's content."""
    return {
        "folder": str(folder),
        "prompts": [list(job.prompt) for job in workload.jobs],
        "new": [job.new for job in workload.jobs],
        "n": workload.n,
        "shared": workload.shared,
        "max_concurrent": workload.max_concurrent,
        "max_len": workload.longest,
        "quantization": quantization,
        "threads": threads,
        "seed": 1,
    }


def run_engine(engine: str, workload: Workload, folder: Path, quantization: str, threads: int, peers: dict[str, str], timeout_s: float) -> EngineRun:
    """Run `workload` on `engine`; `peers` has the interpreters of those that are not ours. What goes wrong is told in the result."""
    python = sys.executable if engine in OURS else peers.get(engine)
    if python is None:
        return EngineRun(problem=f"absent: no interpreter given (--peer {engine}=PYTHON)")
    with tempfile.TemporaryDirectory() as scratch:
        job = Path(scratch) / "job.json"
        job.write_text(json.dumps(task(workload, folder, quantization, threads)))
        return run_process([python, "-m", f"bench.speed.engines.{ENGINES[engine]}", str(job)], workload.tokens_out, threads, timeout_s)


def end_engines_when_told_to_end() -> None:
    """Let SIGTERM (`timeout`, a shell that goes) end this process as an exception, so that the engine or server that runs is ended as well."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def environment(python: str, threads: int) -> dict[str, str]:
    """The variables of a process that is measured, run by an interpreter of its own or by this one."""
    kept = {key: value for key, value in os.environ.items() if python == sys.executable or key != "PYTHONPATH"}
    return kept | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def run_process(command: list[str], tokens_out: int, threads: int, timeout_s: float) -> EngineRun:
    """Run an engine's script; it must give exactly `tokens_out` tokens."""
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(command[0], threads), text=True, errors="replace", start_new_session=True, **pipes
        )
    except OSError as error:
        return EngineRun(problem=f"absent: {error}")
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return EngineRun(problem=f"failed: not done after {timeout_s:g} s")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with all that it started, which would slow down the next one
        process.communicate()
    return read_answer(output, errors, process.returncode, tokens_out)


def read_answer(output: str, errors: str, status: int, tokens_out: int) -> EngineRun:
    """The last line of `output` as the protocol has it (engines/protocol.py)."""
    lines = output.strip().splitlines()
    try:
        said = json.loads(lines[-1])
    except (IndexError, ValueError):
        said = None
    if not isinstance(said, dict):
        why = (errors.strip().splitlines() or ["it said nothing"])[-1]
        return EngineRun(problem=f"failed: exit status {status}: {why[:300]}")
    for problem in ("absent", "failed"):
        if problem in said:
            return EngineRun(problem=f"{problem}: {said[problem]}")
    if said["tokens_out"] != tokens_out:
        return EngineRun(problem=f"failed: {said['tokens_out']} tokens came, {tokens_out} were asked for")
    first = said["first_token_s"]
    return EngineRun(
        seconds=said["seconds"],
        first_token_s=None if first is None else tuple(first),
        load_s=said["load_s"],
        memory=said["memory"],
        counters=said["counters"],
        version=said["version"],
    )
