"""Calls in the formats without JSON around them, end to end: a tiny model held by a grammar, asked through both endpoints, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quire import LLM
from quire.server.tool_formats import WORDS, Format
from tests.engine.conftest import tokenizer
from tests.server.conftest import Running, running
from tests.server.test_chat import CHAT, ask
from tests.server.test_structured import DRAWN
from tests.server.test_tool_formats import DEVSTRAL, MISTRAL_SMALL, QWEN
from tests.tensors.checkpoints import make

pytest.importorskip("llguidance")

NOTE: dict[str, Any] = {"type": "string", "minLength": 3, "maxLength": 12}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"animal": {"enum": ["dog", "fox"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 9}, "note": NOTE},
    "required": ["animal", "legs", "note"],
    "additionalProperties": False,
}
LOOK, WAIT = (
    {"name": "look", "parameters": SCHEMA},
    {"name": "wait", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
)
TOOLS = [{"type": "function", "function": function} for function in (LOOK, WAIT)]
NAMED = {"type": "function", "function": {"name": "look"}}
# A template, and what of its words are special tokens: Mistral's all, Qwen's not, though another model's may be.
MODELS: dict[str, tuple[str, Format | None]] = {
    "qwen": (QWEN, None),
    "qwen-special": (QWEN, "qwen_xml"),
    "mistral-small": (MISTRAL_SMALL, "mistral_args"),
    "devstral": (DEVSTRAL, "mistral_args"),
}


@pytest.fixture(scope="module", params=MODELS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose model has one of the templates."""
    source, special = MODELS[request.param]
    folder = make(Path(tmp_path_factory.mktemp("called")) / "tiny", "llama")
    hf = tokenizer()
    hf.add_special_tokens({"additional_special_tokens": list(WORDS[special]) if special else []})
    hf.chat_template = source + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    hf.save_pretrained(folder)
    with running(lambda: LLM(folder, page_size=4, max_tokens_per_step=128, cache_bytes=8 * 2**20, num_threads=1)) as one:
        yield one
        one.serving.close()


def checked(name: str, arguments: str) -> None:
    found = json.loads(arguments)
    if name == "wait":
        assert found == {}
    else:
        assert name == "look" and list(found) == ["animal", "legs", "note"], found
        assert found["animal"] in ("dog", "fox") and found["legs"] in range(10) and type(found["legs"]) is int and 3 <= len(found["note"]) <= 12


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("parallel", [True, False])
def test_calls_whole_and_streamed(server: Running, choice: Any, parallel: bool) -> None:
    asked: dict[str, Any] = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": parallel, "n": 3, **DRAWN}
    parts = list(server.client().chat.completions.create(model="tiny", messages=CHAT, stream=True, **asked))
    for made in ask(server, **asked)["choices"]:
        calls = made["message"]["tool_calls"]
        assert made["message"]["content"] is None and calls and (len(calls) == 1 or parallel and choice == "required")
        cut = made["finish_reason"] == "length"
        assert cut or made["finish_reason"] == "tool_calls"
        for call in calls[: -1 if cut else None]:
            checked(call["function"]["name"], call["function"]["arguments"])
        own = [part.choices[0] for part in parts if part.choices and part.choices[0].index == made["index"]]
        streamed: list[list[str]] = []
        for delta in (delta for one in own for delta in one.delta.tool_calls or []):
            assert delta.function is not None
            if delta.index == len(streamed):
                assert delta.id and delta.function.name
                streamed.append([delta.function.name, ""])
            streamed[delta.index][1] += delta.function.arguments or ""
        assert streamed == [[call["function"]["name"], call["function"]["arguments"]] for call in calls]
        assert not any(one.delta.content for one in own) and own[-1].finish_reason == made["finish_reason"]


def test_arguments_come_in_many_events(server: Running) -> None:
    asked: dict[str, Any] = {"tools": TOOLS, "tool_choice": NAMED, **DRAWN}
    parts = list(server.client().chat.completions.create(model="tiny", messages=CHAT, stream=True, **asked))
    deltas = [delta for part in parts if part.choices for delta in part.choices[0].delta.tool_calls or []]
    assert len(deltas) > 3
    checked("look", "".join(delta.function.arguments or "" for delta in deltas if delta.function))


def test_offering_changes_no_token_until_something_is_strict(server: Running) -> None:
    plain, free = (ask(server, messages=CHAT, tools=TOOLS, tool_choice=choice)["choices"][0] for choice in ("none", "auto"))
    assert free["message"]["content"] == plain["message"]["content"] and "tool_calls" not in free["message"]
    strict = [{"type": "function", "function": LOOK | {"strict": True}}, TOOLS[1]]
    for parallel in (False, True):
        assert ask(server, messages=CHAT, tools=strict, parallel_tool_calls=parallel)["choices"][0]["message"]["content"]


def test_a_call_goes_back_into_the_template(server: Running) -> None:
    (call,) = ask(server, tools=TOOLS, tool_choice=NAMED, **DRAWN)["choices"][0]["message"]["tool_calls"]
    said, result = {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": call["id"], "content": "a dog"}
    assert ask(server, messages=[*CHAT, said, result], tools=TOOLS)["choices"][0]["message"]["role"] == "assistant"


def test_a_response_says_it_in_typed_events(server: Running) -> None:
    client = server.client()
    asked: dict[str, Any] = {
        "model": "tiny", "input": "the", "tools": [{"type": "function", **LOOK}, {"type": "function", **WAIT}], "temperature": 1.0,
        "max_output_tokens": 600, "extra_body": {"seed": 5}, "tool_choice": {"type": "function", "name": "look"}, "parallel_tool_calls": False,
    }  # fmt: skip
    made = client.responses.create(**asked)
    (call,) = made.output
    assert call.type == "function_call" and made.status == "completed"
    checked(call.name, call.arguments)
    parts: list[Any] = list(client.responses.create(**asked, stream=True))
    deltas = [part for part in parts if part.type == "response.function_call_arguments.delta"]
    frame, end = ["response.created", "response.in_progress", "response.output_item.added"], ["response.output_item.done", "response.completed"]
    assert [part.type for part in parts] == [*frame, *[deltas[0].type] * len(deltas), "response.function_call_arguments.done", *end]
    assert len(deltas) > 3 and "".join(part.delta for part in deltas) == call.arguments == parts[-2].item.arguments
    further = client.responses.create(
        **asked | {"input": [{"type": "function_call_output", "call_id": call.call_id, "output": "a dog"}], "tool_choice": "none"},
        previous_response_id=made.id,
    )
    assert further.status in ("completed", "incomplete")


def test_what_the_format_cannot_hold_is_a_400_that_names_it(server: Running, request: pytest.FixtureRequest) -> None:
    pattern = {"type": "object", "properties": {"a": {"type": "string", "pattern": "[ab]+"}}}
    for name, parameters, param in (("f", pattern, "pattern of f.parameters.a"), ("a b", {}, "a b")):
        body = {"messages": CHAT, "tools": [{"type": "function", "function": {"name": name, "parameters": parameters}}], "max_tokens": 1}
        answer = server.post("/v1/chat/completions", body | {"tool_choice": "required"})
        if "qwen" in request.node.callspec.id or name == "a b":
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "tools" and param in answer.json()["error"]["message"]
        else:
            assert answer.status_code == 200, answer.text
        assert server.post("/v1/chat/completions", body).status_code == (400 if name == "a b" else 200)
