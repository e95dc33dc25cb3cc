"""Many clients at once in one process: requests are sent when their time has come, whatever became of those before."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from bench.http.answers import Heard, Piece, heard
from bench.http.requests import Ask


@dataclass(frozen=True)
class Load:
    """What became of all requests, in order, and the CPU seconds that this process took to send and hear them."""

    answers: list[Heard]
    client_cpu_s: float


def send(url: str, asks: Sequence[Ask], times: Sequence[float], fields: dict[str, Any], timeout_s: float) -> Load:
    """POST each ask to the completions of the server at `url` at its time (seconds from now), on a connection of its own.

    `fields` are those of the body beside prompt and length. An answer that has not ended `timeout_s` after the last was sent is a failure.
    """
    return asyncio.run(_send(url, [_request(url, ask, fields) for ask in asks], asks, times, timeout_s))


def send_in_turn(url: str, asks: Sequence[Ask], fields: dict[str, Any], timeout_s: float) -> Load:
    """The same, each when the one before has been answered."""
    loads = [send(url, [ask], [0.0], fields, timeout_s) for ask in asks]
    return Load([answer for load in loads for answer in load.answers], sum(load.client_cpu_s for load in loads))


async def _send(url: str, requests: Sequence[bytes], asks: Sequence[Ask], times: Sequence[float], timeout_s: float) -> Load:
    loop, start, cpu = asyncio.get_running_loop(), time.perf_counter(), time.process_time()
    where = urlsplit(url)
    clients: list[_Client] = []

    async def one(client: _Client, at: float) -> None:
        client.sent_s = start + at  # when it should be: a client that is late because all are busy has waited, too
        await asyncio.sleep(client.sent_s - time.perf_counter())
        try:
            transport, _ = await loop.create_connection(lambda: client, where.hostname, where.port)
        except OSError:
            return
        try:
            await client.ended.wait()
        finally:
            transport.abort()

    clients = [_Client(request) for request in requests]
    tasks = [asyncio.ensure_future(one(client, at)) for client, at in zip(clients, times, strict=True)]
    _, late = await asyncio.wait(tasks, timeout=max(times) + timeout_s)
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    cpu_s = time.process_time() - cpu
    return Load([heard(client.sent_s, client.pieces, ask.new) for client, ask in zip(clients, asks, strict=True)], cpu_s)


class _Client(asyncio.Protocol):
    """Sends its request when it is connected, and keeps what it hears until the other side ends it."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.sent_s = 0.0
        self.pieces: list[Piece] = []
        self.ended = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()


def _request(url: str, ask: Ask, fields: dict[str, Any]) -> bytes:
    body = json.dumps({"prompt": ask.prompt, "max_tokens": ask.new, **fields}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {urlsplit(url).netloc}\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
