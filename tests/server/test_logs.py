"""The log: every event there is, each a line that parses, and in none of them what a client sent."""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from quire import LLM
from quire.errors import StepError
from quire.server import logs
from quire.server.errors import as_server_error
from tests.server.conftest import KEY, OTHER_KEY, Running, running
from tests.server.test_connections import HEAD, connected
from tests.server.test_life import LONG, eventually

MARK = "zyxmark"  # in every prompt, key, address, name and header below
HEADERS = {"authorization": f"Bearer {KEY}"}


class Told:
    """Stands for stderr: takes what many threads write, a line a call, and gives each line back once."""

    def __init__(self) -> None:
        self._written: queue.SimpleQueue[str] = queue.SimpleQueue()

    def write(self, text: str) -> None:
        self._written.put(text)

    def flush(self) -> None:
        pass

    def lines(self) -> list[str]:
        found = [self._written.get() for _ in range(self._written.qsize())]
        assert all(text.count("\n") == 1 and text.endswith("\n") for text in found), found
        return found


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    stderr = Told()
    monkeypatch.setattr(logs, "sys", SimpleNamespace(stderr=stderr))  # pytest puts its own stderr back between a fixture and its test
    return stderr


@pytest.fixture
def lines(told: Told) -> Any:
    """lines(): what was logged since the last call, as JSON."""
    with logs.on_stderr("json", requests=True):
        yield lambda: [json.loads(line) for line in told.lines()]


def wait_for(lines: Any, event: str, number: int) -> list[dict[str, Any]]:
    """So many of these, each told when its answer has gone; no other event comes."""
    found: list[dict[str, Any]] = []
    assert eventually(lambda: found.extend(lines()) or len(found) >= number), found
    assert {one["event"] for one in found} == {event} and len(found) == number, found
    return found


def test_a_request_is_told_with_what_it_cost(server: Running, lines: Any) -> None:
    body = {"prompt": f"{MARK} over the lazy dog", "max_tokens": 3, "ignore_eos": True, "n": 2, "temperature": 0}
    for more in ({}, {"stream": True}):
        server.post("/v1/completions", body | more)
    whole, stream = wait_for(lines, "request", 2)
    assert set(whole) == {
        *("time", "level", "event", "id", "method", "route", "status", "key", "ms"),
        *("prompt_tokens", "reused_tokens", "generated_tokens", "queued_ms", "finish"),
    }
    for one in (whole, stream):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", one["time"]) and one["level"] == "info"
        assert (one["method"], one["route"], one["status"], one["finish"]) == ("POST", "/v1/completions", 200, ["length"])
        assert one["id"].startswith("cmpl-") and one["generated_tokens"] == 6 and one["ms"] >= one["queued_ms"] >= 0 and len(one["key"]) == 8
    assert whole["prompt_tokens"] == stream["prompt_tokens"] > stream["reused_tokens"] > 0
    server.post("/v1/embeddings", {"input": ["a", "b"]})
    server.get("/version")
    embedded, version = wait_for(lines, "request", 2)
    assert embedded["id"].startswith("embd-") and embedded["generated_tokens"] == 0
    assert version["id"].startswith("req-") and "prompt_tokens" not in version and version["route"] == "/version"


