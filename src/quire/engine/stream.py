"""One request's private stream of events, from the engine's thread to whoever reads it, by `for` or by `async for`.

A slow reader never blocks the engine and never grows the queue without bound: an event that finds an unread one of the same sequence is merged
into it, so at most one event a sequence waits, and its size is bounded by what the request may generate.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import TypeVar

from quire.outputs import RequestOutput, TokenEvent

T = TypeVar("T")


class RequestStream:
    """Events of one request in order; iteration ends after the event that carries `output`. One reader."""

    def __init__(self, request_id: str, cancel: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._cancel = cancel
        self._ready = threading.Condition()
        self._events: list[TokenEvent] = []
        self._output: RequestOutput | None = None
        self._waker: Callable[[], None] | None = None
        self._at_end: Callable[[], None] | None = None

    def put(self, event: TokenEvent) -> None:
        """Called by the engine's thread. Never blocks."""
        with self._ready:
            self._events = _merged(self._events, event)
            if event.output is not None:
                self._output = event.output
            self._ready.notify_all()
            waker, self._waker = self._waker, None
            at_end = self._at_end if event.output is not None else None
        if waker is not None:
            waker()
        if at_end is not None:
            at_end()

    def cancel(self) -> None:
        """Ask the engine to end the request; the stream then ends with finish_reason `cancelled`. Harmless when it has ended."""
        self._cancel(self.request_id)

    def wait(self, timeout_s: float | None = None) -> RequestOutput:
        """Block until the request has ended and return its output; unread events are dropped.

        Raises:
            TimeoutError: it has not ended within `timeout_s` seconds.
        """
        with self._ready:
            if not self._ready.wait_for(lambda: self._output is not None, timeout_s):
                raise TimeoutError(f"request {self.request_id} has not ended within {timeout_s} s")
            self._events = []
            assert self._output is not None
            return self._output

    async def result(self) -> RequestOutput:
        """`wait` for a coroutine: its loop is woken once, at the end."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        with self._ready:
            if self._output is None:
                self._at_end = lambda: _call_in(loop, ended.set)
            else:
                ended.set()
        await ended.wait()
        return self.wait()

    def __iter__(self) -> Iterator[TokenEvent]:
        done = False
        while not done:
            with self._ready:
                self._ready.wait_for(lambda: self._events)
                events, self._events = self._events, []
            for event in events:
                done = done or event.output is not None
                yield event

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        loop = asyncio.get_running_loop()
        done = False
        while not done:
            wake = asyncio.Event()
            with self._ready:
                events, self._events = self._events, []
                if not events:
                    self._waker = lambda wake=wake: _call_in(loop, wake.set)
            if not events:
                await wake.wait()
            for event in events:
                done = done or event.output is not None
                yield event


def _call_in(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    # The reader's loop may be gone; the engine's thread must not die of it.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call)


def _merged(events: list[TokenEvent], new: TokenEvent) -> list[TokenEvent]:
    for i, old in enumerate(events):
        if old.index == new.index:
            merged = replace(
                new,
                text=old.text + new.text,
                token_ids=old.token_ids + new.token_ids,
                logprobs=_joined(old.logprobs, new.logprobs),
                top_logprobs=_joined(old.top_logprobs, new.top_logprobs),
                finish_reason=new.finish_reason or old.finish_reason,
                stop_reason=new.stop_reason if new.stop_reason is not None else old.stop_reason,
            )
            return [*events[:i], *events[i + 1 :], merged]
    return [*events, new]


def _joined(old: list[T] | None, new: list[T] | None) -> list[T] | None:
    return new if old is None else old if new is None else old + new


def shown(streams: list[RequestStream], progress: bool) -> Iterator[RequestStream]:
    """The streams in order, with a progress bar or without."""
    if not progress:
        return iter(streams)
    from tqdm.auto import tqdm  # comes with transformers

    return iter(tqdm(streams, unit="request"))
