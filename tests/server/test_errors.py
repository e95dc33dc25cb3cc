"""Errors: one shape, the right status and field, and nothing said that should not be. After each the next good request is right."""

from __future__ import annotations

import json
import os
import re
import socket
from typing import Any

import httpx
import pytest

from quire import errors
from quire.server.errors import ServerError, as_server_error, without_paths
from quire.server.limits import MAX_BODY_BYTES, MAX_HEADER_BYTES
from tests.server.bad_requests import BAD, CHATS, COMPLETIONS, GOOD, Bad
from tests.server.conftest import KEY, Running

PER_BATCH = 15


def checked(answer: httpx.Response) -> dict[str, Any]:
    """The error of an answer in the one shape."""
    assert answer.headers["content-type"] == "application/json" and len(answer.headers.get_list("x-request-id")) == 1, answer.text
    (envelope, error), *rest = answer.json().items()
    assert envelope == "error" and not rest and set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"] and len(error["message"]) < 1000
    assert not re.search(r"Traceback|site-packages|/work|/home|/tmp|pydantic|0x[0-9a-f]{6}", answer.text), answer.text
    found: dict[str, Any] = error
    return found


def test_there_are_two_hundred() -> None:
    assert len(BAD) >= 200


@pytest.mark.parametrize("start", range(0, len(BAD), PER_BATCH))
def test_bad_requests_and_then_a_good_one(server: Running, start: int) -> None:
    wanted, pid = server.complete(**GOOD)["choices"], os.getpid()
    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as client:
        for bad in BAD[start : start + PER_BATCH]:
            answer = client.request(bad.method, bad.path, content=bad.content, headers=dict(bad.headers))
            assert answer.status_code == bad.status, (bad.content[:200], answer.text)
            error = checked(answer)
            if bad.param is not None:
                assert error["param"] == bad.param, (bad.content[:200], answer.text)
        again = client.post(COMPLETIONS, json=GOOD)
        assert again.json()["choices"] == wanted and os.getpid() == pid
    assert server.llm.stats()["num_held_pages"] == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "the body has an integer of more than 4300 digits"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "the body must be nested at most 64 deep"),
        (b'{"prompt": "\xff"}', "the body is not JSON in UTF-8"),
        (b'{"prompt": "x", "top_p": 0}', "top_p=0: must be greater than 0"),
        (b'{"prompt": "x", "logprobs": true}', "logprobs=true: must be an integer"),
        (
            b'{"prompt": "x", "stream": true, "stream_options": {"include_obfuscation": true}}',
            "stream_options.include_obfuscation=true: must be false",
        ),
        (b'{"prompt": "x", "user": 5}', "user=5: must be a string"),
        (b'{"prompt": ["x", ""]}', "prompt: must be at least one token"),
        (b'{"prompt": "x", "stop": 5}', "stop=5: must be a string or a list"),
        (b'{"prompt": "x", "stop": [5]}', "stop.0=5: must be a string"),
        (b'{"prompt": "x", "response_format": "json"}', "response_format: must be an object"),
        (b'{"prompt": "x", "ignore_eos": "secret"}', "ignore_eos: must be true or false"),
        (b'{"prompt": "x", "response_format": {"type": "xml"}}', "response_format.type='xml': must be 'text', 'json_object' or 'json_schema'"),
        (
            b'{"prompt": "x", "stop": ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p", "q"]}',
            "stop: must have at most 16 items, not 17",
        ),
        (b'{"prompt": "x", "Model": "tiny"}', "Model: there is no such field"),
        (b'{"prompt": "x", "body": {}}', "body: there is no such field"),
        (b'{"prompt": "x", "max_tokens": 0}', "max_tokens=0: must be an integer from 1 to 2147483647"),
        (b'{"prompt": "x", "max_tokens": 2147483648}', "max_tokens=2147483648: must be less than 2147483648"),
        (b'{"prompt": "x", "n": 2, "best_of": 1}', "best_of: must be from n=2 to 128"),
        (b'{"prompt": ["x", "y", "z", "a", "b", "c", "d", "e", "f"], "best_of": 128}', "best_of: must be so that there are at most 1024 choices"),
        (b'{"prompt": "x", "stream_options": {}}', "stream_options: must be left out without stream: true"),
        (b'{"prompt": "x", "structured_outputs": {}}', "structured_outputs='nothing': must be one of json_object, json, regex, choice and grammar"),
    ],
)
def test_a_refusal_says_what_is_wrong(server: Running, content: bytes, said: str) -> None:
    answer = server.post(COMPLETIONS, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and checked(answer)["message"].startswith(said)


@pytest.mark.parametrize(
    ("path", "limit", "said"),
    [
        (COMPLETIONS, "max_tokens", "min_tokens=5: must be at most max_tokens=4"),
        (CHATS, "max_tokens", "min_tokens=5: must be at most max_tokens=4"),
        (CHATS, "max_completion_tokens", "min_tokens=5: must be at most max_completion_tokens=4"),
        ("/v1/responses", "max_output_tokens", "min_tokens=5: must be at most max_output_tokens=4"),
    ],
)
def test_the_other_field_is_called_as_the_body_calls_it(server: Running, path: str, limit: str, said: str) -> None:
    prompt = {COMPLETIONS: {"prompt": "x"}, CHATS: {"messages": [{"role": "user", "content": "x"}]}}.get(path, {"input": "x"})
    error = checked(server.post(path, prompt | {limit: 4, "min_tokens": 5}))
    assert (error["param"], error["message"]) == ("min_tokens", said)
    assert f"tokens with {limit}=3000'" in checked(server.post(path, prompt | {limit: 3000}))["message"]


@pytest.mark.parametrize(
    ("error", "status", "param", "said"),
    [
        (errors.ContextLengthError(7, 8, 9), 400, "prompt", ("7", "8", "9", "15")),
        (errors.CacheTooSmallError(7, 8, 9), 400, "prompt", ("7", "8", "9")),
        (errors.InvalidRequestError("prompt", "a secret text", "something else"), 400, "prompt", ("something else",)),
        (errors.InvalidRequestError("include_stop_in_output", 3, "True or False"), 400, "include_stop_str_in_output", ("3",)),
        (errors.QueueFullError("5 requests are open"), 429, None, ("5",)),
        (errors.EngineDeadError("the engine has failed: OSError: /home/someone/model/x is gone"), 503, None, ("OSError",)),
        (errors.StepError("request cmpl-1: the model's forward failed: ValueError: x"), 500, None, ("ValueError",)),
        (errors.NonFiniteLogitsError("request cmpl-1: the model's logits hold NaN"), 500, None, ("NaN",)),
        (errors.NothingToDrawError("request cmpl-1: allowed_token_ids leave no token to draw"), 400, None, ("no token",)),
        (ValueError("/home/someone/secret"), 500, None, ("ValueError",)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_errors_of_the_engine(error: Exception, status: int, param: str | None, said: tuple[str, ...]) -> None:
    told = as_server_error(error)
    assert (told.status, told.param) == (status, param)
    assert all(word in told.message for word in said) and "secret" not in told.message and "/home" not in told.message
    assert ("retry-after" in told.headers) == (status in (429, 503))
    assert as_server_error(told) is told and isinstance(told, ServerError)


def test_paths_are_taken_out() -> None:
    assert without_paths("no /home/me/models/x.safetensors, ~/a/b or ./c/d here") == "no <path>, <path> or <path> here"
    assert without_paths("at http://host/x, 3/4 and meta/llama") == "at http://host/x, 3/4 and meta/llama"


def test_a_body_without_a_length_is_counted(server: Running) -> None:
    sent = 0

    def endless() -> Any:
        nonlocal sent
        yield b'{"prompt": "'
        while sent < 20 * MAX_BODY_BYTES:
            sent += 2**16
            yield b"x" * 2**16

    try:
        answer = httpx.post(
            server.url + COMPLETIONS, content=endless(), headers={"authorization": f"Bearer {KEY}", "content-type": "application/json"}, timeout=60
        )
        assert answer.status_code == 413 and checked(answer)["type"] == "invalid_request_error"
    except httpx.TransportError:  # the connection was closed while we wrote: we may or may not have read the answer before
        pass
    assert sent < 3 * MAX_BODY_BYTES
    assert server.complete(**GOOD)


@pytest.mark.parametrize("num_bytes", [MAX_HEADER_BYTES, 3 * MAX_HEADER_BYTES, 2**20])
def test_headers_are_bounded(server: Running, num_bytes: int) -> None:
    try:
        answer = httpx.get(server.url + "/health", headers={"x-long": "x" * num_bytes}, timeout=60)
        assert answer.status_code in (400, 431)
        checked(answer)
    except httpx.TransportError:
        assert num_bytes > 2 * MAX_HEADER_BYTES
    assert server.get("/health").status_code == 200


@pytest.mark.parametrize("raw", [b"nonsense\r\n\r\n", b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n", b"\x16\x03\x01\x00"])
def test_what_is_no_http(server: Running, raw: bytes) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall(raw + b"\r\n\r\n")
        answer = b"".join(iter(lambda: sock.recv(4096), b""))
    assert b" 400 " in answer.splitlines()[0] and b'"error"' in answer and b"x-request-id: req-" in answer
    assert server.get("/health").status_code == 200


def test_a_length_that_is_a_lie(server: Running) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall((head + f"content-length: {10**18}\r\n\r\n").encode())
        assert b" 413 " in sock.recv(4096).splitlines()[0]
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall((head + 'content-length: 50\r\n\r\n{"prompt"').encode())
    assert server.complete(**GOOD)


def test_a_stop_in_the_middle_of_a_stream_is_an_event(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from quire.tensors.models.model import CausalModel

    forward, left = CausalModel.forward, 3

    def failing(self: CausalModel, *args: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise RuntimeError("no more of /home/someone/model/weights")
        return forward(self, *args)

    monkeypatch.setattr(CausalModel, "forward", failing)
    answer = server.post(COMPLETIONS, GOOD | {"stream": True, "max_tokens": 20, "ignore_eos": True})
    assert answer.status_code == 200 and "[DONE]" not in answer.text
    last = answer.text.strip().split("\n\n")[-1]
    assert '"error"' in last and "RuntimeError" in last and "/home" not in last
    whole = server.post(COMPLETIONS, GOOD)
    assert whole.status_code == 500 and checked(whole)["code"] == "request_failed"
    monkeypatch.undo()
    assert server.complete(**GOOD)


def test_more_prompts_than_may_ever_be_open_is_no_busy_server(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.llm._worker, "_max_open", 3)
    answer = server.post(COMPLETIONS, GOOD | {"prompt": ["a", "b", "c", "d"]})
    assert answer.status_code == 400 and checked(answer)["param"] == "prompt" and "at most 3 at once" in checked(answer)["message"]
    assert len(server.complete(**(GOOD | {"prompt": ["a", "b", "c"]}))["choices"]) == 3


def test_a_full_queue_is_429(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.llm._worker, "_max_open", 4)
    monkeypatch.setitem(server.llm._worker._open, "somebody else's", lambda error: None)
    # Long, so that the first three are not done before the fourth is there.
    answer = server.post(COMPLETIONS, GOOD | {"prompt": ["a", "b", "c", "d"], "max_tokens": 200, "ignore_eos": True})
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1 and checked(answer)["code"] == "queue_full"
    monkeypatch.undo()
    assert server.llm.stats()["num_running"] == 0, "those that were taken have been cancelled"


@pytest.mark.parametrize("address", [COMPLETIONS, CHATS])
def test_a_stream_that_fails_ends_with_its_error_alone(server: Running, address: str) -> None:
    """And none of its choices with a reason that clients of this protocol do not know."""
    body = {"prompt": "a"} if address == COMPLETIONS else {"messages": [{"role": "user", "content": "a"}]}
    asked = body | {"model": "tiny", "stream": True, "n": 3, "min_tokens": 5, "stop_token_ids": [7], "allowed_token_ids": [7]}
    told = [json.loads(line[6:]) for line in server.post(address, asked).text.splitlines() if line.startswith("data: {")]
    assert "no token to draw" in told[-1]["error"]["message"]
    assert {choice["finish_reason"] for event in told[:-1] for choice in event["choices"]} <= {None}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_tries_again_gets_its_answer(server: Running, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    wanted, refused = server.complete(**GOOD)["choices"][0]["text"], server.serving.metrics.refused
    monkeypatch.setattr(server.llm._worker, "_max_open", 1)
    monkeypatch.setitem(server.llm._worker._open, "somebody else's", lambda error: None)
    statuses: list[int] = []

    def noted(status: int) -> None:
        statuses.append(status)
        refused(status)
        if len(statuses) == 2:
            monkeypatch.undo()

    monkeypatch.setattr(server.serving.metrics, "refused", noted)
    with server.client().with_options(max_retries=3) as client:
        answer = client.completions.create(model="tiny", **GOOD, stream=stream)
        assert ("".join(part.choices[0].text for part in answer) if stream else answer.choices[0].text) == wanted
    assert statuses == [429, 429]


def test_bad_lists_the_requests_once() -> None:
    assert len({(bad.path, bad.method, bad.content, bad.headers) for bad in BAD}) == len(BAD)
    assert all(isinstance(bad, Bad) for bad in BAD)
