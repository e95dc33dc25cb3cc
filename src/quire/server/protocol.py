"""HTTP/1.1 on one connection: uvicorn's, with the one shape of errors also for what is not HTTP, and with bounds.

A request has to be there within REQUEST_S, from its first byte to its last. There are at most so many connections: one more and the one that has
been without a request for longest goes, so that clients who open connections and say nothing cannot keep others out. What a client does not read is
the system's to bound: see `life.bind`.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from quire.server.errors import ServerError
from quire.server.limits import MAX_CONNECTIONS, OTHER_DESCRIPTORS, REQUEST_S
from quire.server.logs import access_log, tell
from quire.server.sse import new_id

COMING = (h11.IDLE, h11.SEND_BODY)


class Protocol(H11Protocol):
    """One connection. `refused` is told the status of what is answered here and not by the application."""

    def __init__(self, *args: Any, max_connections: int, refused: Callable[[int], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._max_connections, self._refused = max_connections, refused
        self.access_log = False  # it would write addresses as they were sent; guard.py has ours
        self._deadline: asyncio.TimerHandle | None = None
        self._waiting_since_s = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there: its first request is waited for."""
        super().connection_made(transport)
        self._waiting_since_s = self.loop.time()
        self._deadline = self.loop.call_later(REQUEST_S, self._late)
        if len(self.connections) > self._max_connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, or was sent away."""
        self._met()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A part of a request."""
        if self._deadline is None:
            self._deadline = self.loop.call_later(REQUEST_S, self._late)
        super().data_received(data)
        if self.conn.their_state not in COMING:
            self._met()

    def on_response_complete(self) -> None:
        """The next request is waited for."""
        self._waiting_since_s = self.loop.time()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what cannot be parsed, or has headers without an end."""
        self._refuse(ServerError(400, msg, code="invalid_http"))

    def _met(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        self._refuse(ServerError(408, f"the request must come within {REQUEST_S:g} s", code="request_timeout"))

    def _make_room(self) -> None:
        others = [one for one in self.connections if isinstance(one, Protocol) and one is not self]
        waiting = [one for one in others if one.cycle is None or one.cycle.response_complete]
        if waiting:
            longest = min(waiting, key=lambda one: one._waiting_since_s)
            longest.transport.abort()
            self.connections.discard(longest)  # at once: the next client may be in this very turn of the loop
        else:
            self._refuse(ServerError(503, f"there are {self._max_connections} connections with requests, the most there may be", code="busy"))

    def _refuse(self, error: ServerError) -> None:
        name = new_id("req")
        facts = {"id": name, "status": error.status, "code": error.code}
        tell("refused", f"a connection is refused: {error.status}, {error.code}, id {name}", facts, to=access_log)
        self._refused(error.status)
        if self.cycle is not None and not self.cycle.response_started:  # the application waits for the rest of a body: to it the client has left
            self.cycle.scope["state"]["refused"] = True
        body = error.response().body
        told = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close", "x-request-id": name, **error.headers}
        answer = h11.Response(status_code=error.status, headers=list(told.items()), reason=b"")
        with contextlib.suppress(h11.LocalProtocolError):  # an answer may be on its way already
            for part in (answer, h11.Data(data=bytes(body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(part) or b"")
        self.transport.close()


def allow_connections() -> int:
    """How many there may be; the process is let have as many descriptors as that takes, if the system does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + OTHER_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return max(1, soft - OTHER_DESCRIPTORS)
    return MAX_CONNECTIONS
