"""Answers of a given form, and calls of tools, through every endpoint that has them."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest

from quire import SamplingParams, StructuredOutput
from tests.server.conftest import Running
from tests.server.test_chat import CHAT, ask, prompt_ids
from tests.server.test_completions import events

pytest.importorskip("llguidance")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"animal": {"enum": ["dog", "fox"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["animal", "legs"],
    "additionalProperties": False,
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}}
FORM: dict[str, Any] = {"text": {"format": {"type": "json_schema", "name": "animal", "schema": SCHEMA}}}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "wait", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}},
]
NAMED = {"type": "function", "function": {"name": "look"}}
DRAWN: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_tokens": 200}


def checked(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text)
    assert set(found) == {"animal", "legs"} and found["animal"] in ("dog", "fox") and found["legs"] in range(10)
    return found


def test_a_schema_through_every_endpoint(server: Running, client: openai.OpenAI) -> None:
    structured = StructuredOutput(json_schema=SCHEMA)
    (wanted,) = server.llm.generate([prompt_ids(server)], SamplingParams(structured=structured, **DRAWN))
    text = wanted.outputs[0].text
    checked(text)
    asked: dict[str, Any] = {"model": "tiny", "messages": CHAT, "response_format": JSON_SCHEMA} | DRAWN
    (choice,) = client.chat.completions.create(**asked).choices
    assert (choice.message.content, choice.finish_reason) == (text, "stop")
    parts = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == text
    made = client.responses.create(model="tiny", input=CHAT, **FORM, temperature=1.0, max_output_tokens=200, extra_body={"seed": 5})
    assert made.output_text == text and made.text is not None and made.text.format is not None and made.text.format.type == "json_schema"
    two = server.complete(prompt=["the", [5, 6, 7]], n=2, response_format=JSON_SCHEMA, **DRAWN)
    assert len({choice["text"] for choice in two["choices"]}) > 1
    for one in two["choices"]:
        checked(one["text"])


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"regex": "[a-c]{2,4}-[0-9]"}, "[a-c]{2,4}-[0-9]"),
        ({"choice": ["the lazy dog", "the quick fox"]}, "the lazy dog|the quick fox"),
        ({"grammar": 'start: "<" WORD ">"\nWORD: /[x-z]{1,3}/'}, "<[x-z]{1,3}>"),
        ({"json": {"type": "integer", "minimum": 10, "maximum": 99}}, "[1-9][0-9]"),
        ({"json": json.dumps({"enum": [True]})}, "true"),
    ],
    ids=str,
)
def test_every_form(server: Running, asked: dict[str, Any], pattern: str) -> None:
    for choice in server.complete(prompt="the", n=3, structured_outputs=asked, **DRAWN)["choices"]:
        assert re.fullmatch(pattern, choice["text"]) and choice["finish_reason"] == "stop", choice


def test_any_object_and_one_that_is_cut_short(server: Running) -> None:
    cut = server.complete(prompt="the", response_format={"type": "json_object"}, seed=5, max_tokens=1)["choices"][0]
    assert cut["text"].startswith("{") and cut["finish_reason"] == "length"
    same = [ask(server, **more)["choices"] for more in ({}, {"response_format": {"type": "text"}})]
    assert same[0] == same[1]


def test_what_does_not_go_together(server: Running) -> None:
    for param, body in (
        ("structured_outputs", {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}),
        ("tools", {"tools": TOOLS, "structured_outputs": {"regex": "a"}}),
        ("tool_choice", {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "jump"}}}),
    ):
        answer = server.post("/v1/chat/completions", {"messages": CHAT} | body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


def test_a_form_that_cannot_be_is_told_without_our_own_words_for_it(server: Running) -> None:
    schema = {"type": "nothing"}
    for param, body in (
        ("response_format", {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}),
        ("response_format", {"tools": TOOLS, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}),
    ):
        message = server.post("/v1/chat/completions", {"messages": CHAT} | body).json()["error"]["message"]
        assert message.startswith(f"{param}: must be a form that some text has and that can be compiled (") and "Invalid type: nothing" in message


@pytest.mark.parametrize("schema", [{"type": "nothing"}, {"properties": {"a": {"enum": []}}, "required": ["a"]}, {"type": "string"}], ids=str)
def test_of_tools_the_one_is_named_whose_schema_cannot_be(server: Running, schema: dict[str, Any]) -> None:
    bad = {"name": "bad", "parameters": schema}
    functions = [TOOLS[0]["function"], TOOLS[1]["function"], bad | {"strict": True}]
    named = {"type": "function", "function": {"name": "bad"}}
    for more in ({}, {"tool_choice": "required"}, {"tool_choice": named}, {"response_format": JSON_SCHEMA}):
        body = {"messages": CHAT, "tools": [{"type": "function", "function": one} for one in functions]}
        error = server.post("/v1/chat/completions", body | more).json()["error"]
        assert error["param"] == "tools.2.function.parameters" and " | " not in error["message"], error
        assert error["message"].startswith("tools.2.function.parameters: must be a schema that some arguments keep to and that can be compiled (")
    tools = [{"type": "function", **one} for one in functions]
    assert server.post("/v1/responses", {"input": "x", "tools": tools}).json()["error"]["param"] == "tools.2.parameters"
    long = {"name": "bad", "strict": True, "parameters": {"const": "x" * 140_000}}
    error = server.post("/v1/chat/completions", {"messages": CHAT, "tools": [{"type": "function", "function": long}]}).json()["error"]
    assert error["param"] == "tools" and "at most 131072 characters" in error["message"]


def test_with_tools_and_a_form_a_message_is_calls_or_has_the_form(server: Running, client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "function": tool["function"] | {"strict": True}} for tool in TOOLS]
    (less,) = server.llm.tokenizer("<").input_ids
    asked: dict[str, Any] = {"model": "tiny", "messages": CHAT, "tools": tools, "response_format": JSON_SCHEMA, "n": 4} | DRAWN
    flat: Any = [{"type": "function", **tool["function"]} for tool in tools]
    for bias, reason in ((100, "tool_calls"), (-100, "stop")):  # calls begin with this token
        made = client.chat.completions.create(**asked, logit_bias={str(less): bias}, parallel_tool_calls=False).choices
        assert [choice.finish_reason for choice in made] == [reason] * 4
        extra = {"seed": 5, "logit_bias": {str(less): bias}}
        response = client.responses.create(
            model="tiny", input=CHAT, tools=flat, parallel_tool_calls=False, **FORM, temperature=1.0, max_output_tokens=200, extra_body=extra
        )
        for choice in made:
            message = choice.message
            if reason == "stop":
                assert message.tool_calls is None and checked(message.content or "")
                continue
            (call,) = message.tool_calls or []
            assert message.content is None and call.type == "function"
            assert checked(call.function.arguments) if call.function.name == "look" else json.loads(call.function.arguments) == {}
        assert (response.output_text, response.output[0].type) == (made[0].message.content or "", "message" if reason == "stop" else "function_call")
    must = client.chat.completions.create(**asked, tool_choice=NAMED).choices
    assert all(choice.message.content is None and choice.message.tool_calls for choice in must)
    never = client.chat.completions.create(**asked, tool_choice="none").choices
    assert [checked(choice.message.content or "") for choice in never if choice.finish_reason == "stop"]


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("parallel", [True, False])
def test_a_call_that_must_be_made(client: openai.OpenAI, choice: Any, parallel: bool) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": CHAT, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": parallel, "n": 2}
    whole = client.chat.completions.create(**asked, **DRAWN)
    parts = list(client.chat.completions.create(**asked, **DRAWN, stream=True, stream_options={"include_usage": True}))
    assert whole.usage is not None and parts[-1].usage is not None and parts[-1].usage.completion_tokens == whole.usage.completion_tokens
    for made in whole.choices:
        calls = made.message.tool_calls
        assert made.message.content is None and calls
        assert len(calls) == 1 or parallel and choice == "required"
        assert made.finish_reason == ("tool_calls" if made.finish_reason != "length" else "length")
        for call in calls[: -1 if made.finish_reason == "length" else None]:
            assert call.type == "function" and call.id.startswith("call_")
            assert call.function.name in ("look", "wait") if choice == "required" else call.function.name == "look"
            checked(call.function.arguments) if call.function.name == "look" else json.loads(call.function.arguments)
        own = [part.choices[0] for part in parts if part.choices and part.choices[0].index == made.index]
        streamed: list[list[str]] = []
        for delta in (delta for one in own for delta in one.delta.tool_calls or []):
            assert delta.function is not None
            if delta.index == len(streamed):
                assert delta.id and delta.type == "function" and delta.function.name
                streamed.append([delta.function.name, ""])
            streamed[delta.index][1] += delta.function.arguments or ""
        assert [tuple(one) for one in streamed] == [(call.function.name, call.function.arguments) for call in calls if call.type == "function"]
        assert not any(one.delta.content for one in own) and own[-1].finish_reason == made.finish_reason


def test_a_call_streams_argument_by_argument(server: Running) -> None:
    body = {"messages": CHAT, "tools": TOOLS, "tool_choice": NAMED, "stream": True} | DRAWN
    parts = events(server.post("/v1/chat/completions", body).text)
    fragments = [call["function"]["arguments"] for part in parts for call in part["choices"][0]["delta"].get("tool_calls", [])]
    assert len(fragments) > 3 and fragments[0].startswith("{")
    checked("".join(fragments))


def test_calls_that_may_be_made(server: Running) -> None:
    plain = ask(server, messages=CHAT, tools=TOOLS, tool_choice="none")["choices"][0]
    offered = ask(server, messages=CHAT, tools=TOOLS)["choices"][0]
    assert offered["message"]["content"] == plain["message"]["content"] and "tool_calls" not in offered["message"], "offering changes no token"
    strict = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}, TOOLS[1]]
    held = ask(server, messages=CHAT, tools=strict, parallel_tool_calls=False)["choices"][0]
    assert held["message"]["content"] and held["finish_reason"] == "length"


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_of_all_tools_some_may_be_called(server: Running, client: openai.OpenAI, mode: Any) -> None:
    """The prompt has all of them, so that what is cached of it goes on being hit."""
    (less,) = server.llm.tokenizer("<").input_ids
    # With auto a call is drawn where it is that or an object, and begins with this token.
    bias, form, text = ({"logit_bias": {str(less): 100}}, {"response_format": JSON_SCHEMA}, FORM) if mode == "auto" else ({}, {}, {})
    asked: dict[str, Any] = {"model": "tiny", "messages": CHAT, "tools": TOOLS, "parallel_tool_calls": False, "n": 8} | DRAWN | bias | form
    ids = {"extra_body": {"return_token_ids": True}}
    every = client.chat.completions.create(**asked, **ids, tool_choice="required")
    named = {call.function.name for made in every.choices for call in made.message.tool_calls or [] if call.type == "function"}
    assert named == {"look", "wait"}
    for tool, name in ((NAMED, "look"), ({"type": "function", "function": {"name": "wait"}}, "wait")):
        choice: Any = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [tool]}}
        some = client.chat.completions.create(**asked, **ids, tool_choice=choice)
        assert some.to_dict()["prompt_token_ids"] == every.to_dict()["prompt_token_ids"]
        calls = [call for made in some.choices for call in made.message.tool_calls or []]
        assert {call.function.name for call in calls if call.type == "function"} == {name} and len(calls) == 8
        flat: Any = [{"type": "function", **one["function"]} for one in TOOLS]
        picked: Any = {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": name}]}
        response = client.responses.create(model="tiny", input=CHAT, tools=flat, tool_choice=picked, extra_body={"seed": 5} | bias | text)
        assert {item.name for item in response.output if item.type == "function_call"} == {name}
        assert response.to_dict()["tool_choice"] == picked
    wrong: Any = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [{"type": "function", "function": {"name": "jump"}}]}}
    with pytest.raises(openai.BadRequestError, match="tool_choice.type='x': must be 'function' or 'allowed_tools'"):
        client.chat.completions.create(**asked, tool_choice=wrong | {"type": "x"})
    with pytest.raises(openai.BadRequestError, match="tool_choice='jump': must be of the tools given \\(look, wait\\)"):
        client.chat.completions.create(**asked, tool_choice=wrong)


def test_a_call_and_its_result_go_back(server: Running) -> None:
    made = ask(server, tools=TOOLS, tool_choice=NAMED, **DRAWN)["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": made["tool_calls"][0]["id"], "content": "a dog"}
    assert ask(server, messages=[*CHAT, made, result], tools=TOOLS)["choices"][0]["message"]["role"] == "assistant"


def test_calls_in_a_response(server: Running, client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
    asked: dict[str, Any] = {"model": "tiny", "input": "the", "tools": tools, "temperature": 1.0, "max_output_tokens": 600, "extra_body": {"seed": 5}}
    for choice in ("required", {"type": "function", "name": "look"}):
        made = client.responses.create(**asked, tool_choice=choice, parallel_tool_calls=False)
        (call,) = made.output
        assert call.type == "function_call" and made.status == "completed" and made.output_text == "" and len(made.tools) == 2
        parts: list[Any] = list(client.responses.create(**asked, tool_choice=choice, parallel_tool_calls=False, stream=True))
        kinds = [part.type for part in parts]
        deltas = [part for part in parts if part.type == "response.function_call_arguments.delta"]
        frame, end = ["response.created", "response.in_progress", "response.output_item.added"], ["response.output_item.done", "response.completed"]
        assert kinds == [*frame, *[deltas[0].type] * len(deltas), "response.function_call_arguments.done", *end]
        assert "".join(part.delta for part in deltas) == call.arguments == parts[-3].arguments == parts[-2].item.arguments
        assert {part.item_id for part in deltas} == {parts[-3].item_id} == {parts[-1].response.output[0].id}
        assert parts[2].item.arguments == "" and parts[2].item.name == call.name
    checked(call.arguments)
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "a dog"}
    further = client.responses.create(**asked | {"input": [result]}, previous_response_id=made.id, tool_choice="none")
    again = client.responses.create(**asked | {"input": [{"role": "user", "content": "the"}, call.to_dict(), result]}, tool_choice="none")
    assert further.output_text == again.output_text and further.usage is not None and again.usage is not None
    assert further.usage.input_tokens == again.usage.input_tokens > made.usage.input_tokens if made.usage else False


def test_a_call_that_was_cut_is_not_gone_on_from(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
    asked: dict[str, Any] = {"model": "tiny", "input": "the", "tools": tools, "tool_choice": "required", "temperature": 0}
    made = (client.responses.create(**asked, max_output_tokens=size) for size in range(20, 100, 4))
    cut = next(one for one in made if one.output[0].type == "function_call")
    assert cut.status == "incomplete"
    with pytest.raises(openai.BadRequestError, match="previous_response_id: must be of a response whose calls are whole"):
        client.responses.create(model="tiny", input="and?", previous_response_id=cut.id)


@pytest.mark.parametrize("stop", ['"legs"', "}", "<tool_call>"])
def test_a_call_that_a_stop_string_cut_does_not_say_that_it_is_one(server: Running, client: openai.OpenAI, stop: str) -> None:
    """A stop string is looked for in calls too; what they come to is the same whole and streamed, and in a response."""
    asked: dict[str, Any] = {"model": "tiny", "messages": CHAT, "tools": TOOLS[:1], "tool_choice": NAMED, "stop": [stop]} | DRAWN
    (made,) = client.chat.completions.create(**asked).choices
    assert (made.finish_reason, made.to_dict()["stop_reason"]) == ("stop", stop)
    parts = [part.choices[0] for part in client.chat.completions.create(**asked, stream=True)]
    assert [part.finish_reason for part in parts if part.finish_reason] == ["stop"]
    begun = [call.function.arguments for call in made.message.tool_calls or [] if call.type == "function"]
    assert "".join(d.function.arguments or "" for part in parts for d in part.delta.tool_calls or [] if d.function) == "".join(begun)
    tools: Any = [{"type": "function", **TOOLS[0]["function"]}]
    response = client.responses.create(model="tiny", input=CHAT, tools=tools, tool_choice="required", extra_body={"stop": stop, "seed": 5})
    if stop == "<tool_call>":
        assert not begun and response.output_text == ""
    else:
        with pytest.raises(ValueError, match="Expecting"):
            json.loads(begun[0])
        assert [(item.type, item.to_dict()["status"]) for item in response.output] == [("function_call", "incomplete")]
    past = client.chat.completions.create(**asked | {"stop": ["</tool_call>"]}).choices[0]
    assert past.finish_reason == "tool_calls" and past.message.tool_calls, "a call that is whole was not cut"
