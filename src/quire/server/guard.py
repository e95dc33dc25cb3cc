"""Before any route: who asks, how much they send, HEAD as GET without its body, and a name in every answer that the log has too.

Everything is guarded but what is listed here, also addresses that do not exist: who has no key learns nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.server.errors import ServerError, as_server_error
from quire.server.limits import MAX_BODY_BYTES, MAX_HEADER_BYTES
from quire.server.logs import access_log, tell
from quire.server.runs import Run
from quire.server.serving import Serving, shutting_down
from quire.server.sse import new_id

OPEN_PATHS = frozenset(("/health", "/ready", "/"))
OPEN_FOLDER = "/page/static/"
OPENAPI = "/openapi.json"
METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH")


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, serving: Serving) -> None:
        self._app, self._serving = app, serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began_s, status = time.perf_counter(), 0
        state = scope.setdefault("state", {})
        head = scope["method"] == "HEAD"
        asked = {**scope, "method": "GET"} if head else scope  # routes know GET alone

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                named = any(header[0].lower() == b"x-request-id" for header in message["headers"])
                name = () if named else ((b"x-request-id", _name(state).encode()),)
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff"), *name]
                if status == 405:
                    others = [header for header in message["headers"] if header[0].lower() != b"allow"]
                    message["headers"] = [*others, (b"allow", _allowed(asked))]
                if status >= 400 and not state.get("refused"):
                    self._serving.metrics.refused(status)
                await send(message)
                if head:  # over here, so that a stream without an end is as well
                    await send({"type": "http.response.body"})
            elif not head:
                await send(message)

        async def refuse(error: Exception) -> None:
            refusal = as_server_error(error)
            state["code"] = refusal.code
            await refusal.response()(scope, receive, sending)

        try:
            try:
                self._admit(scope, state)
                await self._app(asked, _bounded(receive), sending)
            except asyncio.CancelledError:  # the server has ended, while this was still coming
                if status or not self._serving.closing.is_set():
                    raise
                await refuse(shutting_down())
            except Exception as error:
                if status:  # half an answer is on its way: the connection is cut
                    raise
                await refuse(error)
        finally:
            self._tell(asked, scope["method"], status, time.perf_counter() - began_s)

    def _admit(self, scope: Scope, state: dict[str, Any]) -> None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            raise ServerError(431, f"headers: must have at most {MAX_HEADER_BYTES} bytes in all", headers={"connection": "close"})
        caller = self._serving.settings.keys.caller(headers.get(b"authorization"))
        path = scope["path"]
        if caller is None and not (path in OPEN_PATHS or path.startswith(OPEN_FOLDER)):
            message = "there must be a valid API key in the header 'authorization: Bearer KEY'"
            raise ServerError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer", "connection": "close"})
        state["namespace"], state["key_id"] = caller or ("", "")
        if headers.get(b"content-encoding", b"identity").lower() not in (b"identity", b""):  # it would be told to be no JSON
            raise ServerError(415, "content-encoding: must be left out: a body is read as it comes", code="unsupported_encoding")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > MAX_BODY_BYTES:
            too_large = _too_large()
            raise ServerError(413, too_large.detail, code="body_too_large", headers=too_large.headers)

    def _tell(self, scope: Scope, method: str, status: int, seconds: float) -> None:
        """Which route and what became of it: never what was asked, not even the address, which is the client's own text."""
        state = scope["state"]
        if state.get("refused") or not access_log.isEnabledFor(logging.INFO):  # by the connection, which has told of it
            return
        facts = {
            "method": method if method in METHODS else "other",
            "route": OPENAPI if scope["path"] == OPENAPI else getattr(scope.get("route"), "path", None),  # FastAPI names all routes but its own
            "status": status,
            "key": state.get("key_id", ""),
            "ms": round(seconds * 1000, 1),
        }
        run: Run | None = state.get("run")
        named = {"id": _name(state)} | facts
        if run is None:
            code = {"code": state.get("code")} if status >= 400 else {}
            _say("refused" if code else "request", named | code)
        elif run.over.is_set():
            _say("request", named | run.facts())
        else:  # it was cancelled, or goes on in the background

            async def later() -> None:
                await run.over.wait()
                _say("request", named | run.facts())

            self._serving.in_background(later())


def _name(state: dict[str, Any]) -> str:
    """What a request is called: as the engine knows it, else by a name of its own."""
    run: Run | None = state.get("run")
    name: str = run.name if run is not None else state.setdefault("name", new_id("req"))
    return name


def _allowed(scope: Scope) -> bytes:
    """All methods that this address takes: the router says those of one route, and a route knows nothing of HEAD."""

    def taken(method: str) -> bool:
        asked = {**scope, "method": "GET" if method == "HEAD" else method}
        return any(route.matches(asked)[0] is Match.FULL for route in scope["router"].routes)

    return ", ".join(filter(taken, METHODS)).encode()


def _say(event: str, facts: dict[str, Any]) -> None:
    more = ", ".join(f"{name} {value}" for name, value in facts.items() if name not in ("method", "route", "status"))
    # One that was refused at the door has no route either, whether or not there is one.
    route = facts["route"] or ("no such address" if facts["status"] == 404 else "-")
    tell(event, f"{facts['method']} {route} {facts['status']}, {more}", facts, to=access_log)


def _bounded(receive: Receive) -> Receive:
    """A body that does not say how long it is, or lies, is counted as it comes."""
    num_bytes = 0

    async def receiving() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > MAX_BODY_BYTES:
            raise _too_large()
        return message

    return receiving


def _too_large() -> HTTPException:
    # What more there is of it is not read: the connection ends with the answer.
    return HTTPException(413, f"the body must have at most {MAX_BODY_BYTES} bytes", headers={"connection": "close"})
