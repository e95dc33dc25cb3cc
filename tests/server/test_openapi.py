"""The OpenAPI document: every answer is declared, and answers are as declared, as our own models and as schemathesis see it."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import pytest
from pydantic import BaseModel

from quire.server.app import create_app
from quire.server.health import Alive, Ready, Version
from quire.server.models import ModelCard, ModelList
from quire.server.schema_answers import ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk, ErrorEnvelope
from quire.server.schema_response_answers import Deleted, InputItems, InputTokens, ResponseEvent, ResponseObject
from quire.server.serving import Serving
from quire.server.settings import ServerSettings
from quire.server.tokens import TokenizerInfo, Tokens, TokensText
from quire.server.traces import TraceFile
from tests.server.conftest import KEY, Running


@functools.cache
def document() -> dict[str, Any]:
    """The document, which no model is needed for. It takes a second, that only whoever runs a test of it is to wait for."""

    def never() -> Any:
        raise AssertionError("nothing is loaded")

    return create_app(Serving(ServerSettings(model="tiny"), never)).openapi()


CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
ASKED: list[tuple[str, dict[str, Any], type[BaseModel], type[BaseModel]]] = [
    ("/v1/completions", {"prompt": "x"}, Completion, CompletionChunk),
    ("/v1/completions", {"prompt": ["x", "y"], "n": 2, "logprobs": 2, "return_token_ids": True, "stop": ["e"]}, Completion, CompletionChunk),
    ("/v1/completions", {"prompt": "x", "logprobs": 0}, Completion, CompletionChunk),
    ("/v1/completions", {"prompt": "the fox", "logprobs": 1, "echo": True, "prompt_logprobs": 2}, Completion, CompletionChunk),
    ("/v1/chat/completions", CHAT, ChatCompletion, ChatCompletionChunk),
    ("/v1/chat/completions", CHAT | {"n": 2, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}, ChatCompletion, ChatCompletionChunk),
    ("/v1/chat/completions", CHAT | {"prompt_logprobs": 1}, ChatCompletion, ChatCompletionChunk),
    ("/v1/responses", {"input": "hi", "max_output_tokens": 3}, ResponseObject, ResponseEvent),
    ("/v1/responses", {"input": "hi", "max_output_tokens": 3, "top_logprobs": 2, "instructions": "x"}, ResponseObject, ResponseEvent),
]


def test_every_answer_is_declared() -> None:
    names = {ref.rsplit("/", 1)[1] for ref in re.findall(r'"\$ref": "([^"]+)"', json.dumps(document()))}
    assert names <= set(document()["components"]["schemas"]), "no name leads nowhere"
    assert not [name for name in document()["components"]["schemas"] if "__" in name], "no two models have one name"
    for path, operations in document()["paths"].items():
        for method, operation in operations.items():
            assert set(operation["responses"]) == {"200", "4XX", "5XX"}, (method, path)
            for status, told in operation["responses"].items():
                for media, content in told["content"].items():
                    schema = content["itemSchema" if media == "text/event-stream" else "schema"]
                    assert schema.get("type") == ("string" if path == "/metrics" and status == "200" else schema.get("type")), (method, path)
                    assert "$ref" in json.dumps(schema) or schema == {"type": "string"}, (method, path, status)


@pytest.mark.parametrize(("path", "body", "whole", "event"), ASKED, ids=lambda value: "-".join(value) if isinstance(value, dict) else None)
def test_answers_are_as_declared(server: Running, path: str, body: dict[str, Any], whole: type[BaseModel], event: type[BaseModel]) -> None:
    answer = server.post(path, body)
    assert answer.status_code == 200
    whole.model_validate_json(answer.content, strict=True)
    assert document()["paths"][path]["post"]["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith(f"/{whole.__name__}")
    usage = {"stream_options": {"include_usage": True}} if event is not ResponseEvent else {}
    stream = server.post(path, body | {"stream": True} | usage)
    if "prompt_logprobs" in body:
        assert stream.status_code == 400
        return
    said = [part.rpartition("data: ")[2] for part in stream.text.split("\n\n") if part and "[DONE]" not in part]
    assert said  # an engine that is quicker than its reader tells all at once
    for one in said:
        event.model_validate_json(one, strict=True)


@pytest.mark.parametrize(
    ("path", "kind"),
    {
        "/health": Alive,
        "/ready": Ready,
        "/version": Version,
        "/v1/models": ModelList,
        "/v1/models/tiny": ModelCard,
        "/traces": TraceFile,
        "/tokenizer_info": TokenizerInfo,
    }.items(),
)
def test_small_answers_are_as_declared(server: Running, path: str, kind: type[BaseModel]) -> None:
    kind.model_validate_json(server.get(path).content, strict=True)


def test_what_is_stored_and_what_is_tokenised(server: Running) -> None:
    made = server.post("/v1/responses", {"input": "hi", "max_output_tokens": 2, "background": True}).json()
    ResponseObject.model_validate(made, strict=True)
    for path in ("", "/cancel"):
        answer = server.post(f"/v1/responses/{made['id']}{path}") if path else server.get(f"/v1/responses/{made['id']}")
        ResponseObject.model_validate_json(answer.content, strict=True)
    said = [{"role": "assistant", "content": "x"}, {"role": "assistant", "content": [{"type": "output_text", "text": "x", "logprobs": [1]}]}]
    calls = [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}]
    calls += [{"type": "function_call_output", "call_id": "c", "output": output} for output in ("x", [{"type": "input_text", "text": "x"}])]
    for asked in ("x", [{"role": "user", "content": "x"}, *said, *calls]):
        stored = server.post("/v1/responses", {"input": asked, "max_output_tokens": 2}).json()
        InputItems.model_validate_json(server.get(f"/v1/responses/{stored['id']}/input_items").content, strict=True)
    import httpx

    InputTokens.model_validate_json(server.post("/v1/responses/input_tokens", {"input": "x"}).content, strict=True)
    kept = server.post("/v1/responses", {"input": "hi", "max_output_tokens": 2, "background": True, "stream": True})
    for told in (kept.text, server.get(f"/v1/responses/{kept.headers['x-request-id']}?stream=true").text):
        for one in filter(None, told.split("\n\n")):
            ResponseEvent.model_validate_json(one.rpartition("data: ")[2], strict=True)
    gone = httpx.delete(f"{server.url}/v1/responses/{made['id']}", headers={"authorization": f"Bearer {KEY}"})
    Deleted.model_validate_json(gone.content, strict=True)
    for asked in ({"prompt": "a fox"}, {"prompt": "a fox", "return_token_strs": True}):
        Tokens.model_validate_json(server.post("/tokenize", asked).content, strict=True)
    TokensText.model_validate_json(server.post("/detokenize", {"tokens": [5, 6]}).content, strict=True)
    ErrorEnvelope.model_validate_json(server.post("/detokenize", {"tokens": "x"}).content, strict=True)
