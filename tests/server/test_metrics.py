"""Metrics and traces: what a scrape says, that it always says something, that no client can grow it, and who may read whose trace."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from quire import LLM, SamplingParams
from quire.outputs import Receipt, RequestOutput
from quire.server import metrics, traces
from quire.server.metrics import Metrics

PROMPT = [5 + (i * i * 7 + 3 * i) % 180 for i in range(37)]
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
Samples = dict[tuple[str, tuple[str, ...]], float]


def parsed(text: bytes) -> Samples:
    families = text_string_to_metric_families(text.decode())
    return {(one.name, tuple(one.labels.values())): one.value for family in families for one in family.samples}


@pytest.fixture(scope="module")
def llm(model: str) -> Any:
    with LLM(model, page_size=4, max_tokens_per_step=16) as llm:
        yield llm


def test_what_the_engine_did_is_on_the_scrape(llm: LLM) -> None:
    counted = Metrics()
    for _ in range(2):
        counted.started("/v1/completions")
        (output,) = llm.generate(PROMPT, GREEDY)
        counted.first_token(0.004)
        counted.between_tokens(0.002)
        counted.finished("/v1/completions", output)
    counted.refused(429)
    found = parsed(counted.render(llm))
    assert found["quire_requests_started_total", ("completions",)] == found["quire_requests_total", ("completions", "length")] == 2
    assert found["quire_request_errors_total", ("429",)] == 1
    assert found["quire_prompt_tokens_total", ()] == 2 * len(PROMPT) and found["quire_generated_tokens_total", ()] == 12
    assert found["quire_cached_prompt_tokens_total", ()] == output.receipt.cached_tokens > 30
    assert found["quire_time_to_first_token_seconds_count", ()] == found["quire_time_between_tokens_seconds_count", ()] == 2
    assert found["quire_time_to_first_token_seconds_bucket", ("0.005",)] == 2
    assert found["quire_engine_up", ()] == 1
    stats = llm.stats()
    pages = {labels[0]: value for (name, labels), value in found.items() if name == "quire_pages"}
    assert pages["held"] == 0.0 and sum(pages.values()) == llm.info.num_pages
    assert (pages["cached"], pages["free"]) == (stats["num_cached_pages"], stats["num_free_pages"])
    spent = {labels[0]: value for (name, labels), value in found.items() if name == "quire_step_seconds_total"}
    assert set(spent) == {"plan", "forward", "sample", "commit", "deliver"} and all(value > 0 for value in spent.values())


def test_pinned_pages_are_not_held(llm: LLM) -> None:
    with_pin = llm.pin(PROMPT)
    text = Metrics().render(llm).decode()
    llm.unpin(with_pin)
    assert [line.split()[-1] for line in text.splitlines() if line.startswith("quire_pages") and 'state="held"' in line] == ["0.0"]
    assert parsed(text.encode())["quire_pages", ("pinned",)] == with_pin.num_pages > 0


def test_pages_on_disk(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.engine.disk_eye.LISTED_S", 0.0)
    monkeypatch.setattr("quire.engine.disk_eye.SHARE", 1e9)
    with LLM(model, page_size=4, cache_bytes=2**20, num_threads=1, cache_dir=tmp_path) as llm:
        llm.generate(PROMPT, SamplingParams(max_tokens=2))
        while (seen := llm.cache_map()).counts()["moving"] or not seen.disk.settled:  # type: ignore[union-attr]
            pass
        num_files = len(list(tmp_path.glob("*.page")))
        for only, also in ((0, num_files), (num_files, 0)):
            found = parsed(Metrics().render(llm))
            assert (found["quire_pages", ("on_disk",)], found["quire_pages_also_on_disk", ()]) == (only, also)
            assert sum(value for (name, _), value in found.items() if name == "quire_pages") == llm.info.num_pages + only
            llm.reset_cache()
    assert num_files > 4


def test_a_scrape_is_one_question_to_the_engine(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, call = [], llm._worker.call
    monkeypatch.setattr(llm._worker, "call", lambda function: calls.append(1) or call(function))
    Metrics().render(llm)
    assert len(calls) == 1


def test_it_answers_while_loading_and_when_dead(model: str) -> None:
    counted = Metrics()
    counted.refused(503)
    dead = LLM(model)
    dead.close()
    for llm in (None, dead):
        found = parsed(counted.render(llm))
        assert found["quire_engine_up", ()] == 0 and found["quire_request_errors_total", ("503",)] == 1
        assert not any(name == "quire_pages" for name, _ in found)


def test_no_client_makes_series(llm: LLM) -> None:
    counted = Metrics()
    before = parsed(counted.render(llm)).keys()
    output = RequestOutput("x", None, [5], [], Receipt())
    for i in range(300):
        counted.started(f"/v1/{i}")
        counted.finished(f"/v1/{i}", output, key_id=f"key {i}")
        counted.refused(1000 + i)
    found = parsed(counted.render(llm))
    assert found.keys() == before and len(before) < 250
    assert found["quire_requests_total", ("other", "stop")] == found["quire_request_errors_total", ("other",)] == 300


def app_over(llm: LLM | None, counted: Metrics) -> TestClient:
    app = FastAPI()
    app.state.serving = SimpleNamespace(llm=llm, metrics=counted, failure=None)

    @app.middleware("http")
    async def guard(request: Request, proceed: Any) -> Any:
        request.state.namespace = request.state.key_id = request.headers.get("x-key", "")
        return await proceed(request)

    app.include_router(metrics.router)
    app.include_router(traces.router)
    return TestClient(app)


def test_the_door(llm: LLM) -> None:
    answer = app_over(llm, Metrics()).get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=")
    assert parsed(answer.content)["quire_engine_up", ()] == 1


def test_a_trace_is_for_the_key_that_asked(llm: LLM) -> None:
    counted = Metrics()
    client = app_over(llm, counted)
    stream = llm.submit([9, *PROMPT], GREEDY, request_id="mine")
    times = [time.perf_counter() for event in stream if event.token_ids]
    counted.finished("completions", stream.wait(), key_id="a", token_times_s=times)
    trace = client.get("/traces/mine", headers={"x-key": "a"}).json()
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert all(isinstance(event["ts"], int) and isinstance(event["dur"], int) and event["dur"] >= 0 for event in events)
    by_name = {event["name"]: event for event in events}
    assert [sum(event["name"] == name for event in events) for name in ("queued", "prefill", "decode", "chunk", "token")] == [1, 1, 1, 3, len(times)]
    assert sum(event["args"]["tokens"] for event in events if event["name"] == "chunk") == 38, "three steps of at most 16 tokens"
    assert by_name["completions"]["args"]["generated_tokens"] == 6
    parts = sum(by_name[name]["dur"] for name in ("queued", "prefill", "decode"))
    assert by_name["completions"]["dur"] == pytest.approx(parts, abs=3)
    assert abs(by_name["completions"]["ts"] / 1e6 - time.time()) < 60
    assert client.get("/traces/mine", headers={"x-key": "b"}).status_code == client.get("/traces/none", headers={"x-key": "a"}).status_code == 404
    assert len(client.get("/traces", headers={"x-key": "b"}).json()["traceEvents"]) == 1
    assert len(client.get("/traces", headers={"x-key": "a"}).json()["traceEvents"]) == len(trace["traceEvents"])


def test_traces_are_bounded() -> None:
    kept = traces.Traces()
    for i in range(3 * traces.MAX_TRACES):
        kept.finished("a", "completions", RequestOutput(f"{i}", None, [5], [], Receipt()), [0.0] * (2 * traces.MAX_TOKENS))
    assert [trace.request_id for trace in kept.of("a")] == [f"{i}" for i in range(2 * traces.MAX_TRACES, 3 * traces.MAX_TRACES)]
    assert len(kept.of("a")[0].token_times_s) == traces.MAX_TOKENS
    for i in range(traces.MAX_KEYS):
        kept.finished(f"key {i}", "completions", RequestOutput("x", None, [5], [], Receipt()))
    assert kept.of("a") == []
