"""Servers as processes of their own on loopback: started, waited for, watched, ended with all that they started."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.speed.processes import ROOT, environment

POOL_BYTES = 2 * 2**30
PAGE = 256  # tokens, of transformers' continuous batching


class NoServer(Exception):
    """There is none: "absent: ..." where what it needs is not here, "failed: ..." otherwise."""


@dataclass(frozen=True)
class Kind:
    """How one kind of server is started, asked whether it is ready, and asked for a completion."""

    command: Callable[[str, Path, int, int, int], list[str]]  # of the interpreter, the model's folder, a port, threads, sequences at once
    ready: str
    fields: Callable[[Path], dict[str, Any]]


def _quire(python: str, folder: Path, port: int, threads: int, sequences: int) -> list[str]:
    sizes = ["--threads", str(threads), "--max-sequences", str(sequences), "--cache-bytes", str(POOL_BYTES)]
    return [python, "-m", "quire", "serve", str(folder), "--port", str(port), *sizes]


def _transformers(*more: str) -> Callable[[str, Path, int, int, int], list[str]]:
    def command(python: str, folder: Path, port: int, threads: int, sequences: int) -> list[str]:
        # Told nothing, batches take most of the memory there is. This is twice what can run at once, each of up to two pages.
        sizes = ["--cb-num-blocks", str(4 * sequences), "--cb-max-batch-tokens", "512"] if more else []
        serve = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
        return [python, "-m", "transformers.cli.transformers", *serve, *more, *sizes]

    return command


def _asked(folder: Path) -> dict[str, Any]:
    return {"model": str(folder), "temperature": 0, "stream": True}


KINDS = {
    "quire": Kind(_quire, "/ready", lambda folder: {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}),
    "transformers": Kind(_transformers(), "/health", _asked),
    "transformers_batch": Kind(_transformers("--continuous-batching"), "/health", _asked),
}


class Server:
    """A server that is ready."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], fields: dict[str, Any]) -> None:
        self.url, self.fields, self._process = url, fields, process

    def cpu_s(self) -> tuple[float, float]:
        """CPU seconds so far: of its event loop's thread, the process's first, and of all its threads."""
        tasks = Path(f"/proc/{self._process.pid}/task")
        seconds = {int(task.name): _cpu_s(task) for task in tasks.iterdir()}
        return seconds[self._process.pid], sum(seconds.values())


def _cpu_s(task: Path) -> float:
    with contextlib.suppress(OSError):  # a thread that has just ended
        return int((task / "schedstat").read_text().split()[0]) / 1e9
    return 0.0


@contextlib.contextmanager
def serving(name: str, python: str | None, folder: Path, threads: int, sequences: int, timeout_s: float) -> Iterator[Server]:
    """A server of this name (KINDS) for a checkpoint, run by `python` (None: by this interpreter).

    Raises:
        NoServer: it did not become ready within `timeout_s`.
    """
    kind, port = KINDS[name], _free_port()
    command = kind.command(python or sys.executable, folder, port, threads, sequences)
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(command[0], threads), stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
            )
        except OSError as error:
            raise NoServer(f"absent: {error}") from None
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, url + kind.ready, timeout_s, said)
            yield Server(url, process, kind.fields(folder))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, timeout_s: float, said: Any) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if process.poll() is not None:
            said.seek(0)
            raise NoServer(why_not(said.read().decode("utf-8", "replace"), process.returncode))
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):  # 503 while it loads is an OSError too
            return
        time.sleep(0.1)
    raise NoServer(f"failed: not ready after {timeout_s:g} s")


def why_not(output: str, status: int) -> str:
    """Why a server that wrote `output` ended before it was ready: a package that it has not is its absence, all else a failure."""
    lines = [line for line in output.splitlines() if line.strip()]
    missing = [line for line in lines if line.startswith(("ImportError", "ModuleNotFoundError")) or "No module named" in line or "requires `" in line]
    if missing:
        return f"absent: {missing[-1].strip()[:300]}"
    return f"failed: exit status {status}: {(lines or ['it said nothing'])[-1].strip()[:300]}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
