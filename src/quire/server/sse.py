"""Answers: one JSON object at the end of a run, or server-sent events while it lasts. Either way a client that leaves ends the run."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager
from typing import Any

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from quire.outputs import RequestOutput
from quire.server.errors import CLIENT_LEFT, as_server_error
from quire.server.runs import ClientLeft, Run, while_connected

DONE = b"data: [DONE]\n\n"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # proxies that collect a stream before passing it on defeat it
_ENCODE = json.JSONEncoder(separators=(",", ":")).encode


def new_id(kind: str) -> str:
    """A name for an answer, such as cmpl-..."""
    return f"{kind}-{uuid.uuid4().hex}"


def event(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + _ENCODE(data).encode() + b"\n\n"


class Chunks:
    """Events of one stream that differ in their choice alone: what is the same in all is written out once. A stream has one a token."""

    def __init__(self, head: dict[str, Any], more: dict[str, Any]) -> None:
        self._before = "data: " + _ENCODE(head)[:-1] + ',"choices":['
        self._after = "]" + "".join(f",{_ENCODE(name)}:{_ENCODE(value)}" for name, value in more.items()) + "}\n\n"

    def of(self, choice: dict[str, Any]) -> bytes:
        """The event with this choice."""
        return (self._before + _ENCODE(choice) + self._after).encode()


def json_response(data: Any, request_id: str | None = None) -> Response:
    """A JSON answer."""
    headers = {} if request_id is None else {"x-request-id": request_id}
    return Response(_ENCODE(data).encode(), headers=headers, media_type="application/json")


async def answer_at_end(request: Request, run: Run, made: Callable[[list[RequestOutput]], Any]) -> Response:
    """The answer that `made` makes of the run's outputs."""
    with run:
        try:
            outputs = await while_connected(request.receive, run.outputs())
        except ClientLeft:
            return Response(status_code=CLIENT_LEFT)
    return json_response(made(outputs), run.name)


class EventStream(Response):
    """A run's events as they come, each a chunk of bytes from `chunks`; an error is the last event, in the shape of any other.

    Without a `run` they are of one that goes on whether or not this client listens.
    """

    media_type = "text/event-stream"

    def __init__(self, run: Run | None, chunks: AsyncGenerator[bytes, None]) -> None:
        self.status_code, self.background = 200, None
        self.init_headers(HEADERS if run is None else {**HEADERS, "x-request-id": run.name})
        self._run: AbstractContextManager[object] = contextlib.nullcontext() if run is None else run
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._run, contextlib.suppress(ClientLeft):
            await while_connected(receive, self._speak(send))

    async def _speak(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

        async def say(body: bytes) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": True})

        try:
            async with contextlib.aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    await say(chunk)
            await say(DONE)
        except Exception as error:  # the status has been sent: the error follows as an event
            await say(event(as_server_error(error).body()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})
