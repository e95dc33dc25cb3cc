"""Ways of showing lanes without moving the cursor: raw text, whole outputs in order, JSON lines, interleaved lines."""

from __future__ import annotations

import json
import math
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from quire.cli.lanes import Lane
from quire.outputs import TopLogprob


class Quiet:
    """Shows nothing; the others override what they need."""

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdout.flush()

    def changed(self, lane: Lane, text: str) -> None:
        """Nothing."""

    def ended(self, lanes: Sequence[Lane]) -> None:
        """Nothing."""

    def tick(self) -> None:
        """Nothing."""


class RawShow(Quiet):
    """The text of one lane as it comes and nothing else, so that it can be piped; on a terminal a line end after it."""

    def changed(self, lane: Lane, text: str) -> None:
        """Write it at once."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def __exit__(self, *_: object) -> None:
        if sys.stdout.isatty():
            sys.stdout.write("\n")
        sys.stdout.flush()


class InOrder(Quiet):
    """Hands requests that have ended to `emit` in the order they were asked, each as soon as those before it have ended."""

    def __init__(self) -> None:
        self._ready: dict[int, Sequence[Lane]] = {}
        self._next = 0

    def ended(self, lanes: Sequence[Lane]) -> None:
        """Emit what can be."""
        self._ready[lanes[0].request] = lanes
        while self._next in self._ready:
            for lane in self._ready.pop(self._next):
                self.emit(lane)
            self._next += 1

    def emit(self, lane: Lane) -> None:
        """The lane's turn."""


class WholeShow(InOrder):
    """Whole outputs in order, each under a line that names its prompt, as `head` does with several files."""

    def emit(self, lane: Lane) -> None:
        """Print it."""
        start = "" if lane.request == lane.index == 0 else "\n"
        sys.stdout.write(f"{start}==> {lane.label}: {one_line(lane.prompt, 70)} <==\n{lane.text.rstrip()}\n")
        sys.stdout.flush()


class JsonShow(InOrder):
    """One JSON object a line for each sequence."""

    def emit(self, lane: Lane) -> None:
        """Print it."""
        sys.stdout.write(json.dumps(record(lane)) + "\n")
        sys.stdout.flush()


class LineShow(Quiet):
    """All lanes at once where the cursor cannot move: whole lines as they fill up, each behind its lane's label."""

    def __init__(self, lanes: Sequence[Lane], width: int) -> None:
        self._margin = max(len(lane.label) for lane in lanes)
        self._width = max(20, width - self._margin - 3)
        self._held: dict[int, str] = {}

    def changed(self, lane: Lane, text: str) -> None:
        """Print the lines that are full; the first text brings the prompt before it."""
        key = id(lane)
        if key not in self._held:
            self._held[key] = ""
            for line in lane.prompt.split("\n"):
                for part in textwrap.wrap(line, self._width - 2, break_on_hyphens=False):
                    self._print(lane, "> " + part)
        *full, rest = (self._held[key] + text).split("\n")
        for line in full:
            self._wrap(lane, line)
        self._held[key] = self._wrap(lane, rest, keep=True)
        if lane.finish_reason is not None:
            self._wrap(lane, self._held[key])
            self._held[key] = ""

    def _wrap(self, lane: Lane, line: str, keep: bool = False) -> str:
        lines = textwrap.wrap(line, self._width, drop_whitespace=False, break_on_hyphens=False) if line.strip() else []
        kept = lines.pop() if keep and lines else line if keep else ""
        for one in lines:
            self._print(lane, one.strip())
        return kept

    def _print(self, lane: Lane, line: str) -> None:
        sys.stdout.write(f"{lane.label:>{self._margin}} │ {line}\n")
        sys.stdout.flush()


def record(lane: Lane) -> dict[str, Any]:
    """A finished lane as JSON takes it. A logprob that is not finite becomes null: JSON has no word for it."""
    assert lane.output is not None and lane.completion is not None
    done = lane.completion
    told: dict[str, Any] = {
        "request": lane.request,
        "index": lane.index,
        "prompt": lane.prompt,
        "text": done.text,
        "token_ids": done.token_ids,
        "finish_reason": done.finish_reason,
        "stop_reason": done.stop_reason,
        "error": None if lane.output.error is None else f"{type(lane.output.error).__name__}: {lane.output.error}",
        "receipt": asdict(lane.output.receipt) | {"staged_tokens": lane.output.receipt.staged_tokens},
    }
    if done.logprobs is not None:
        told["logprobs"] = [_finite(x) for x in done.logprobs]
    if lane.output.prompt_logprobs is not None:
        told["prompt_logprobs"] = [None if x is None else _finite(x) for x in lane.output.prompt_logprobs]
    if lane.output.prompt_top_logprobs is not None:
        told["prompt_top_logprobs"] = [top and _top(top) for top in lane.output.prompt_top_logprobs]
    if done.top_logprobs is not None:
        told["top_logprobs"] = [_top(top) for top in done.top_logprobs]
    return told


def one_line(text: str, width: int) -> str:
    """The start of `text` on one line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _top(top: list[TopLogprob]) -> list[dict[str, Any]]:
    return [{"token_id": t.token_id, "logprob": _finite(t.logprob)} for t in top]


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
