"""The page's stream: one look at the engine serves all who watch, and each is sent what has changed since it was last sent something.

While requests run the engine is asked every TICK_S; otherwise only when one starts, and now and then to show that the line is alive. With nobody
watching nothing is asked. A slow reader skips pictures, it is never sent old ones.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from array import array
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quire.engine.cache_map import CacheMap, MappedSequence
from quire.errors import EngineDeadError
from quire.policy.namespaces import lies_in
from quire.policy.pages import STATES
from quire.server.serving import Serving

if TYPE_CHECKING:
    from quire.engine.llm import LLM

TICK_S = 0.15
LOADING_S = 1.0
KEEP_ALIVE_S = 5.0
SETTLE_S = 1.0  # until what was written last to the disk is seen there
COUNTERS = ("num_running", "num_waiting", "num_computed_tokens", "num_drawn_tokens", "num_preemptions", "num_steps")
MAX_WATCHERS = 64
BLOCK = 128  # bytes of states compared at once


@dataclass(frozen=True, slots=True)
class Look:
    """The engine at one moment; `seen` is None while it loads and when it has died."""

    at_s: float
    status: str
    seen: CacheMap | None = None

    @property
    def pause_s(self) -> float:
        """How long nothing new is expected."""
        if self.status == "loading":
            return LOADING_S
        if self.seen is None:
            return KEEP_ALIVE_S
        if self.seen.sequences or self.seen.counts()["moving"]:
            return TICK_S
        return KEEP_ALIVE_S if self.seen.disk is None or self.seen.disk.settled else SETTLE_S


class Feed:
    """Looks at the engine of one server for all its watchers. Used on the event loop."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._latest: Look | None = None
        self._news = asyncio.Condition()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.num_watchers = 0

    async def events(self, namespace: str) -> AsyncIterator[bytes]:
        """Server-sent events for one watcher, until it leaves or the server ends."""
        view, shown = View(self._serving, namespace), None
        self.num_watchers += 1
        self._wake.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        try:
            while True:
                async with self._news:
                    while self._latest is shown and self._task is not None:
                        await self._news.wait()
                    look = self._latest
                if look is None or look is shown:  # the server ends
                    return
                yield view.event(look)
                shown = look
        finally:
            self.num_watchers -= 1
            if not self.num_watchers:
                self._wake.set()

    async def _run(self) -> None:
        loop, metrics = asyncio.get_running_loop(), self._serving.metrics

        def wake() -> None:
            loop.call_soon_threadsafe(self._wake.set)

        metrics.on_started.append(wake)
        try:
            while self.num_watchers and not self._serving.closing.is_set():
                self._wake.clear()
                look = await asyncio.to_thread(_look, self._serving)
                async with self._news:
                    self._latest = look
                    self._news.notify_all()
                if look.pause_s > TICK_S:
                    await _any_of(self._wake, self._serving.closing, timeout_s=look.pause_s)
                else:
                    await _any_of(self._serving.closing, timeout_s=TICK_S)
        finally:
            metrics.on_started.remove(wake)
            self._task = None
            async with self._news:
                self._latest = None
                self._news.notify_all()


def _look(serving: Serving) -> Look:
    """Blocks until the engine is between two steps."""
    llm: LLM | None = serving.llm
    if llm is None:
        return Look(time.monotonic(), "dead" if serving.failure else "loading")
    try:
        seen = llm.cache_map()
    except EngineDeadError:
        return Look(time.monotonic(), "dead")
    return Look(time.monotonic(), "ready", seen)


async def _any_of(*events: asyncio.Event, timeout_s: float) -> None:
    tasks = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(slots=True)
class View:
    """What one watcher has been sent, and so what is news to it. Of other namespaces it learns neither names nor contents."""

    serving: Serving
    namespace: str
    states: bytes = b""
    tables: dict[int, tuple[array[int], ...]] = field(default_factory=dict)

    def event(self, look: Look) -> bytes:
        """The server-sent event that brings the watcher up to date."""
        message: dict[str, Any] = {"at": round(look.at_s, 3), "status": look.status, "model": self.serving.settings.model}
        if look.seen is not None:
            message |= self._news(look.seen)
        return b"data: " + json.dumps(message, separators=(",", ":")).encode() + b"\n\n"

    def _news(self, seen: CacheMap) -> dict[str, Any]:
        metrics, stats = self.serving.metrics, seen.stats
        message: dict[str, Any] = {
            "counts": seen.counts(),
            "rows": [self._row(seq) for seq in seen.sequences],
            "stats": {name: stats[name] for name in COUNTERS},
            "disk": None if seen.disk is None else {"also": seen.disk.num_also, "only": seen.disk.num_only},
            "prompt_tokens": metrics.prompt_tokens,
            "cached_tokens": metrics.cached_tokens,
        }
        changed = changes(self.states, seen.states) if len(self.states) == len(seen.states) else None
        if changed is None or len(changed) > len(seen.states):
            message |= {"names": STATES, "full": base64.b64encode(seen.states).decode()}
        elif changed:
            message["delta"] = changed
        self.states = seen.states
        paths = {seq.arrival: path for seq in seen.sequences if (path := extended(self.tables.get(seq.arrival, ()), seq.tables))}
        if paths:
            message["paths"] = paths
        self.tables = {seq.arrival: seq.tables for seq in seen.sequences}
        return message

    def _row(self, seq: MappedSequence) -> list[Any]:
        own = lies_in(seq.namespace, self.namespace)
        running = any(seq.tables)
        return [
            seq.arrival,
            seq.request_id if own else None,
            seq.index,
            seq.num_prompt,
            seq.num_known,
            seq.num_committed,
            None if running else seq.waits_for or "turn",
        ]


def changes(old: bytes, new: bytes) -> list[int]:
    """What turns one row of states into the other, as start, length and state of each run: flat, for it is sent many times a second."""
    runs: list[int] = []
    for start in range(0, len(new), BLOCK):
        before, after = old[start : start + BLOCK], new[start : start + BLOCK]
        if before == after:
            continue
        for i, (was, state) in enumerate(zip(before, after, strict=True), start):
            if was == state:
                continue
            if runs and runs[-1] == state and runs[-3] + runs[-2] == i:
                runs[-2] += 1
            else:
                runs += (i, 1, state)
    return runs


def extended(old: tuple[array[int], ...], new: tuple[array[int], ...]) -> dict[int, dict[str, list[int]]]:
    """Of each group's table that has changed, the pages that came at its end, or all of them."""
    news = {}
    for g, table in enumerate(new):
        before = old[g] if g < len(old) else array("i")
        if table == before:
            continue
        if before and table[: len(before)] == before:
            news[g] = {"add": [page_id for page_id in table[len(before) :] if page_id >= 0]}
        else:
            news[g] = {"all": [page_id for page_id in table if page_id >= 0]}
    return news
