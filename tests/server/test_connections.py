"""Clients who are slow, silent or many, on raw sockets."""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import socket
import time
from collections.abc import Iterator

import pytest

from quire.server import life, protocol
from quire.server.limits import MAX_CONNECTIONS, OTHER_DESCRIPTORS
from tests.server.bad_requests import COMPLETIONS, GOOD
from tests.server.conftest import KEY, Running, running
from tests.server.test_life import LONG, eventually

HEAD = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\n"


@contextlib.contextmanager
def connected(server: Running) -> Iterator[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        yield sock


def rest(sock: socket.socket) -> bytes:
    """Everything until the server ends the connection."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(2**16):
            found += part
    return found


def alive(sock: socket.socket) -> bool:
    """Ask whether the server is, and read all of the answer."""
    sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    found = b""
    while not found.endswith(b'{"status":"alive"}') and (part := sock.recv(2**16)):
        found += part
    return b" 200 " in found


def drip(sock: socket.socket, data: bytes, every_s: float) -> bytes:
    """Send a byte now and then until the server has had enough, or all is sent; what it says to that."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for i in range(len(data)):
            sock.sendall(data[i : i + 1])
            time.sleep(every_s)
    return rest(sock)


def whole(body: dict[str, object]) -> bytes:
    content = json.dumps(body).encode()
    return f"{HEAD}content-length: {len(content)}\r\n\r\n".encode() + content


@pytest.mark.parametrize(
    "sent", [b"", HEAD.encode() * 9, HEAD.encode() + b"content-length: 500\r\n\r\n" + b" " * 400], ids=["nothing", "headers", "a body"]
)
def test_a_request_must_come_in_time(server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, sent: bytes) -> None:
    monkeypatch.setattr(protocol, "REQUEST_S", 0.5)
    caplog.set_level(logging.INFO, "quire.access")
    before, left = late(server), refusals(server, 499)
    with connected(server) as sock:
        at = sent.find(b"\r\n\r\n") + 4 if b"\r\n\r\n" in sent else 0
        sock.sendall(sent[:at])
        answer = drip(sock, sent[at:], 0.02)
    assert b" 408 " in answer.splitlines()[0] and json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
    assert late(server) == before + 1, "what is answered below the application counts as well"
    told = [vars(line)["facts"]["status"] for line in caplog.records if vars(line).get("event") == "refused"]
    assert told == [408] and refusals(server, 499) == left, "once"
    assert server.complete(**GOOD)


def late(server: Running) -> float:
    return refusals(server, 408)


def refusals(server: Running, status: int) -> float:
    named = f'quire_request_errors_total{{status="{status}"}}'
    (line,) = [line for line in server.get("/metrics").text.splitlines() if line.startswith(named)]
    return float(line.split()[-1])


def test_the_second_request_of_a_connection_must_too(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "REQUEST_S", 1.0)
    with connected(server) as sock:
        for _ in range(3):  # together they take longer than one may
            assert alive(sock)
            time.sleep(0.4)
        assert b" 408 " in drip(sock, HEAD.encode(), 0.02).splitlines()[0]


def test_answers_have_no_deadline(server: Running) -> None:
    with running(lambda: server.llm) as quiet, connected(quiet) as sock:
        assert eventually(lambda: len(quiet.server.server_state.connections) == 1)
        (connection,) = quiet.server.server_state.connections
        assert isinstance(connection, protocol.Protocol) and connection._deadline is not None
        sock.sendall(whole(LONG | {"stream": True}))
        assert b" 200 " in sock.recv(2**16)
        assert connection._deadline is None


def test_one_too_many_sends_the_longest_waiting_away(server: Running) -> None:
    with running(lambda: server.llm, max_connections=4) as small, contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connected(small)) for _ in range(4)]
        for sock in socks[:2]:  # these two have had an answer, and wait since then
            assert alive(sock)
        socks += [stack.enter_context(connected(small)) for _ in range(3)]
        for sock in socks[4:]:
            assert alive(sock)
        assert [rest(socks[i]) for i in (2, 3, 0)] == [b"", b"", b""]
        assert alive(socks[1]), "who waited less may stay"
        assert eventually(lambda: len(small.server.server_state.connections) == 4)


def test_requests_are_not_sent_away(server: Running) -> None:
    with running(lambda: server.llm, max_connections=2) as small, contextlib.ExitStack() as stack:
        for _ in range(2):
            sock = stack.enter_context(connected(small))
            sock.sendall(whole(LONG | {"stream": True}))
            assert b" 200 " in sock.recv(2**16)
        answer = rest(stack.enter_context(connected(small)))
        assert b" 503 " in answer.splitlines()[0] and b"retry-after: 1" in answer and b'"busy"' in answer
        assert len(small.serving.runs) == 2
        stack.close()
        assert eventually(lambda: not small.serving.runs and not small.server.server_state.connections)
        assert small.get("/health").status_code == 200


@pytest.mark.skipif(not life.PATIENCE, reason="this system has no TCP_USER_TIMEOUT")
def test_a_reader_who_takes_nothing_is_sent_away(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    assert life.PATIENCE[socket.TCP_USER_TIMEOUT] == 60_000
    monkeypatch.setitem(life.PATIENCE, socket.TCP_USER_TIMEOUT, 700)
    endless = LONG | {"stream": True, "n": 20, "logprobs": 20, "prompt": ["x", "y", "z"]}
    with running(lambda: server.llm) as patient, connected(patient) as sock:
        sock.sendall(whole(endless))
        assert b" 200 " in sock.recv(256)
        assert eventually(lambda: bool(patient.serving.runs))
        assert eventually(lambda: not patient.server.server_state.connections and not patient.serving.runs, 60), "cut, and its request with it"
        assert b"[DONE]" not in rest(sock)
    assert server.llm.stats()["num_held_pages"] == 0


def test_the_system_is_asked_for_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    for limits, wanted in (
        ((1024, 4096), MAX_CONNECTIONS),
        ((1024, 1024), 1024 - OTHER_DESCRIPTORS),
        ((64, 64), 1),
        ((10**6, 10**6), MAX_CONNECTIONS),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), MAX_CONNECTIONS),
        ((1024, resource.RLIM_INFINITY), MAX_CONNECTIONS),
    ):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=limits: limits)
        assert protocol.allow_connections() == wanted
    assert asked == [
        (MAX_CONNECTIONS + OTHER_DESCRIPTORS, 4096),
        (1024, 1024),
        (64, 64),
        (MAX_CONNECTIONS + OTHER_DESCRIPTORS, resource.RLIM_INFINITY),
    ]
