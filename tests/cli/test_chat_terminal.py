"""`quire chat` on a pseudo-terminal, against a server whose answer never ends by itself: whatever else the machine does, Ctrl-C finds it."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

PATIENCE_S = 60.0


class Endless(BaseHTTPRequestHandler):
    """A server whose first answer goes on until the client leaves, so that Ctrl-C always finds it; later ones end by themselves."""

    protocol_version = "HTTP/1.1"
    num_asked = 0
    left: threading.Event

    def do_GET(self) -> None:
        body = b'{"data": [{"id": "parrot"}]}'
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        cls = type(self)
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        cls.num_asked += 1
        self.send_response(200)
        self.send_header("connection", "close")
        self.end_headers()
        if cls.num_asked == 1:
            end = time.monotonic() + PATIENCE_S
            with contextlib.suppress(ConnectionError):
                while time.monotonic() < end:
                    self._tell({"choices": [{"delta": {"content": "squawk "}}]})
                    time.sleep(0.02)
                return
            cls.left.set()
            return
        self._tell({"choices": [{"delta": {"content": f"you said {asked['messages'][-1]['content']}\x1b[2J"}}]})
        self._tell({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _tell(self, event: object) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def parrot() -> Iterator[str]:
    """The address of an `Endless` server."""
    Endless.num_asked, Endless.left = 0, threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as http:
        http.daemon_threads = True
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()
        thread.join()


# It takes the terminal as its own, so that Ctrl-C is a signal, and heeds it. Not by pty.fork: this process has threads.
CHILD = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, "-m", "quire", "chat", *sys.argv[1:]])
"""
PROMPT = r">\x1b\[0m "


class Terminal:
    """`quire chat` on a pseudo-terminal. Everything that is waited for is waited for within PATIENCE_S."""

    def __init__(self, *args: str, home: Path) -> None:
        (home / "inputrc").write_text("set enable-bracketed-paste off\n")
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "INPUTRC": str(home / "inputrc"), "HOME": str(home)}
        self._fd, theirs = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *args], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=environment
        )
        os.close(theirs)
        self._seen = ""

    def until(self, pattern: str) -> str:
        """What is shown from here on until it matches."""
        end = time.monotonic() + PATIENCE_S
        while (found := re.search(pattern, self._seen)) is None:
            assert time.monotonic() < end, f"no {pattern!r} in {self._seen[-2000:]!r}"
            self._read()
        before, self._seen = self._seen[: found.end()], self._seen[found.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def press_ctrl_c_until(self, condition: Callable[[], object]) -> None:
        """Once does, but for an instant before `readline` waits in which Python would not hear it."""
        for _ in range(6):
            self.type("\x03")
            end = time.monotonic() + PATIENCE_S / 6
            while time.monotonic() < end:
                if condition():
                    return
                self._read(0.05)
        raise AssertionError(self._seen)

    def shows(self, pattern: str) -> bool:
        return re.search(pattern, self._seen) is not None

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def close(self) -> None:
        self._process.kill()
        self._process.wait(PATIENCE_S)
        os.close(self._fd)

    def _read(self, seconds: float = 0.2) -> None:
        if select.select([self._fd], [], [], seconds)[0]:
            try:
                self._seen += os.read(self._fd, 65536).decode(errors="replace")
            except OSError:  # nobody has the other end any more
                time.sleep(seconds)


def test_on_a_terminal(parrot: str, tmp_path: Path) -> None:
    kept = tmp_path / "typed"
    terminal = Terminal(parrot, "--history", str(kept), home=tmp_path)
    try:
        assert "parrot" in terminal.until("/help lists the commands")
        terminal.until(PROMPT)
        terminal.type("the fox\n")
        terminal.until("squawk squawk")
        terminal.type("\x03")
        terminal.until("stopped; ")
        assert Endless.left.wait(PATIENCE_S), "the server is told"
        terminal.until(PROMPT)
        terminal.type("are you there?\n")
        terminal.until(r"you said are you there\?\[2J\r\n")  # and the escape before it was not passed on
        terminal.until(PROMPT)
        terminal.type("half a line")
        terminal.until("half a line")
        terminal.press_ctrl_c_until(lambda: terminal.shows(PROMPT) or terminal.exit_code is not None)
        assert terminal.exit_code is None, "it drops what was typed, and no more"
        terminal.until(PROMPT)
        terminal.type("\x1b[A")
        terminal.until("are you there")
        terminal.type("\n")
        terminal.until("you said are you there")
        terminal.until(PROMPT)
        terminal.type("/stats\n")  # the answer is no longer what a Ctrl-C could be meant for
        terminal.until("3 answers")
        terminal.until(PROMPT)
        terminal.press_ctrl_c_until(lambda: terminal.exit_code is not None)
        assert terminal.exit_code == 0
    finally:
        terminal.close()
    assert kept.read_text().splitlines()[:2] == ["the fox", "are you there?"] and kept.stat().st_mode & 0o077 == 0
    assert {path.name for path in tmp_path.iterdir()} == {"typed", "inputrc"}, "nothing else is written down"
