"""Before any route: who asks, how much they send, and a line in the log afterwards.

Everything is guarded but what is listed here, also addresses that do not exist: who has no key learns nothing.
"""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.server.errors import ServerError, as_server_error
from quire.server.limits import MAX_BODY_BYTES, MAX_HEADER_BYTES
from quire.server.serving import Serving

OPEN_PATHS = frozenset(("/health", "/ready", "/"))
OPEN_FOLDER = "/page/static/"
log = logging.getLogger("quire.access")


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, serving: Serving) -> None:
        self._app, self._serving = app, serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began_s, status = time.perf_counter(), 0
        state = scope.setdefault("state", {})

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
                if status >= 400:
                    self._serving.metrics.refused(status)
            await send(message)

        try:
            try:
                self._admit(scope, state)
                await self._app(scope, _bounded(receive), sending)
            except Exception as error:
                if status:  # half an answer is on its way: the connection is cut
                    raise
                await as_server_error(error).response()(scope, receive, sending)
        finally:
            _log(scope, status, state.get("key_id", ""), time.perf_counter() - began_s)

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
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > MAX_BODY_BYTES:
            too_large = _too_large()
            raise ServerError(413, too_large.detail, code="body_too_large", headers=too_large.headers)


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


def _log(scope: Scope, status: int, key_id: str, seconds: float) -> None:
    """Which route and what became of it: never what was asked, not even the address, which is the client's own text."""
    if log.isEnabledFor(logging.INFO):
        route = getattr(scope.get("route"), "path", None)
        log.info(json.dumps({"method": scope["method"], "route": route, "status": status, "key": key_id, "ms": round(seconds * 1000, 1)}))
