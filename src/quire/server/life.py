"""From the first socket to the exit status: listen at once, load beside it, drain when told to end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

import quire
from quire.errors import ConfigError
from quire.server.app import create_app
from quire.server.limits import KEEP_ALIVE_S, MAX_CONNECTIONS, MAX_HEADER_BYTES, UNREAD_S
from quire.server.logs import tell
from quire.server.protocol import Protocol, allow_connections
from quire.server.serving import Serving, start_loading
from quire.server.settings import ServerSettings

if TYPE_CHECKING:
    from quire.engine.llm import LLM

LAST_WORDS_S = 2  # after the grace time: for errors to reach their clients, and for streams without an end to be cut
# Connections inherit it: one whose client has not taken what it was sent for so long, or is not there any more, is ended by the system.
PATIENCE = {
    getattr(socket, name): value
    for name, value in {"TCP_USER_TIMEOUT": 1000 * UNREAD_S, "TCP_KEEPIDLE": UNREAD_S, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}.items()
    if hasattr(socket, name)
}
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(settings: ServerSettings, load: Callable[[], LLM]) -> None:
    """Serve until a signal ends it. `load` runs on a thread of its own.

    Raises:
        ConfigError: the address cannot be listened on.
        Exception: what `load` raised, after the server has ended because of it.
    """
    sock = bind(settings.host, settings.port)
    serving = Serving(settings, load)
    server = Server(create_app(serving), serving, allow_connections())
    _tell_start(settings, address(sock))

    def loaded() -> None:
        if serving.llm is None:
            server.stop()
        else:
            _keep_for_good()
            _tell_ready(serving, serving.llm)

    loading = start_loading(serving, loaded)
    server.run([sock])
    gc.unfreeze()  # the interpreter's last collection lets go of native objects, which are told as leaked otherwise
    if serving.load_error is not None:
        raise serving.load_error
    if loading.is_alive():
        # A thread inside torch cannot be ended, and must not outlive the interpreter under it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    serving.close()


def _keep_for_good() -> None:
    """What was made so far stays as long as the process: a collection amid requests would look through all of it, and everybody would wait."""
    gc.collect()
    gc.freeze()


def _tell_start(settings: ServerSettings, url: str) -> None:
    facts = {"address": url, "api_keys": bool(settings.keys), "model": settings.model, "version": quire.__version__, "pid": os.getpid()}
    tell("start", f"Quire at {url}/v1, {'with' if settings.keys else 'without'} API keys", facts)
    if not settings.keys and not settings.on_loopback:
        tell("open_to_all", "everybody who reaches this address may use it: set --api-key or QUIRE_API_KEY", {}, level=logging.WARNING)


def _tell_ready(serving: Serving, llm: LLM) -> None:
    model, info = serving.settings.model, llm.info
    facts = {"model": model, "type": info.model_type, "dtype": info.dtype, "backend": info.backend, "context": info.context_len}
    sentence = f"ready: {model}, {info.model_type}, {info.dtype}, {info.backend}, context {info.context_len:,}"
    tell("ready", sentence, facts | {"seconds": round(time.monotonic() - serving.started_s, 1)})


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the address is not there or is taken.
    """
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            for option, value in PATIENCE.items():
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.bind(where)
            sock.listen(2048)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise ConfigError(f"host={host!r}, port={port}: must be an address that can be listened on ({error.strerror})") from None
    return sock


def address(sock: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """uvicorn without its clock: it sleeps until there is a request or a signal, and drains before it ends."""

    def __init__(self, app: FastAPI, serving: Serving, max_connections: int = MAX_CONNECTIONS) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=functools.partial(Protocol, max_connections=max_connections, refused=serving.metrics.refused),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=LAST_WORDS_S,
            )
        )
        self._serving = serving
        self._end = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def stop(self) -> None:
        """Drain and end. Callable from any thread, also before the server runs."""
        self.should_exit = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended already
                self._loop.call_soon_threadsafe(self._end.set)

    async def main_loop(self) -> None:
        """Wait for the end without looking at the clock."""
        self._loop = asyncio.get_running_loop()
        if not self.should_exit:
            await self._end.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """No new connections; running requests have their grace; then what uvicorn does."""
        for server in self.servers:
            server.close()
        await self._serving.drain(self._serving.settings.grace_s)
        await super().shutdown(sockets)
        await self._serving.settle(LAST_WORDS_S)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Both signals mean the same, and neither is raised again afterwards: a drained server has ended well. A second one ends it at once."""
        loop, ours = asyncio.get_running_loop(), threading.current_thread() is threading.main_thread()
        for one in SIGNALS if ours else ():
            loop.add_signal_handler(one, self._signalled)
        try:
            yield
        finally:
            for one in SIGNALS if ours else ():
                loop.remove_signal_handler(one)

    def _signalled(self) -> None:
        if self.should_exit:
            os._exit(1)
        self.stop()


logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
