"""The page's files and its stream: nothing from outside, nothing of others, and what is sent adds up to what there is."""

from __future__ import annotations

import base64
import json
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")
from hypothesis import given, settings
from hypothesis import strategies as st

from quire import LLM, SamplingParams
from quire.server import feed
from quire.server.feed import changes, extended
from quire.server.keys import salted
from quire.server.page import STATIC, TYPES
from tests.server.conftest import KEY, OTHER_KEY, Running, running

PROMPT = "the quick brown fox jumps over the lazy dog " * 3
LONG = SamplingParams(max_tokens=2000, ignore_eos=True)


@pytest.fixture(scope="module")
def quiet(model: str) -> Iterator[Running]:
    """A server that nobody else uses."""
    with running(lambda: LLM(model, page_size=4, cache_bytes=2**24, num_threads=1)) as one:
        yield one
        one.serving.close()


@contextmanager
def watching(server: Running, key: str = KEY) -> Iterator[Iterator[dict[str, Any]]]:
    headers = {"authorization": f"Bearer {key}"}
    with httpx.stream("GET", server.url + "/page/events", headers=headers, timeout=30) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        yield (json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: "))


class Watcher:
    """What a page makes of the stream."""

    def __init__(self) -> None:
        self.states, self.paths = bytearray(), dict[str, dict[str, list[int]]]()

    def take(self, message: dict[str, Any]) -> None:
        if "full" in message:
            self.states = bytearray(base64.b64decode(message["full"]))
        delta = message.get("delta", [])
        for start, length, state in zip(delta[::3], delta[1::3], delta[2::3], strict=True):
            self.states[start : start + length] = bytes([state]) * length
        for k, groups in message.get("paths", {}).items():
            for g, news in groups.items():
                pages = self.paths.setdefault(k, {}).get(g, [])
                self.paths[k][g] = news["all"] if "all" in news else pages + news["add"]


def test_nothing_comes_from_outside(server: Running) -> None:
    page = server.get("/", key=None)
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for path in STATIC.iterdir():
        answer = server.get(f"/page/static/{path.name}", key=None)
        assert answer.status_code == 200 and answer.headers["content-type"] == TYPES[path.suffix]
        assert "http://" not in answer.text and "https://" not in answer.text, path
        assert len(answer.text.splitlines()) <= 300
    for name in ("nothing.js", "..%2fpage.py", "..%2f..%2f__init__.py", "%2e%2e/page.py"):
        assert server.get(f"/page/static/{name}", key=None).status_code == 404
    for path in ("/page/events", "/page/cache/0", "/traces", "/metrics"):
        assert server.get(path, key=None).status_code == 401


def test_what_is_sent_adds_up(quiet: Running) -> None:
    watcher = Watcher()
    with watching(quiet) as messages:
        watcher.take(next(messages))
        assert bytes(watcher.states) == quiet.llm.cache_map().states
        asking = threading.Thread(target=lambda: quiet.complete(prompt=PROMPT, max_tokens=1000, n=3, ignore_eos=True, temperature=1.0))
        asking.start()
        most = 0
        for message in messages:
            watcher.take(message)
            most = max(most, len(message["rows"]))
            for row in message["rows"]:
                if row[6] is None:
                    pages = watcher.paths[str(row[0])]["0"]
                    assert -(-row[5] // 4) <= len(pages) and row[1].startswith("cmpl-")
                    assert all(watcher.states[page_id] in (1, 2) for page_id in pages), "held or shared"
            assert sum(message["counts"].values()) == len(watcher.states)
            if not message["rows"] and (most == 3 or not asking.is_alive()):
                break
        assert most == 3 and message["counts"]["held"] == 0 and message["status"] == "ready" and message["model"] == "tiny"
        assert bytes(watcher.states) == quiet.llm.cache_map().states


def test_of_other_keys_no_names(quiet: Running) -> None:
    with watching(quiet, OTHER_KEY) as others, watching(quiet, KEY) as own:
        stream = quiet.llm.submit(PROMPT, LONG, namespace=namespace_of(quiet, KEY), request_id="secret-name")
        quiet.serving.metrics.started("completions")
        for messages, name in ((others, None), (own, "secret-name")):
            message = next(message for message in messages if any(row[6] is None for row in message["rows"]))
            assert [row[1] for row in message["rows"]] == [name]
            assert "quick" not in json.dumps(message)
        page_id = quiet.llm.cache_map().sequences[0].tables[0][0]
        known, hidden = (quiet.get(f"/page/cache/{page_id}", key=key).json() for key in (KEY, OTHER_KEY))
        stream.cancel()
        assert known["requests"] == ["secret-name"] and known["text"] and PROMPT.startswith(known["text"])
        assert hidden["text"] is hidden["tokens"] is None and hidden["requests"] == [] and hidden["holders"] == 1
    assert [quiet.get(f"/page/cache/{name}").json()["error"]["param"] for name in ("999999", "x")] == ["page_id", "page_id"]


def test_a_salt_hides_nothing_from_its_own_key(quiet: Running) -> None:
    quiet.complete(prompt="pack my box with", max_tokens=2, cache_salt="pepper")
    space = salted(namespace_of(quiet, KEY), "pepper")
    page_id = next(i for i in range(quiet.llm.info.num_pages) if quiet.llm.page(i, namespace=space).position == 0)
    known, hidden = (quiet.get(f"/page/cache/{page_id}", key=key).json() for key in (KEY, OTHER_KEY))
    assert known["text"] and "pack my box with".startswith(known["text"]) and hidden["text"] is hidden["tokens"] is None


def namespace_of(server: Running, key: str) -> str:
    caller = server.serving.settings.keys.caller(f"Bearer {key}".encode())
    assert caller is not None
    return caller.namespace


def test_idle_nobody_is_asked(quiet: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []
    look = LLM.cache_map
    monkeypatch.setattr(LLM, "cache_map", lambda llm: looks.append(time.monotonic()) or look(llm))
    monkeypatch.setattr(feed, "KEEP_ALIVE_S", 1.0)
    time.sleep(0.5)
    assert not looks, "nobody watches"
    with watching(quiet) as messages:
        before = time.monotonic()
        for _ in range(3):
            assert not next(messages)["rows"]
        assert time.monotonic() - before > 1.8 and len(looks) <= 4
    monkeypatch.setattr(feed, "KEEP_ALIVE_S", 1000.0)
    with watching(quiet) as messages:
        assert not next(messages)["rows"]
        threading.Thread(target=lambda: quiet.complete(prompt=PROMPT, max_tokens=900, ignore_eos=True)).start()
        assert any(message["rows"] for message in messages), "a request wakes it long before it would look by itself"
    deadline = time.monotonic() + 10
    while (feeding(quiet).num_watchers or quiet.serving.metrics.on_started) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not feeding(quiet).num_watchers and not quiet.serving.metrics.on_started


def feeding(server: Running) -> feed.Feed:
    found = server.server.config.app.state.feed  # type: ignore[union-attr]
    assert isinstance(found, feed.Feed)
    return found


def test_an_open_page_does_not_keep_the_server(model: str) -> None:
    with running(lambda: LLM(model, cache_bytes=2**20, num_threads=1)) as one, watching(one) as messages:
        next(messages)
        began = time.monotonic()
        one.server.stop()
        assert list(messages) is not None and time.monotonic() - began < 3
        one.serving.close()


def test_loading_and_dead_are_said(model: str) -> None:
    go = threading.Event()

    def load() -> LLM:
        go.wait(30)
        return LLM(model, cache_bytes=2**20, num_threads=1)

    with running(load, wait=False) as one, watching(one) as messages:
        assert next(messages)["status"] == "loading"
        assert one.get("/page/cache/0").status_code == 503
        go.set()
        assert any(message["status"] == "ready" for message in messages)
        one.serving.close()
        one.serving.metrics.started("completions")
        assert any(message["status"] == "dead" for message in messages)


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=600), st.data())
def test_changes_are_all_that_changed(old: bytes, data: st.DataObject) -> None:
    new = bytearray(old)
    for place in data.draw(st.lists(st.integers(0, len(old) - 1), max_size=40)):
        new[place] = data.draw(st.integers(0, 3))
    watcher = Watcher()
    watcher.states = bytearray(old)
    watcher.take({"delta": changes(old, bytes(new))})
    assert watcher.states == new
    assert (changes(old, bytes(new)) == []) == (old == bytes(new))


@settings(deadline=None)
@given(st.lists(st.integers(-1, 9), max_size=8), st.lists(st.integers(-1, 9), max_size=8))
def test_a_longer_path_is_sent_as_what_came(old: list[int], new: list[int]) -> None:
    watcher = Watcher()
    for before, table in (((), old), ((array("i", old),), new), ((array("i", new),), new + [3])):
        watcher.take({"paths": {"7": {str(g): news for g, news in extended(tuple(before), (array("i", table),)).items()}}})
        assert watcher.paths.get("7", {}).get("0", []) == [page_id for page_id in table if page_id >= 0]
    assert "add" in extended((array("i", new),), (array("i", new + [3]),))[0] or not new


def test_the_feed_survives_nobody_reading(quiet: Running) -> None:
    """One that never reads holds up neither the engine nor those who do."""
    with watching(quiet) as _, watching(quiet) as messages:
        for _ in range(3):
            threading.Thread(target=lambda: quiet.complete(prompt=PROMPT, max_tokens=300, ignore_eos=True)).start()
        assert any(message["rows"] for message in messages)
        assert any(not message["rows"] for message in messages)