def test_a_client_that_leaves_is_told_when_its_request_has_ended(server: Running, lines: Any) -> None:
    with httpx.Client(base_url=server.url, headers=HEADERS, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
            next(answer.iter_lines())
        (one,) = wait_for(lines, "request", 1)
        assert one["finish"] == ["cancelled"] and one["generated_tokens"] > 0
        made = client.post("/v1/responses", json={"input": "hi", "max_output_tokens": 4, "background": True}).json()
        (later,) = wait_for(lines, "request", 1)
        assert later["id"] == made["id"] and later["generated_tokens"] > 0


def test_what_is_refused_is_told_by_its_code(server: Running, lines: Any) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        answers = [
            client.get("/v1/models", headers={"authorization": f"Bearer {MARK}"}),
            client.get(f"/{MARK}", headers=HEADERS),
            client.request(MARK.upper(), "/v1/models", headers=HEADERS),
            client.post("/v1/completions", json={MARK: MARK, "prompt": MARK}, headers=HEADERS | {"x-request-id": MARK}),
            client.post("/v1/completions", content=b" " * (4 * 2**20 + 1), headers=HEADERS),
        ]
    told = wait_for(lines, "refused", 5)
    assert [one["id"] for one in told] == [answer.headers["x-request-id"] for answer in answers] and len({one["id"] for one in told}) == 5
    assert [(one["status"], one["code"]) for one in told] == [
        (401, "invalid_api_key"),
        (404, None),
        (405, None),
        (400, "unknown_field"),
        (413, "body_too_large"),
    ]
    assert MARK not in json.dumps(told).lower()


def test_who_leaves_before_the_body_is_there_has_sent_no_wrong_one(server: Running, lines: Any) -> None:
    with connected(server) as sock:
        sock.sendall(f"{HEAD}content-length: 9\r\n\r\n{{".encode())
    (told,) = wait_for(lines, "refused", 1)
    assert (told["route"], told["status"], told["code"]) == ("/v1/completions", 499, "client_left")


def test_what_is_waited_for_is_told_by_its_code_too(lines: Any) -> None:
    loads = threading.Event()

    def load() -> LLM:
        loads.wait(60)
        raise RuntimeError("there is no model")

    with running(load, wait=False) as one:
        assert one.get("/ready", None).json()["error"]["code"] == "loading"
        (told,) = wait_for(lines, "refused", 1)
        assert (told["route"], told["status"], told["code"]) == ("/ready", 503, "loading")
        loads.set()


def test_of_a_failure_the_place_is_told_and_only_of_the_engine_the_words(lines: Any) -> None:
    def fail(error: Exception) -> Exception:
        try:
            try:
                raise ValueError(f"{MARK} is no such thing, in /home/someone/x.py\nat all")
            except ValueError as cause:
                raise error from cause
        except type(error) as raised:
            return raised

    assert as_server_error(fail(KeyError(MARK))).status == 500
    logging.getLogger("asyncio").error(f"Task exception was never retrieved\nfuture: {MARK}", exc_info=fail(KeyError(MARK)))
    logging.getLogger("asyncio").info(MARK)
    door, loop = lines()
    assert (door["event"], door["logger"], door["message"], door["level"]) == ("log", "quire.server", "an answer failed", "error")
    assert door["error"] == loop["error"] == "KeyError from ValueError" and door["at"] == [f"{__name__}:{line_of('raise ValueError')} fail"]
    assert MARK not in json.dumps((door, loop)) and loop["message"] == "Task exception was never retrieved"
    logging.getLogger("quire").error("a step failed", exc_info=fail(StepError("x")))
    (engine,) = lines()
    assert engine["error"] == f"StepError from ValueError: {MARK} is no such thing, in <path> at all"


def line_of(text: str) -> int:
    return next(i for i, line in enumerate(Path(__file__).read_text().splitlines(), 1) if line.strip().startswith(text))


def test_text_says_the_same_to_people(server: Running, told: Told) -> None:
    with logs.on_stderr("text", requests=True):
        server.complete(prompt=MARK, max_tokens=1)
        said: list[str] = []
        assert eventually(lambda: said.extend(told.lines()) or said)
        assert said[0].startswith("POST /v1/completions 200, id cmpl-") and len(said) == 1 and MARK not in said[0]
        logs.warn("two\nlines")
        assert told.lines() == ["warning: two lines\n"]
        for path, key, start in (
            ("/openapi.json", KEY, "GET /openapi.json 200, "),
            ("/version", "no key", "GET - 401, "),  # there is such an address
            (f"/{MARK}", KEY, "GET no such address 404, "),
        ):
            server.get(path, key)
            found: list[str] = []
            assert eventually(lambda: found.extend(told.lines()) or found) and found[0].startswith(start), found  # noqa: B023
    with logs.on_stderr("text", requests=False):
        server.complete(prompt=MARK, max_tokens=1)
        server.get("/version")
        assert eventually(lambda: not server.serving.runs) and told.lines() == []


def test_a_dead_engine_is_told(model: str, monkeypatch: pytest.MonkeyPatch, lines: Any) -> None:
    with running(lambda: LLM(model, cache_bytes=8 * 2**20)) as one:

        def die() -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(one.llm._built.engine, "step", die)
        one.post("/v1/completions", LONG)
        one.post("/v1/completions", LONG)
        found: list[dict[str, Any]] = []
        assert eventually(lambda: found.extend(lines()) or {"engine_died", "request", "refused"} <= {line["event"] for line in found}), found
    by_event = {line["event"]: line for line in found}
    assert (by_event["engine_died"]["error"], by_event["engine_died"]["level"]) == ("RuntimeError: a bug", "critical")
    assert by_event["request"]["finish"] == ["error"] and by_event["request"]["code"] == by_event["refused"]["code"] == "engine_dead"


def test_quire_serve_tells_its_life_in_json(model: str) -> None:
    """Every line of it: with clients that are let in, that are not, that leave, that are cut at the end."""
    command = [sys.executable, "-m", "quire", "serve", model, "--port", "0", "--cache-bytes", "4MiB", "--grace", "0.5", "--log-format", "json"]
    with subprocess.Popen([*command, "--api-key", f"key-{MARK}"], stderr=subprocess.PIPE, text=True, env=os.environ | {"TERM": "xterm"}) as process:
        try:
            assert process.stderr is not None
            start, ready = json.loads(process.stderr.readline()), json.loads(process.stderr.readline())
            assert (start["event"], ready["event"]) == ("start", "ready") and start["api_keys"] and start["pid"] == process.pid
            assert ready["model"] == "tiny" and ready["type"] == "llama" and ready["context"] > 0 and ready["seconds"] > 0
            with httpx.Client(base_url=start["address"], headers={"authorization": f"Bearer key-{MARK}", "x-own": MARK}, timeout=60) as client:
                assert client.get("/ready").status_code == 200, "what is told to be ready is"
                client.post("/v1/completions", json={"prompt": MARK, "max_tokens": 2, "user": MARK, "stop": [MARK]})
                client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": MARK}], "max_tokens": 2, "stream": True})
                client.post("/v1/responses", json={"input": MARK, "max_output_tokens": 2})
                client.post("/v1/completions", json={"prompt": MARK, "structured_outputs": {"regex": f"({MARK}"}})
                client.post("/v1/completions", json={"prompt": MARK, MARK: 1})
                client.get(f"/v1/models/{MARK}?{MARK}")
                client.get("/metrics", headers={"authorization": f"Bearer wrong-{MARK}"})
                with client.stream("POST", "/v1/completions", json=LONG | {"prompt": MARK, "n": 8, "stream": True}) as answer:
                    said = answer.iter_lines()
                    next(said)
                    process.send_signal(signal.SIGTERM)
                    assert '"shutting_down"' in "".join(said)
            assert process.wait(30) == 0
            rest = process.stderr.read()
        finally:
            process.kill()
    told = [json.loads(line) for line in rest.splitlines()]
    assert MARK not in rest, rest
    assert [line["event"] for line in told if line["event"] not in ("request", "refused")] == ["draining", "drained"], rest
    ended = [line for line in told if line["event"] == "request" and "finish" in line]
    assert [line["finish"] == ["cancelled"] for line in ended] == [False, False, False, True], rest
    assert sorted(line["status"] for line in told if line["event"] == "refused") == [400, 400, 401, 404], rest
    (drained,) = [line for line in told if line["event"] == "drained"]
    assert (drained["ended"], drained["cut"]) == (0, 1) and drained["seconds"] > 0.4


def test_a_server_that_cannot_start_says_so_in_json(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from quire.cli.app import app

    wrong = CliRunner().invoke(app, ["serve", str(tmp_path / "nothing"), "--port", "0", "--log-format", "json"])
    start, failed = [json.loads(line) for line in wrong.stderr.splitlines()]
    assert wrong.exit_code == 2 and (start["event"], failed["event"], failed["level"]) == ("start", "failed", "error")
    assert "nothing" in failed["error"] and start["api_keys"] is False
    bad = CliRunner().invoke(app, ["serve", str(tmp_path), "--log-format", "xml"])
    assert bad.exit_code == 2 and "log_format='xml': must be one of text, json" in bad.stderr


def test_keys_are_told_apart_by_name_only(server: Running, lines: Any) -> None:
    server.get("/version", OTHER_KEY)
    server.get("/version")
    first, second = wait_for(lines, "request", 2)
    assert first["key"] != second["key"] and not any(key in str((first, second)) for key in (KEY, OTHER_KEY))
