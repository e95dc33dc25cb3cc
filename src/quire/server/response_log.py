"""The events of a response that runs in the background: kept, so that a client whose connection broke reads on where it was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator


class EventLog:
    """Events in the order of their sequence numbers, which begin at 0. For the event loop alone; any number may follow it."""

    def __init__(self) -> None:
        self._events: list[bytes] = []
        self._news = asyncio.Event()
        self._ended = False

    @property
    def num_bytes(self) -> int:
        """What the events take."""
        return sum(map(len, self._events))

    def append(self, event: bytes) -> None:
        """The next event."""
        self._events.append(event)
        self._tell()

    def end(self) -> None:
        """There are no more."""
        self._ended = True
        self._tell()

    async def follow(self, after: int | None) -> AsyncGenerator[bytes, None]:
        """The events whose numbers are greater than `after`, all of them where it is None: those there are, and others as they come."""
        at = 0 if after is None else after + 1
        while True:
            news = self._news
            for event in self._events[at:]:
                at += 1
                yield event
            if news is not self._news:
                continue
            if self._ended:
                return
            await news.wait()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
