"""One request's private stream of events, from the engine's thread to whoever reads it, by `for` or by `async for`.

A slow reader never blocks the engine and never grows the queue without bound: an event that finds an unread one of the same sequence is merged
into it, so at most one event a sequence waits, and its size is bounded by what the request may generate.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar, cast

from quire.engine.home import Home, stays_here
from quire.errors import InvalidRequestError
from quire.outputs import RequestOutput, TokenEvent

T = TypeVar("T")
Waiter = asyncio.Future[None]  # of a coroutine's own loop


def wake(waiters: Iterable[Waiter]) -> None:
    """Let those go on who wait for these. A loop is called once for all of its own: that is a system call, and a switch of threads."""
    loops: dict[asyncio.AbstractEventLoop, list[Waiter]] = {}
    for waiter in waiters:
        loops.setdefault(waiter.get_loop(), []).append(waiter)
    for loop, own in loops.items():
        with contextlib.suppress(RuntimeError):  # the reader's loop may be gone; the engine's thread must not die of it
            loop.call_soon_threadsafe(_set, own)


class RequestStream:
    """Events of one request in order; iteration ends after the event that carries `output`. One reader: of several each has some of the events,
    and what `wait` or `result` drops while somebody reads nobody has.

    `wake_later` is told who waits for what has come: whoever puts events into many streams wakes all their readers together.
    `read`: whether anybody reads the events; if not, only the last one is kept, and nobody is woken before.
    """

    def __init__(
        self, request_id: str, cancel: Callable[[str], None], wake_later: Callable[[Waiter], None] | None = None, *, read: bool = True
    ) -> None:
        self.request_id, self._read = request_id, read
        self._cancel, self._home = cancel, Home()
        self._wake = wake_later if wake_later is not None else lambda waiter: wake([waiter])
        self._lock = threading.RLock()
        self._blocked: list[threading.Lock] = []  # shut ones, of threads that wait for the next event
        self._events: list[TokenEvent] = []
        self._output: RequestOutput | None = None
        self._readers: list[Waiter] = []
        self._at_end: list[Waiter] = []

    __reduce_ex__ = stays_here

    def put(self, event: TokenEvent) -> None:
        """Called by the engine's thread. Never blocks."""
        if not self._read and event.output is None:
            return
        with self._lock:
            self._events = _merged(self._events, event)
            if event.output is not None:
                self._output = event.output
            blocked, self._blocked = self._blocked, []
            waiters, self._readers = self._readers, []
            if event.output is not None:
                waiters += self._at_end
        for shut in blocked:
            shut.release()
        for waiter in waiters:
            self._wake(waiter)

    def cancel(self) -> None:
        """Ask the engine to end the request; the stream then ends with finish_reason `cancelled`. Harmless when it has ended."""
        self._cancel(self.request_id)

    def wait(self, timeout_s: float | None = None) -> RequestOutput:
        """Block until the request has ended and return its output; unread events are dropped.

        Raises:
            TimeoutError: it has not ended within `timeout_s` seconds.
            InvalidRequestError: `timeout_s` is no such number.
            EngineDeadError: this is a process forked from the engine's, which no event reaches; so do all that read.
        """
        if timeout_s is not None and not (isinstance(timeout_s, int | float) and timeout_s <= threading.TIMEOUT_MAX):
            raise InvalidRequestError("timeout_s", timeout_s, f"a number of at most {threading.TIMEOUT_MAX:g}, or None")
        if not self._block(lambda: self._output is not None, timeout_s):
            raise TimeoutError(f"request {self.request_id} has not ended within {timeout_s} s")
        with self._lock:
            self._events = []
            assert self._output is not None
            return self._output

    def _block(self, ready: Callable[[], object], timeout_s: float | None = None) -> bool:
        """Wait until it is `ready`, for so long at most; whether it is.

        A Ctrl-C may come at any moment. In a Condition, which is Python code, one leaves the lock taken now and then, and the engine waits for it.
        """
        self._home.check()  # before the lock, which the engine may have held at the fork
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            shut, left_s = threading.Lock(), -1.0 if deadline is None else max(0.0, deadline - time.monotonic())
            shut.acquire()
            with self._lock:
                if ready():
                    return True
                if not left_s:
                    return False
                self._blocked.append(shut)
            if not shut.acquire(timeout=left_s):
                with self._lock:
                    self._blocked = [other for other in self._blocked if other is not shut]

    async def result(self) -> RequestOutput:
        """`wait` for a coroutine: its loop is woken once, at the end."""
        self._home.check()
        waiter = asyncio.get_running_loop().create_future()
        with self._lock:
            if self._output is None:
                self._at_end = [*(other for other in self._at_end if not other.done()), waiter]
            else:
                waiter.set_result(None)
        await waiter
        return self.wait()

    def take(self, waiter: Waiter | None = None) -> list[TokenEvent]:
        """The unread events, if any; if there are none, `waiter` is woken when there are."""
        self._home.check()
        with self._lock:
            events, self._events = self._events, []
            self._readers = [reader for reader in self._readers if not reader.done()]  # of an earlier call: another stream had news
            if waiter is not None and not events:
                self._readers.append(waiter)
        return events

    @property
    def over(self) -> bool:
        """Whether it has ended and nothing of it is unread."""
        with self._lock:
            return self._output is not None and not self._events

    def __iter__(self) -> Iterator[TokenEvent]:
        done = False
        while not done:
            self._block(lambda: self._events or self._output is not None)
            with self._lock:
                events, self._events = self._events, []
                done = self._output is not None
            yield from events

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        async for _, event in interleaved([self]):
            yield event


def cancelled_when_left(stream: RequestStream, owner: object) -> Iterator[TokenEvent]:
    """The stream's events; whoever leaves them before the end, or drops them unread, cancels the request.

    `owner` is kept for as long: an `LLM` that nobody else holds would end, and the request with it.
    """

    def events(owner: object) -> Iterator[TokenEvent | None]:
        try:
            yield None  # the first `next` is ours: a generator that has not begun is dropped without its `finally`
            yield from stream
        finally:
            stream.cancel()

    begun = events(owner)
    next(begun)
    return cast(Iterator[TokenEvent], begun)


async def interleaved(streams: Sequence[RequestStream]) -> AsyncIterator[tuple[int, TokenEvent]]:
    """(place of the stream, event) of all streams as they come, until all have ended."""
    loop, reading = asyncio.get_running_loop(), {i: stream for i, stream in enumerate(streams) if not stream.over}
    while reading:
        news = [(i, event) for i, stream in reading.items() for event in stream.take()]
        if not news:
            waiter = loop.create_future()
            news = [(i, event) for i, stream in reading.items() for event in stream.take(waiter)]
            if not news:  # the last event of one that is over somebody else has taken, or dropped
                reading = {i: stream for i, stream in reading.items() if not stream.over}
                if reading:
                    await waiter
        for i, event in news:
            if event.output is not None:
                del reading[i]
            yield i, event


def _set(waiters: list[Waiter]) -> None:
    for waiter in waiters:
        if not waiter.done():  # its coroutine may have been cancelled, or another stream of its request had news
            waiter.set_result(None)


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
