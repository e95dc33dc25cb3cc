"""Responses whose clients come back: events that are kept and read on, and prompts that are counted without being answered."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from quire.server import response_store
from quire.server.response_log import EventLog
from tests.server.conftest import KEY, OTHER_KEY, Running
from tests.server.test_life import eventually
from tests.server.test_responses import ASK, INSTRUCTIONS, USER, until_ended

KEPT: dict[str, Any] = {"model": "tiny", "input": ASK, "background": True, "stream": True, "extra_body": {"seed": 3, "ignore_eos": True}}
TOOL: dict[str, Any] = {
    "type": "function",
    "name": "look",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    "strict": True,
}


def events(server: Running, response_id: str, query: str = "stream=true") -> list[dict[str, Any]]:
    answer = server.get(f"/v1/responses/{response_id}?{query}")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream"), answer.text
    return [json.loads(part.partition("data: ")[2]) for part in answer.text.split("\n\n") if part]


def test_a_log_is_told_whole_to_who_comes_before_between_and_after() -> None:
    async def followed() -> list[list[bytes]]:
        log, found = EventLog(), []

        async def follow(after: int | None) -> list[bytes]:
            return [event async for event in log.follow(after)]

        followers = [asyncio.ensure_future(follow(None))]
        for i in range(5):
            log.append(bytes((i,)))
            if i % 2:
                followers.append(asyncio.ensure_future(follow(i - 1)))
                await asyncio.sleep(0)
        log.end()
        found = await asyncio.gather(*followers, follow(None), follow(3), follow(9))
        assert log.num_bytes == 5
        return found

    whole = [bytes((i,)) for i in range(5)]
    assert asyncio.run(asyncio.wait_for(followed(), 10)) == [whole, whole[1:], whole[3:], whole, whole[4:], []]


def test_a_stream_in_the_background_is_read_on_where_it_broke(server: Running, client: openai.OpenAI) -> None:
    asked = KEPT | {"max_output_tokens": 150}
    whole = client.responses.create(**asked | {"background": False, "stream": False})
    stream = client.responses.create(**asked)
    seen = [next(stream) for _ in range(4)]
    stream.close()
    name = seen[0].response.id
    rest: list[Any] = list(client.responses.retrieve(name, stream=True, starting_after=3))  # while it runs
    parts = [*seen, *rest]
    assert [part.sequence_number for part in parts] == list(range(len(parts)))
    assert parts[-1].type == "response.incomplete" and parts[-1].response.output_text == whole.output_text
    assert "".join(part.delta for part in parts if part.type == "response.output_text.delta") == whole.output_text
    assert client.responses.retrieve(name) == parts[-1].response
    told = events(server, name)
    assert [one["sequence_number"] for one in told] == list(range(len(parts))) and told[-1]["response"]["id"] == name
    assert events(server, name, "stream=true&starting_after=5&include_obfuscation=false&include[]=message.output_text.logprobs") == told[6:]
    assert events(server, name, f"stream=true&starting_after={len(told)}") == []
    further = client.responses.create(model="tiny", input="and?", previous_response_id=name, max_output_tokens=1)
    assert further.usage is not None and whole.usage is not None and further.usage.input_tokens > whole.usage.input_tokens
    ends: dict[str, Any] = {"logit_bias": {"2": 100}, "min_tokens": 4}  # the client's helper wants one that is completed
    with client.responses.stream(model="tiny", input=ASK, background=True, extra_body=ends) as one:
        begun = next(iter(one))
        assert begun.type == "response.created"
    with client.responses.stream(response_id=begun.response.id, starting_after=2) as again:
        assert again.get_final_response().status == "completed"


def test_of_one_that_is_cancelled_or_forgotten_readers_are_told(server: Running, client: openai.OpenAI) -> None:
    for end in (client.responses.cancel, client.responses.delete):
        stream = client.responses.create(**KEPT)
        name = next(stream).response.id
        with pytest.raises(openai.NotFoundError):
            server.client(OTHER_KEY).responses.retrieve(name, stream=True)
        end(name)
        last = list(stream)[-1]
        assert (last.type, last.response.status, last.response.error) == ("response.failed", "cancelled", None)
    assert eventually(lambda: not server.serving.runs and server.llm.stats()["num_running"] == 0)


def test_events_that_are_kept_count_within_the_bound(server: Running, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body takes a few KiB whatever it was asked; the events of so many tokens take more, and older responses go."""
    monkeypatch.setattr(response_store, "MAX_STORED_BYTES", 16_000)
    older = client.responses.create(model="tiny", input=ASK, max_output_tokens=1).id
    until_ended(client, client.responses.create(**KEPT | {"stream": False}, max_output_tokens=150).id)
    assert client.responses.retrieve(older).id == older
    list(client.responses.create(**KEPT, max_output_tokens=150))
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(older)


