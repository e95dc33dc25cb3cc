"""Loading, clients that leave, an engine that dies, and the end."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from quire import LLM
from quire.errors import ConfigError, ModelNotFoundError
from quire.server.life import bind
from tests.server.conftest import KEY, Running, running
from tests.server.test_errors import checked

LONG = {"prompt": "the lazy dog", "max_tokens": 1500, "temperature": 0, "ignore_eos": True}
NUM_CLOSED, AT_ONCE = 500, 40


def eventually(true: Any, timeout_s: float = 20.0) -> bool:
    """Whether it comes to be true."""
    end = time.monotonic() + timeout_s
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(true())


def held(server: Running) -> int:
    return int(server.llm.stats()["num_held_pages"])


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_pages(server: Running, path: str, stream: bool) -> None:
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1500, "ignore_eos": True}
    body, headers = (LONG if path == "/v1/completions" else chat) | {"stream": stream}, {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=httpx.Timeout(60, read=60 if stream else 0.1)) as client:
        if stream:
            with client.stream("POST", path, json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(path, json=body)
    assert eventually(lambda: held(server) == 0 and not server.serving.runs)
    assert server.llm.stats()["num_running"] == 0


def test_five_hundred_streams_closed_at_random_moments(server: Running) -> None:
    """Streams and whole answers, one prompt and several: pages, threads and descriptors are what they were."""
    dice, process = random.Random(7), psutil.Process()
    good = {"prompt": "the lazy dog", "max_tokens": 6, "temperature": 0}
    wanted = server.complete(**good)["choices"]

    async def one(client: httpx.AsyncClient, i: int, patience_s: float) -> None:
        body = LONG | {"prompt": [[5 + i % 300] * (1 + i % 40)] * (1 + i % 3), "n": 1 + i % 2, "stream": i % 4 > 0}
        headers = {"authorization": f"Bearer {KEY}", "connection": "close"}
        try:
            async with asyncio.timeout(patience_s):
                async with client.stream("POST", server.url + "/v1/completions", json=body, headers=headers) as stream:
                    async for _ in stream.aiter_raw():
                        pass
        except (TimeoutError, httpx.TransportError):
            pass

    async def storm(num: int) -> None:
        gate = asyncio.Semaphore(AT_ONCE)
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:

            async def gated(i: int) -> None:
                async with gate:
                    await one(client, i, dice.choice((0.0, 0.01, 0.1, 0.3)) * dice.random())

            await asyncio.gather(*(gated(i) for i in range(num)))

    asyncio.run(storm(20))  # what is made once, such as pools of threads, is there now
    eventually(lambda: not server.serving.runs)
    gc.collect()
    before = threading.active_count(), process.num_fds()
    asyncio.run(storm(NUM_CLOSED))
    assert eventually(lambda: not server.serving.runs and held(server) == 0)
    server.llm.check_integrity()
    gc.collect()
    assert eventually(lambda: process.num_fds() <= before[1] + 1), "descriptors are given back"
    assert threading.active_count() <= before[0] + 2
    assert eventually(lambda: not server.serving._tasks)
    assert server.complete(**good)["choices"] == wanted


def test_loading_and_failing_to(server: Running) -> None:
    go = threading.Event()

    def load() -> LLM:
        go.wait(30)
        raise ModelNotFoundError("there is no folder /home/someone/model")

    with running(load, wait=False) as one:
        assert one.get("/health", key=None).status_code == 200, "alive, if not ready"
        ready = one.get("/ready", key=None)
        assert ready.status_code == 503 and "being loaded, for " in checked(ready)["message"] and "retry-after" in ready.headers
        for answer in (one.get("/v1/models"), one.post("/v1/completions", LONG), one.post("/tokenize", {"prompt": "x"})):
            assert answer.status_code == 503 and checked(answer)["code"] == "loading"
        assert one.get("/version").json()["version"] and one.get("/metrics").status_code == 200
        go.set()
        assert eventually(lambda: one.serving.failure is not None)
        for path in ("/health", "/ready"):
            error = checked(one.get(path, key=None))
            assert "ModelNotFoundError" in error["message"] and "/home" not in error["message"]


def test_a_dead_engine_is_told_at_once(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(lambda: LLM(model, cache_bytes=8 * 2**20)) as one:
        body = LONG | {"stream": True}
        with httpx.stream("POST", one.url + "/v1/completions", json=body, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)

            def die() -> None:
                raise RuntimeError("a bug in /home/someone/engine.py")

            monkeypatch.setattr(one.llm._built.engine, "step", die)
            last = [line for line in lines if line][-1]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "engine_dead" and "RuntimeError" in error["message"]
        for answer in (one.post("/v1/completions", LONG), one.get("/health", key=None), one.get("/ready", key=None)):
            assert answer.status_code == 503 and "RuntimeError" in checked(answer)["message"] and "/home" not in answer.text
        assert one.get("/metrics").status_code == 200


def test_the_end_lets_requests_end_and_cuts_those_that_do_not(server: Running) -> None:
    with running(lambda: server.llm, grace_s=1.0) as one:
        answers: dict[str, httpx.Response] = {}

        def ask(name: str, **more: Any) -> threading.Thread:
            thread = threading.Thread(target=lambda: answers.update({name: one.post("/v1/completions", LONG | more)}))
            thread.start()
            return thread

        threads = [ask("short", max_tokens=4), ask("endless", n=20), ask("stream", n=20, stream=True)]
        assert eventually(lambda: len(one.serving.runs) >= 2)
        with httpx.Client(base_url=one.url, headers={"authorization": f"Bearer {KEY}"}) as client:
            assert client.get("/ready").status_code == 200
            one.server.stop()
            assert eventually(one.serving.closing.is_set)
        for thread in threads:
            thread.join(30)
        one.thread.join(30)
        assert not one.thread.is_alive()
    assert answers["short"].status_code == 200
    assert answers["endless"].status_code == 503 and checked(answers["endless"])["code"] == "shutting_down"
    assert '"shutting_down"' in answers["stream"].text.strip().split("\n\n")[-1]
    with pytest.raises(httpx.ConnectError):
        httpx.get(one.url + "/health")


def test_a_request_that_is_still_coming_at_the_end_is_told_so(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.server.life.LAST_WORDS_S", 0)
    head = f"authorization: Bearer {KEY}\r\ncontent-type: application/json\r\ncontent-length: 50"
    with running(lambda: server.llm) as one:
        with socket.create_connection(("127.0.0.1", int(one.url.rsplit(":", 1)[1])), timeout=30) as client:
            client.sendall(f"POST /v1/completions HTTP/1.1\r\nhost: x\r\n{head}\r\n\r\n{{".encode())
            assert eventually(lambda: one.server.server_state.tasks)
            one.server.stop()
            told = b"".join(iter(lambda: client.recv(65536), b"")).decode()
        one.thread.join(30)
    status, _, rest = told.partition("\r\n")
    assert status.startswith("HTTP/1.1 503") and "x-request-id: req-" in rest
    assert json.loads(rest.split("\r\n\r\n")[1])["error"]["code"] == "shutting_down"


# `quire`, which says how many objects the collector is told not to look at any more.
TOLD = "print('kept', gc.get_freeze_count(), file=sys.stderr, flush=True)"
QUIRE = (
    "import gc, sys; from quire.cli import main; freeze, unfreeze = gc.freeze, gc.unfreeze; "
    f"gc.freeze = lambda: (freeze(), {TOLD}); gc.unfreeze = lambda: (unfreeze(), {TOLD}); main()"
)


def test_quire_serve_drains_on_sigterm(model: str) -> None:
    command = [sys.executable, "-c", QUIRE, "serve", model, "--port", "0", "--max-sequences", "4", "--cache-bytes", "4MiB", "--grace", "20"]
    environment = os.environ | {"QUIRE_API_KEY": "k1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            found = re.search(r"at (http://127\.0\.0\.1:\d+)/v1, with API keys", process.stderr.readline())
            assert found is not None
            assert httpx.get(found[1] + "/ready", timeout=60).status_code in (200, 503), "who asks while it loads is answered"
            told = [process.stderr.readline()]
            while "ready: tiny, llama" not in told[-1]:
                assert told[-1].startswith("kept "), told
                told.append(process.stderr.readline())
            assert httpx.get(found[1] + "/ready").status_code == 200
            assert int(told[-2].split()[1]) > 100_000, "what loading made is looked through amid requests"
            used = psutil.Process(process.pid)
            before, began = sum(used.cpu_times()[:2]), time.monotonic()
            time.sleep(1.0)
            idle = (sum(used.cpu_times()[:2]) - before) / (time.monotonic() - began)
            assert idle < 0.02, "an idle server sleeps"
            body, headers = LONG | {"max_tokens": 300, "stream": True}, {"authorization": "Bearer k1"}
            with httpx.stream("POST", found[1] + "/v1/completions", json=body, headers=headers, timeout=60) as stream:
                lines = stream.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                assert [line for line in lines if line][-1] == "data: [DONE]", "what runs may end"
            assert process.wait(30) == 0
            rest = process.stderr.read()
            assert "Traceback" not in rest and "k1" not in rest, rest
        finally:
            process.kill()


def test_a_checkpoints_own_code_is_never_run(model: str, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from quire.cli.app import app

    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(model, folder)
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    own = {"model_type": "own", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | own))
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    trap = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["code.OwnTokenizer", "code.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config | trap))
    refused = CliRunner().invoke(app, ["serve", str(folder), "--port", "0"])
    assert refused.exit_code == 2 and "comes with Python code of its own" in refused.stderr
    asked = CliRunner().invoke(app, ["serve", str(folder), "--port", "0", "--trust-remote-code"])
    assert asked.exit_code == 2 and "--trust-remote-code" in asked.stderr and "Quire at" not in asked.stderr
    assert not ran.exists()


def test_what_cannot_be_served_ends_quire_serve(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from quire.cli.app import app

    missing = CliRunner().invoke(app, ["serve", str(tmp_path / "nothing"), "--port", "0"])
    assert missing.exit_code == 2 and "nothing" in missing.stderr
    with bind("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="must be an address that can be listened on"):
        bind("127.0.0.1", taken.getsockname()[1])
    bad = CliRunner().invoke(app, ["serve", str(tmp_path), "--port", "99999"])
    assert bad.exit_code == 2 and "port=99999" in bad.stderr


def test_a_key_that_is_empty_opens_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Typed or in the environment: there was to be one."""
    from typer.testing import CliRunner

    from quire.cli.app import app

    serve = ["serve", str(tmp_path / "nothing"), "--port", "0"]
    typed = CliRunner().invoke(app, [*serve, "--api-key", ""])
    assert typed.exit_code == 2 and "api_key: must have from 1 to" in typed.stderr and "Quire at" not in typed.stderr
    for empty in ("", " "):
        monkeypatch.setenv("QUIRE_API_KEY", empty)
        told = CliRunner().invoke(app, serve)
        assert told.exit_code == 2 and f"QUIRE_API_KEY={empty!r}: must hold a key" in told.stderr and "Quire at" not in told.stderr
        assert "with API keys" in CliRunner().invoke(app, [*serve, "--api-key", "k"]).stderr, "what is typed counts"
    monkeypatch.delenv("QUIRE_API_KEY")
    assert "without API keys" in CliRunner().invoke(app, serve).stderr
