"""What happens to a server, on stderr: a line an event, as text or as JSON. No prompt, no key and no address as it was sent is in one.

An event is a log record with a name and facts beside its sentence. Of an exception its kind and its place are told; its words may quote what was
asked, so they are told of the engine's own only.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from quire.server.errors import without_paths

LogFormat = Literal["text", "json"]
MAX_FRAMES = 20
ENGINE = "quire"  # the logger of what lies below the server
log = logging.getLogger("quire.server")
access_log = logging.getLogger("quire.access")


def tell(event: str, sentence: str, facts: Mapping[str, Any], *, to: logging.Logger = log, level: int = logging.INFO) -> None:
    """An event: its name and facts for a machine, a sentence for people. Neither has what a client sent."""
    to.log(level, "%s", sentence, extra={"event": event, "facts": facts})


def warn(message: str) -> None:
    """A warning of what lies below."""
    logging.getLogger(ENGINE).warning("%s", message)


@contextlib.contextmanager
def on_stderr(form: LogFormat, *, requests: bool) -> Iterator[None]:
    """Inside, all that is logged goes to stderr: ours from INFO on, a line for each request only if wanted, others' from WARNING on."""
    handler, root, ours = _Handler(), logging.getLogger(), logging.getLogger(ENGINE)
    handler.setFormatter(_Json() if form == "json" else _Text())
    levels = {ours: logging.INFO, access_log: logging.INFO if requests else logging.WARNING}
    before = {logger: logger.level for logger in levels}
    root.addHandler(handler)
    try:
        for logger, level in levels.items():
            logger.setLevel(level)
        yield
    finally:
        root.removeHandler(handler)
        for logger, level in before.items():
            logger.setLevel(level)


class _Handler(logging.Handler):
    """On stderr as it is when something is said: a spinner and a test put others there for a time. A line is one write."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()


class _Text(logging.Formatter):
    """The sentence, and before one that is a warning or worse, what it is."""

    def format(self, record: logging.LogRecord) -> str:
        head = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        failure = _failure(record)
        return head + _sentence(record) + (f": {failure['error']}, at {', '.join(failure['at'])}" if failure else "")


class _Json(logging.Formatter):
    """One object: time, level and event, then the facts. What has no name is a `log`, and its sentence the one fact."""

    def format(self, record: logging.LogRecord) -> str:
        event = getattr(record, "event", None)
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z"
        told: dict[str, Any] = {"time": when, "level": record.levelname.lower(), "event": event or "log"}
        if event is None:
            told |= {"logger": record.name, "message": _sentence(record)}
        return json.dumps({**told, **getattr(record, "facts", {}), **_failure(record)}, default=str)


def _sentence(record: logging.LogRecord) -> str:
    """On one line; of others, asyncio above all, the first, since they go on with the failed call and its arguments."""
    if record.name.partition(".")[0] != ENGINE:
        return record.getMessage().partition("\n")[0]
    return " ".join(record.getMessage().split())


def _failure(record: logging.LogRecord) -> dict[str, Any]:
    """Kind and place of the exception that a record came with; the place is where its first cause was raised."""
    error = record.exc_info[1] if record.exc_info else None
    if error is None:
        return {}
    kinds = [type(error).__name__]
    while error.__cause__ is not None:
        error = error.__cause__
        kinds.append(type(error).__name__)
    words = " ".join(without_paths(f": {error}").split("\n")) if record.name == ENGINE else ""
    frames = list(traceback.walk_tb(error.__traceback__))[-MAX_FRAMES:]
    places = [f"{frame.f_globals.get('__name__', '?')}:{line} {frame.f_code.co_name}" for frame, line in frames]
    return {"error": " from ".join(kinds) + words, "at": places}
