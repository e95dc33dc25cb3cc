"""Answers that come back as messages and items of the next request, in whatever shape OpenAI's client holds them."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.server.conftest import Running
from tests.server.test_chat import CHAT
from tests.server.test_structured import DRAWN, FORM, JSON_SCHEMA, NAMED, TOOLS

pytest.importorskip("llguidance")


def test_answers_go_back_as_the_client_holds_them(server: Running, client: openai.OpenAI) -> None:
    """As objects and as the dicts of these, parsed or not: all come to the prompt that the bare fields come to."""
    strict: Any = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}]
    asked: dict[str, Any] = {"model": "tiny", "messages": CHAT} | DRAWN
    call = client.chat.completions.parse(**asked, tools=strict, tool_choice=NAMED).choices[0].message
    form = client.chat.completions.parse(**asked, response_format=JSON_SCHEMA).choices[0].message
    assert call.tool_calls and call.tool_calls[0].function.parsed_arguments
    held = call.model_dump() | {"a_field_of_tomorrow": None}
    bare = {"role": "assistant", "tool_calls": [{"id": held["tool_calls"][0]["id"], "type": "function", "function": {
        name: held["tool_calls"][0]["function"][name] for name in ("name", "arguments")}}]}  # fmt: skip
    counts = []
    for said in (bare, call, held):
        made = client.chat.completions.create(model="tiny", messages=[*CHAT, said], tools=strict, tool_choice="none", max_tokens=1)
        counts.append(made.usage and made.usage.prompt_tokens)
    assert len(set(counts)) == 1
    form_back: Any = form.model_dump() | {"parsed": {"animal": "dog"}}
    client.chat.completions.create(model="tiny", messages=[*CHAT, form_back], max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="messages.0.a_field_of_tomorrow: there is no such field"):
        client.chat.completions.create(model="tiny", messages=[CHAT[0] | {"a_field_of_tomorrow": 1}], max_tokens=1)  # type: ignore[list-item]


def test_items_go_back_as_the_client_holds_them(server: Running, client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", **TOOLS[0]["function"], "strict": True}]
    ask: dict[str, Any] = {"model": "tiny", "input": CHAT, "tools": tools, "max_output_tokens": 300, "extra_body": {"seed": 5}}
    (call,) = client.responses.parse(**ask, tool_choice="required", parallel_tool_calls=False).output
    (said,) = client.responses.parse(**ask, tool_choice="none", **FORM).output
    assert call.type == "function_call" and said.type == "message"
    bare = {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments}
    text = {"role": "assistant", "content": said.to_dict()["content"][0]["text"]}  # type: ignore[index]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "a dog"}
    counts = []
    for back in ([bare, text], [call, said], [call.model_dump(), said.model_dump()]):
        messages: Any = [*CHAT, *back, result]
        made = client.responses.create(model="tiny", input=messages, tools=tools, tool_choice="none", max_output_tokens=1)
        counts.append(made.usage and made.usage.input_tokens)
        told = client.responses.input_items.list(made.id, order="asc").data
        assert not any(word in str(server.get(f"/v1/responses/{made.id}/input_items").json()) for word in ("parsed", "async_"))
        again: Any = [item.model_dump() for item in told]
        assert client.responses.input_tokens.count(input=again, tools=tools, tool_choice="none").input_tokens == counts[-1]
    assert len(set(counts)) == 1
