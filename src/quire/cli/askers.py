"""Whom a batch asks: the server's application inside this process, or a server over HTTP. A row means the same to both."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from quire.cli.door import demo_model, load, needs_server_extra
from quire.cli.remote import Remote
from quire.config import EngineConfig


class Answer(NamedTuple):
    """What came back; `body` is None where it is not JSON."""

    status: int
    request_id: str | None
    retry_after_s: float | None
    body: Any


class Asker(Protocol):
    """Asked by many tasks at once."""

    async def ask(self, path: str, body: bytes) -> Answer:
        """POST a body of JSON.

        Raises:
            OSError: nobody answers.
        """


class Inside:
    """The server's application, called without a socket between."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def ask(self, path: str, body: bytes) -> Answer:
        """As `Asker`."""
        asked, ended = [{"type": "http.request", "body": body, "more_body": False}], asyncio.Event()
        status, headers, parts = 0, dict[str, str](), list[bytes]()

        async def receive() -> dict[str, Any]:
            if asked:
                return asked.pop()
            await ended.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                parts.append(message.get("body", b""))

        given = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        about = {"method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": given}
        where = {"scheme": "http", "server": ("quire", 80), "client": ("127.0.0.1", 0), "http_version": "1.1", "asgi": {"version": "3.0"}}
        try:
            await self._app({"type": "http", **about, **where}, receive, send)
        finally:
            ended.set()
        return _answer(status, headers, b"".join(parts))


class Outside:
    """A server. Each of `in_flight` threads keeps a connection."""

    def __init__(self, remote: Remote, in_flight: int) -> None:
        self._remote = remote
        self._threads = ThreadPoolExecutor(in_flight, thread_name_prefix="quire-batch")

    async def ask(self, path: str, body: bytes) -> Answer:
        """As `Asker`."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._ask, path, body)

    def close(self) -> None:
        """Cut the connections; what is asked in them ends."""
        self._remote.close()
        self._threads.shutdown(cancel_futures=True)

    def _ask(self, path: str, body: bytes) -> Answer:
        return _answer(*self._remote.post(path, body))


@contextlib.contextmanager
def inside(model: str | None, name: str | None, config: EngineConfig) -> Iterator[Inside]:
    """A model loaded here, behind the server's own application."""
    with needs_server_extra("a batch"):
        from quire.server.app import create_app
        from quire.server.serving import Serving
        from quire.server.settings import ServerSettings, public_name
    source = model if model is not None else str(demo_model())
    serving = Serving(ServerSettings(model=public_name(source) if name is None else name), lambda: load(source, config))
    serving.load()
    if serving.load_error is not None:
        raise serving.load_error
    try:
        yield Inside(create_app(serving))
    finally:
        serving.close()


@contextlib.contextmanager
def outside(url: str, api_key: str | None, in_flight: int) -> Iterator[Outside]:
    """A server that answers, and takes the key.

    Raises:
        ConfigError, RequestFailedError: it is not to be reached, or does not let us in.
    """
    remote = Remote(url, api_key)
    remote.check()
    asker = Outside(remote, in_flight)
    try:
        yield asker
    finally:
        asker.close()


def _answer(status: int, headers: dict[str, str], body: bytes) -> Answer:
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        told = None
    wait = headers.get("retry-after", "")
    return Answer(status, headers.get("x-request-id"), float(wait) if wait.isdigit() else None, told)