def test_what_cannot_be_read_again_is_refused(server: Running, client: openai.OpenAI) -> None:
    plain = client.responses.create(model="tiny", input=ASK, max_output_tokens=1)
    later = client.responses.create(model="tiny", input=ASK, max_output_tokens=1, background=True)
    until_ended(client, later.id)
    for one, query, param in (
        (plain, "stream=true", "stream"),
        (later, "stream=true", "stream"),
        (plain, "starting_after=1", "starting_after"),
        (plain, "stream=maybe", "stream"),
        (plain, "stream=true&starting_after=-1", "starting_after"),
        (plain, "include_obfuscation=true", "include_obfuscation"),
        (plain, "include=x", "include"),
        (plain, "wizardry=1", "wizardry"),
    ):
        answer = server.get(f"/v1/responses/{one.id}?{query}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert client.responses.retrieve(plain.id, include=["message.output_text.logprobs"], stream=False) == plain


def test_a_client_that_leaves_leaves_one_in_the_background_running(server: Running, client: openai.OpenAI) -> None:
    """Read over a bare connection, so that nothing but its end tells the server."""
    body = {"input": ASK, "background": True, "stream": True, "max_output_tokens": 150, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/responses", json=body, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as answer:
        lines = answer.iter_lines()
        name = json.loads([next(lines) for _ in range(2)][1].partition("data: ")[2])["response"]["id"]
        assert name == answer.headers["x-request-id"]
    ended = until_ended(client, name)
    assert ended.status == "incomplete" and ended.usage.output_tokens == 150


def test_a_prompt_is_counted_as_it_is_then_answered(server: Running, client: openai.OpenAI) -> None:
    before = client.responses.create(model="tiny", input=ASK, instructions=INSTRUCTIONS, max_output_tokens=5)
    call: dict[str, Any] = {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"}
    items: list[Any] = [USER, call, {"type": "function_call_output", "call_id": "c", "output": "a dog"}]
    counts = []
    for asked in (
        {"input": ASK},
        {"input": items, "instructions": INSTRUCTIONS},
        {"input": ASK, "previous_response_id": before.id},
        {"input": ASK, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
        {"input": ASK, "text": {"format": {"type": "json_object"}}, "truncation": "disabled"},
    ):
        counted = client.responses.input_tokens.count(model="tiny", **asked)  # type: ignore[arg-type]
        answered = client.responses.create(model="tiny", max_output_tokens=1, **asked)  # type: ignore[call-overload]
        assert counted.object == "response.input_tokens" and counted.input_tokens == answered.usage.input_tokens
        counts.append(counted.input_tokens)
    assert len(set(counts)) == 4 and counts[0] == counts[4], "the form of the answer is no part of the prompt"
    assert client.responses.input_tokens.count(instructions=INSTRUCTIONS).input_tokens > 0
    assert client.responses.input_tokens.count(input="x " * 3000).input_tokens > 3000, "more than there is room for"
    with pytest.raises(openai.BadRequestError, match="no such response"):
        server.client(OTHER_KEY).responses.input_tokens.count(input=ASK, previous_response_id=before.id)
    for param, body in (
        ("input", {}),
        ("input", {"input": []}),
        ("max_output_tokens", {"input": ASK, "max_output_tokens": 1}),
        ("tool_choice", {"input": ASK, "tool_choice": "required"}),
        ("conversation", {"input": ASK, "conversation": "conv_1"}),
        ("reasoning.effort", {"input": ASK, "reasoning": {"effort": "low"}}),
    ):
        answer = server.post("/v1/responses/input_tokens", body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert server.post("/v1/responses/input_tokens", {"input": "x", "model": "other"}).status_code == 404
