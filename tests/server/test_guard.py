"""Who may ask what: every route there is, with and without a key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from quire.errors import ConfigError
from quire.server.feed import MAX_WATCHERS
from quire.server.guard import OPEN_FOLDER, OPEN_PATHS
from quire.server.keys import KeyRing, salted
from quire.server.settings import ServerSettings, public_name
from tests.server.conftest import KEY, OTHER_KEY, Running, running
from tests.server.test_errors import checked


def routes(router: Any) -> Iterator[tuple[str, str]]:
    """(method, path) of every route of an application, those of included routers too."""
    for route in router.routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            yield from routes(inner)
        else:
            yield from ((method, route.path) for method in route.methods)


def test_every_route_wants_a_key(server: Running) -> None:
    found = set(routes(server.server.config.app))
    assert {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models",
        "/tokenize",
        "/detokenize",
        "/tokenizer_info",
        "/metrics",
        "/docs",
        "/openapi.json",
        "/version",
    } <= {path for _, path in found}
    num_open = 0
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for method, path in sorted(found):
            if path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
                num_open += 1
                continue
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"}, {"authorization": KEY}, {"x-api-key": KEY}):
                answer = client.request(method, path.replace("{", "").replace("}", ""), headers=headers)
                assert answer.status_code == 401, (method, path, headers)
                assert answer.headers["www-authenticate"] == "Bearer"
                if method != "HEAD":
                    assert checked(answer)["code"] == "invalid_api_key"
        assert client.get("/docs", headers={"authorization": f"Bearer {KEY}"}).content == client.get("/page/static/docs.html").content
        assert num_open == 4  # health, ready, the page and its files
        for path in ("/no/such/route", "/page/events", "/page/staticx", "/health/", "/page/static", "/HEALTH"):
            assert client.get(path).status_code == 401, path
        for path in ("/health", "/ready", "/"):
            assert client.get(path).status_code == 200, path
        for scheme in ("Bearer", "bearer", "BEARER"):
            assert client.get("/v1/models", headers={"authorization": f"{scheme} {OTHER_KEY}"}).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/", "/v1/models/tiny", "/metrics", "/version", "/docs", "/openapi.json", "/nothing"])
@pytest.mark.parametrize("key", [KEY, None])
def test_head_is_get_without_a_body(server: Running, path: str, key: str | None) -> None:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=server.url, headers=headers, timeout=10) as client:
        whole, head = client.get(path), client.head(path)
        assert (head.status_code, head.content, head.headers["content-type"]) == (whole.status_code, b"", whole.headers["content-type"])
        assert path == "/metrics" or head.headers["content-length"] == whole.headers["content-length"]
        assert client.head("/v1/completions").status_code == (405 if key else 401), "the connection goes on"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/health", "GET, HEAD"),
        ("HEAD", "/v1/completions", "POST"),
        ("PUT", "/v1/responses/x", "GET, HEAD, DELETE"),
        ("GET", "/v1/responses/x/cancel", "POST"),
    ],
)
def test_a_method_that_is_not_taken_is_told_which_are(server: Running, method: str, path: str, allowed: str) -> None:
    answer = httpx.request(method, server.url + path, headers={"authorization": f"Bearer {KEY}"})
    assert (answer.status_code, answer.headers.get_list("allow")) == (405, [allowed])


def test_head_of_a_stream_without_an_end_has_one(server: Running) -> None:
    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {KEY}"}, timeout=10) as client:
        for _ in range(MAX_WATCHERS + 1):
            assert client.head("/page/events").headers["content-type"].startswith("text/event-stream")
            assert client.head("/health").status_code == 200


def test_keys() -> None:
    ring = KeyRing(["one", "two "])
    one, two = ring.caller(b"Bearer one"), ring.caller(b"bearer two")
    assert one is not None and two is not None and one.namespace != two.namespace and one.key_id != two.key_id
    assert one == KeyRing(["three", "one"]).caller(b"Bearer one"), "the same key has the same namespace after a restart"
    assert ring and "one" not in repr(vars(ring)) and "one" not in f"{one.namespace} {one.key_id}"
    assert len(one.key_id) == 8 and one.key_id not in one.namespace
    for header in (None, b"", b"Bearer", b"Bearer ", b"Bearer on", b"Bearer one two", b"Bearer " + b"x" * 10**5, b"Bearer \xff"):
        assert ring.caller(header) is None, header
    nobody = KeyRing().caller(None)
    assert nobody is not None and nobody.namespace == "" and not KeyRing()
    for key in ("", " ", "x" * 513):
        with pytest.raises(ConfigError):
            KeyRing([key])


def test_a_salt_stays_within_its_namespace() -> None:
    spaces = {salted(namespace, salt) for namespace in ("", "a", "a/b") for salt in (None, "a", "b", "a/b", "/", "\ud800")}
    assert len(spaces) == 18
    assert all(space.startswith("a") for space in (salted("a", "../b"), salted("a", "b")))


def test_settings_are_checked() -> None:
    for wrong in ({"port": -1}, {"port": 2**16}, {"grace_s": -1.0}, {"grace_s": float("nan")}, {"model": ""}, {"cors_origins": ("example.org",)}):
        with pytest.raises(ConfigError):
            ServerSettings(**({"model": "x"} | wrong))  # type: ignore[arg-type]
    assert ServerSettings(model="x").on_loopback and not ServerSettings(model="x", host="0.0.0.0").on_loopback
    assert public_name("meta/llama") == "meta/llama" and public_name("/some/where/model/") == "model"


def test_other_origins_may_ask_only_if_named(server: Running) -> None:
    sent = "authorization,content-type,x-stainless-lang,x-stainless-os"  # by OpenAI's client for JavaScript
    ask = {"origin": "http://page.example", "access-control-request-method": "POST", "access-control-request-headers": sent}
    answer = httpx.options(server.url + "/v1/completions", headers=ask)
    assert answer.status_code == 401 and "access-control-allow-origin" not in answer.headers
    with running(lambda: server.llm, cors_origins=("http://page.example",)) as open_one:
        allowed = httpx.options(open_one.url + "/v1/completions", headers=ask)
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "http://page.example", allowed.text
        assert set(sent.split(",")) <= set(allowed.headers["access-control-allow-headers"].split(","))
        refused = httpx.options(open_one.url + "/v1/completions", headers=ask | {"origin": "http://other.example"})
        assert "access-control-allow-origin" not in refused.headers
        no_key = httpx.post(open_one.url + "/v1/completions", headers={"origin": "http://page.example"})
        assert no_key.status_code == 401 and no_key.headers["access-control-allow-origin"] == "http://page.example"
        assert open_one.complete(prompt="x", max_tokens=1)["model"] == "tiny"


def test_without_keys_everybody_is_one(server: Running) -> None:
    with running(lambda: server.llm, keys=KeyRing()) as everybodys:
        assert everybodys.get("/v1/models", key=None).status_code == 200
        first = everybodys.post("/v1/completions", {"prompt": "jugs and jugs and jugs and jugs", "max_tokens": 1}, key=None).json()
        again = everybodys.post("/v1/completions", {"prompt": "jugs and jugs and jugs and jugs", "max_tokens": 1}, key="any").json()
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0 < again["usage"]["prompt_tokens_details"]["cached_tokens"]
