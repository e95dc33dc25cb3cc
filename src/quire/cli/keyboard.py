"""Lines typed on a terminal: editing, earlier lines, and what Ctrl-C ends."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.console import Console

from quire.errors import InvalidRequestError

MAX_HISTORY = 1000  # lines


class Stopped(KeyboardInterrupt):
    """The first Ctrl-C while an answer comes. A second one, while the first is being heeded, is a KeyboardInterrupt like any other."""


def prompt(console: Console) -> str:
    """What stands before the line that is typed."""
    if console.is_dumb_terminal:
        return "> "
    style = "1" if console.no_color else "1;32"
    return f"\001\033[{style}m\002>\001\033[0m\002 "  # what is between \001 and \002 takes no room on the line, readline is told


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Inside, the first Ctrl-C raises `Stopped`."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise Stopped

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def half_a_line() -> bool:
    """Whether something had been typed when `input` was left."""
    try:
        import readline
    except ImportError:
        return False
    return bool(readline.get_line_buffer())


@contextlib.contextmanager
def line_editing(history: Path | None) -> Iterator[None]:
    """Arrow keys and earlier lines, by the standard library's readline where it is there. Only with `history` are lines written to disk.

    Raises:
        InvalidRequestError: the file cannot be read or written.
    """
    try:
        import readline
    except ImportError:
        yield
        return
    readline.set_history_length(MAX_HISTORY)
    file = None if history is None else history.expanduser()
    if file is None:
        yield
        return
    try:
        file.touch(mode=0o600)
        readline.read_history_file(file)
    except OSError as error:
        raise InvalidRequestError("history", str(history), f"a file that can be written ({error.strerror})") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(file)
