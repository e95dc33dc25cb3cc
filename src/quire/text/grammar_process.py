"""Holds the process that tries grammars: asks it, waits so long and no longer, and starts another when it has died."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from quire.text.task import PATIENCE

START_SECONDS = 60.0  # to start Python and load llguidance, on a machine that is busy


class GrammarProcess:
    """One process, started at the first question. Not thread-safe.

    Args:
        vocab_size: of the model.
        special: the names of its special tokens, which a grammar may mention.
        seconds: of its processor time that one grammar may take; on the wall it may take PATIENCE times as long.
    """

    def __init__(self, vocab_size: int, special: Sequence[str], seconds: float) -> None:
        self._first = {"size": vocab_size, "special": list(special), "seconds": seconds}
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, kind: str, source: str) -> str:
        """What is wrong with a grammar given as in `StructuredOutput.source`; "" if nothing is."""
        if self._process is None or self._process.poll() is not None:
            self._start()
            # A question that needs no thought: its answer says that the process is up, and only then does the clock run.
            if self._ask("regex", "a", START_SECONDS) is None:
                return "the process that checks grammars does not start"
        answer = self._ask(kind, source, PATIENCE * self._seconds)
        if answer is not None:
            return answer
        late = self._process is not None and self._process.poll() in (None, -signal.SIGXCPU)
        self.close()
        return f"it takes longer than {self._seconds:g} seconds to compile" if late else "it is too deep or too large to compile"

    def kill(self) -> None:
        """Have the process answer nothing more. May be called from any thread."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the process, whatever it is doing."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def _start(self) -> None:
        self.close()
        # -P: this folder's own files must not stand in for the library's modules. The path is handed on because it may be of our making.
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-P", str(Path(__file__).with_name("grammar_check.py"))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, bufsize=0)
        self._send(self._first)

    def _ask(self, kind: str, source: str, seconds: float) -> str | None:
        """The answer, or None if it did not come in time or at all."""
        deadline, line = time.monotonic() + seconds, b""
        if self._process is None or not self._send({"kind": kind, "source": source}):
            return None
        assert self._process.stdout is not None
        out = self._process.stdout.fileno()
        answer = select.poll()  # a server has more descriptors than `select` can tell apart
        answer.register(out, select.POLLIN)
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not answer.poll(1000 * left):
                return None
            part = os.read(out, 65536)
            if not part:
                self._process.wait(START_SECONDS)
                return None
            line += part
        return str(json.loads(line)["error"])

    def _send(self, value: object) -> bool:
        assert self._process is not None and self._process.stdin is not None
        data = json.dumps(value).encode() + b"\n"
        try:
            while data:  # an unbuffered pipe may take a part at a time
                data = data[self._process.stdin.write(data) :]
        except OSError:
            return False
        return True
