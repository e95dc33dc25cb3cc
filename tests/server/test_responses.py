"""/v1/responses, driven by the openai client."""

from __future__ import annotations

import time
from typing import Any

import openai
import pytest

from quire import LLM, SamplingParams
from quire.server import response_store
from tests.engine.conftest import tokenizer
from tests.server.conftest import KEY, OTHER_KEY, Running, running
from tests.server.test_chat import prompt_ids
from tests.tensors.checkpoints import make

ASK = " the lazy dog "
INSTRUCTIONS = "be brief"
SYSTEM, USER = {"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": ASK}
FRAME = ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
END = ["response.output_text.done", "response.content_part.done", "response.output_item.done"]


def wanted(server: Running, messages: list[Any], **params: Any) -> Any:
    (output,) = server.llm.generate([prompt_ids(server, messages)], SamplingParams(**({"max_tokens": 6, "seed": 3} | params)))
    return output


def ask(server: Running, key: str = KEY, **body: Any) -> dict[str, Any]:
    answer = server.post("/v1/responses", {"input": ASK, "max_output_tokens": 6, "seed": 3} | body, key=key)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def until_ended(client: openai.OpenAI, response_id: str) -> Any:
    for _ in range(600):
        response = client.responses.retrieve(response_id)
        if response.status not in ("queued", "in_progress"):
            return response
        time.sleep(0.05)
    raise AssertionError("it did not end")


def test_the_same_bits_as_from_the_library(server: Running, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "input": ASK, "instructions": INSTRUCTIONS, "temperature": 0.9, "top_p": 0.95}
    output = wanted(server, [SYSTEM, USER], temperature=0.9, top_p=0.95)
    response = client.responses.create(**asked, max_output_tokens=6, metadata={"a": "b"}, extra_body={"seed": 3})
    assert response.output_text == output.outputs[0].text
    assert (response.object, response.model, response.instructions, response.metadata) == ("response", "tiny", INSTRUCTIONS, {"a": "b"})
    assert (response.temperature, response.top_p, response.max_output_tokens) == (0.9, 0.95, 6)
    assert response.status == "incomplete" and response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    usage = response.usage
    assert usage is not None and (usage.input_tokens, usage.output_tokens) == (len(output.prompt_token_ids), 6)
    assert usage.total_tokens == usage.input_tokens + 6 and usage.output_tokens_details.reasoning_tokens == 0
    items = client.responses.create(**asked | {"input": [{"role": "user", "content": [{"type": "input_text", "text": ASK}]}]},
                                    max_output_tokens=6, extra_body={"seed": 3})  # fmt: skip
    assert items.output_text == response.output_text
    assert items.usage is not None and 0 < items.usage.input_tokens_details.cached_tokens < usage.input_tokens


def test_one_that_ends_by_itself_is_completed(server: Running, client: openai.OpenAI) -> None:
    response = client.responses.create(model="tiny", input=ASK, max_output_tokens=9, extra_body={"logit_bias": {"2": 100}})
    assert (response.status, response.output_text, response.incomplete_details) == ("completed", "", None)
    assert response.output[0].to_dict()["status"] == "completed"
    parts = list(client.responses.create(model="tiny", input=ASK, stream=True, extra_body={"logit_bias": {"2": 100}}))
    assert [part.type for part in parts] == [*FRAME, *END, "response.completed"]


def test_the_typed_events_of_a_stream(server: Running, client: openai.OpenAI) -> None:
    whole = client.responses.create(model="tiny", input=ASK, max_output_tokens=8, temperature=0)
    parts: list[Any] = list(client.responses.create(model="tiny", input=ASK, max_output_tokens=8, temperature=0, stream=True))
    kinds, deltas = [part.type for part in parts], [part for part in parts if part.type == "response.output_text.delta"]
    assert kinds == [*FRAME, *["response.output_text.delta"] * len(deltas), *END, "response.incomplete"]
    assert [part.sequence_number for part in parts] == list(range(len(parts)))
    assert parts[0].response.status == parts[1].response.status == "in_progress" and parts[0].response.output == []
    assert "".join(part.delta for part in deltas) == whole.output_text == parts[-4].text == parts[-3].part.text
    final = parts[-1].response
    assert final.output_text == whole.output_text and final.usage.output_tokens == whole.usage.output_tokens
    assert {part.item_id for part in deltas} == {final.output[0].id} == {parts[2].item.id} == {parts[-2].item.id}
    assert client.responses.retrieve(final.id) == final
    raw = server.post("/v1/responses", {"input": ASK, "max_output_tokens": 2, "stream": True}).text
    assert raw.startswith("event: response.created\ndata: {") and "[DONE]" not in raw
    ends: dict[str, Any] = {"logit_bias": {"2": 100}, "min_tokens": 4}  # the client's helper wants one that is completed
    with client.responses.stream(model="tiny", input=ASK, temperature=0, extra_body=ends) as stream:
        text = "".join(part.delta for part in stream if part.type == "response.output_text.delta")
        assert text and stream.get_final_response().output_text == text


def test_logprobs(server: Running, client: openai.OpenAI) -> None:
    output = wanted(server, [USER], logprobs=2).outputs[0]
    told = ask(server, include=["message.output_text.logprobs"], top_logprobs=2)["output"][0]["content"][0]["logprobs"]
    assert [one["logprob"] for one in told] == output.logprobs
    assert [[t["logprob"] for t in one["top_logprobs"]] for one in told] == [[t.logprob for t in top] for top in output.top_logprobs]
    assert ask(server)["output"][0]["content"][0]["logprobs"] == []
    more: dict[str, Any] = {"include": ["message.output_text.logprobs"], "extra_body": {"seed": 3}}
    parts = client.responses.create(model="tiny", input=ASK, max_output_tokens=6, stream=True, **more)
    done = next(part for part in parts if part.type == "response.output_text.done")
    assert [one.logprob for one in done.logprobs] == output.logprobs


def test_going_on_from_a_stored_one(server: Running, client: openai.OpenAI) -> None:
    first = client.responses.create(model="tiny", input=ASK, instructions=INSTRUCTIONS, max_output_tokens=12, temperature=0)
    then = {"role": "user", "content": "and the fox?"}
    second = client.responses.create(model="tiny", input="and the fox?", previous_response_id=first.id, max_output_tokens=6, temperature=0)
    said = {"role": "assistant", "content": first.output_text}
    chat = [USER, said, then]  # the instructions are not carried over
    assert second.output_text == wanted(server, chat, temperature=0).outputs[0].text
    assert second.previous_response_id == first.id
    third = client.responses.create(model="tiny", input="and?", previous_response_id=second.id, max_output_tokens=6, temperature=0)
    chat += [{"role": "assistant", "content": second.output_text}, {"role": "user", "content": "and?"}]
    assert third.output_text == wanted(server, chat, temperature=0).outputs[0].text
    assert third.usage is not None and third.usage.input_tokens_details.cached_tokens > 8
    # The same by hand: an answer's items are sent back as they came.
    by_hand: list[Any] = [USER, *[item.to_dict() for item in first.output], then]
    assert client.responses.create(model="tiny", input=by_hand, max_output_tokens=6, temperature=0).output_text == second.output_text


def test_retrieve_and_delete(server: Running, client: openai.OpenAI) -> None:
    response = client.responses.create(model="tiny", input=ASK, max_output_tokens=3)
    assert client.responses.retrieve(response.id) == response
    with pytest.raises(openai.NotFoundError):
        server.client(OTHER_KEY).responses.retrieve(response.id)
    with pytest.raises(openai.BadRequestError, match="no such response"):
        server.client(OTHER_KEY).responses.create(model="tiny", input=ASK, previous_response_id=response.id)
    with pytest.raises(openai.NotFoundError):
        server.client(OTHER_KEY).responses.delete(response.id)
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(response.id)
    client.responses.delete(response.id)
    for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            call(response.id)
    unkept = client.responses.create(model="tiny", input=ASK, max_output_tokens=3, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


def test_input_items(server: Running, client: openai.OpenAI) -> None:
    """Of a response and those before it, in the client's pages; each item has an id of its own."""
    first = client.responses.create(model="tiny", input=ASK, instructions=INSTRUCTIONS, max_output_tokens=3)
    call: dict[str, Any] = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    more: list[Any] = [call, {"type": "function_call_output", "call_id": "c", "output": "a dog"}, first.output[0].to_dict(), USER]
    second = client.responses.create(model="tiny", input=more, previous_response_id=first.id, max_output_tokens=3)
    items: list[Any] = list(client.responses.input_items.list(second.id, limit=2, order="asc"))
    assert [item.type for item in items] == ["message", "message", "function_call", "function_call_output", "message", "message"]
    assert len({item.id for item in items}) == 6 and items[1] == first.output[0] and items[4].content == items[1].content
    assert (items[0].role, items[0].content[0].type, items[0].content[0].text) == ("user", "input_text", ASK)
    assert (items[2].arguments, items[3].output) == ("{}", "a dog")
    assert list(client.responses.input_items.list(second.id)) == items[::-1]
    address = f"/v1/responses/{second.id}/input_items"
    page = server.get(f"{address}?limit=4&after={items[5].id}").json()
    assert (page["object"], page["has_more"], page["first_id"], page["last_id"]) == ("list", True, items[4].id, items[1].id)
    assert server.get(f"{address}?after={items[0].id}").json() == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    for wrong in ("limit=0", "limit=101", "limit=x", "order=up", "after=msg_none", "include=x", "stream=true"):
        answer = server.get(f"{address}?{wrong}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, wrong.partition("=")[0])
    assert client.responses.input_items.list(second.id, include=["message.output_text.logprobs"]).data[0] == items[5]
    assert server.get(address, OTHER_KEY).status_code == 404
    client.responses.delete(first.id)
    assert len(list(client.responses.input_items.list(second.id))) == 6


def test_in_the_background(server: Running, client: openai.OpenAI) -> None:
    started = client.responses.create(model="tiny", input=ASK, max_output_tokens=6, temperature=0, background=True)
    assert (started.status, started.output, started.background) == ("in_progress", [], True)
    ended = until_ended(client, started.id)
    assert (ended.status, ended.output_text) == ("incomplete", wanted(server, [USER], temperature=0).outputs[0].text)
    assert client.responses.cancel(started.id) == ended, "one that has ended stays as it is"
    assert client.responses.create(model="tiny", input="x", previous_response_id=ended.id, max_output_tokens=1).status == "incomplete"


def test_cancelled_in_the_background(server: Running, client: openai.OpenAI) -> None:
    endless: dict[str, Any] = {"model": "tiny", "input": ASK, "background": True, "extra_body": {"ignore_eos": True}}
    one, other = client.responses.create(**endless), client.responses.create(**endless)
    assert client.responses.retrieve(one.id).status == "in_progress"
    with pytest.raises(openai.BadRequestError, match="in_progress"):
        client.responses.create(model="tiny", input="x", previous_response_id=one.id)
    with pytest.raises(openai.NotFoundError):
        server.client(OTHER_KEY).responses.cancel(one.id)
    assert client.responses.cancel(one.id).status == client.responses.cancel(one.id).status == "cancelled"
    client.responses.delete(other.id)
    for _ in range(200):
        if not server.serving.runs:
            break
        time.sleep(0.05)
    assert not server.serving.runs and server.llm.stats()["num_running"] == 0
    assert client.responses.retrieve(one.id).status == "cancelled"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(other.id)


def test_the_oldest_goes_first(server: Running, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    key, other = client, server.client(OTHER_KEY)
    kept = other.responses.create(model="tiny", input=ASK, max_output_tokens=1)
    monkeypatch.setattr(response_store, "MAX_STORED", 3)
    made = [key.responses.create(model="tiny", input=ASK, max_output_tokens=1).id for _ in range(5)]

    def found(client: openai.OpenAI, response_id: str) -> bool:
        try:
            return client.responses.retrieve(response_id).id == response_id
        except openai.NotFoundError:
            return False

    assert [found(key, one) for one in made] == [False, False, True, True, True]
    monkeypatch.setattr(response_store, "MAX_STORED_BYTES", 10_000)
    last = key.responses.create(model="tiny", input="x" * 1000, max_output_tokens=1).id
    assert [found(key, one) for one in [*made, last]] == [False] * 5 + [True]
    assert found(other, kept.id), "another key's are its own"


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("wizardry", {"wizardry": 1}),
        ("input", {"input": []}),
        ("input.0.role", {"input": [{"role": "wizard", "content": "x"}]}),
        ("input.0.content.0.type", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}),
        ("input.0.type", {"input": [{"role": "user", "content": "x", "type": "item_reference"}]}),
        ("input", {"input": "x " * 3000}),
        ("tools.0.type", {"tools": [{"type": "web_search"}]}),
        ("tools.0.parameters", {"tools": [{"type": "function", "name": "f", "strict": True, "parameters": {"type": "nothing"}}]}),
        ("input.0.call_id", {"input": [{"type": "function_call_output", "output": "x"}]}),
        ("input.0.arguments", {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": {}}]}),
        ("input.1.arguments", {"input": [USER, {"type": "function_call", "call_id": "c", "name": "f", "arguments": "[]"}]}),
        ("tool_choice", {"tool_choice": "required"}),
        ("parallel_tool_calls", {"parallel_tool_calls": False}),
        ("parallel_tool_calls", {"parallel_tool_calls": False, "tools": [], "tool_choice": "none"}),
        ("max_tool_calls", {"max_tool_calls": 1}),
        ("text.format.type", {"text": {"format": {"type": "wizardry"}}}),
        ("text.format", {"text": {"format": {"type": "json_schema"}}}),
        ("text.format", {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}}),
        ("text.verbosity", {"text": {"verbosity": "low"}}),
        ("reasoning.effort", {"reasoning": {"effort": "low"}}),
        ("n", {"n": 2}),
        ("truncation", {"truncation": "auto"}),
        ("conversation", {"conversation": "conv_1"}),
        ("prompt", {"prompt": {"id": "x"}}),
        ("background", {"background": True, "stream": True, "store": False}),
        ("background", {"background": True, "store": False}),
        ("previous_response_id", {"previous_response_id": "resp_none"}),
        ("temperature", {"temperature": 3}),
        ("include.0", {"include": ["file_search_call.results"]}),
        ("max_output_tokens", {"max_output_tokens": 0}),
        ("metadata", {"metadata": {str(i): "x" for i in range(17)}}),
        ("chat_template_kwargs.messages", {"chat_template_kwargs": {"messages": []}}),
    ],
)
def test_what_is_refused(server: Running, param: str, body: dict[str, Any]) -> None:
    answer = server.post("/v1/responses", {"input": ASK, "max_output_tokens": 2} | body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param, answer.text
    assert not error["message"].startswith("messages")


def test_of_an_item_that_is_not_there_it_is_said_which_are(server: Running) -> None:
    error = server.post("/v1/responses", {"input": [{"type": "item_reference", "id": "x"}]}).json()["error"]
    assert error["message"] == "input.0.type: must be 'message', 'function_call' or 'function_call_output'"


def test_what_is_not_there_is_told_in_words_of_json(server: Running) -> None:
    error = server.post("/v1/responses", {"input": ASK, "max_tool_calls": 1}).json()["error"]
    assert error["message"] == "max_tool_calls=1: must be null or left out: this server has no such thing"


def test_neutral_values_are_taken(server: Running) -> None:
    neutral = {
        "tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "truncation": "disabled", "text": {"format": {"type": "text"}},
        "reasoning": {"effort": None, "summary": None}, "include": ["reasoning.encrypted_content"], "service_tier": "auto", "prompt_cache_key": "k",
        "metadata": {}, "previous_response_id": None, "conversation": None, "user": "u", "background": False, "stream": False, "model": "tiny",
    }  # fmt: skip
    assert ask(server, **neutral)["output"][0]["content"][0]["text"] == ask(server)["output"][0]["content"][0]["text"]


def test_a_failure_in_a_stream_is_its_last_event(server: Running, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    from quire.errors import StepError
    from quire.server.runs import Run

    def failing(*_: Any) -> Any:
        raise StepError("the model's forward raised")

    monkeypatch.setattr(Run, "_ended", failing)
    parts: list[Any] = list(client.responses.create(model="tiny", input=ASK, max_output_tokens=2, stream=True))
    assert parts[-1].type == "response.failed" and parts[-1].sequence_number == len(parts) - 1
    assert parts[-1].response.status == "failed" and parts[-1].response.error.code == "server_error"
    started = client.responses.create(model="tiny", input=ASK, max_output_tokens=2, background=True)
    ended = until_ended(client, started.id)
    assert ended.status == "failed" and "forward raised" in ended.error.message
    with pytest.raises(openai.InternalServerError):
        client.responses.create(model="tiny", input=ASK, max_output_tokens=2)
    monkeypatch.undo()
    assert client.responses.create(model="tiny", input=ASK, max_output_tokens=2).status == "incomplete"


def test_a_model_without_a_template(tmp_path: Any) -> None:
    folder = make(tmp_path / "bare", "llama")
    tokenizer().save_pretrained(folder)
    with running(lambda: LLM(folder, cache_bytes=2**20)) as server:
        error = server.post("/v1/responses", {"input": "x"}).json()["error"]
        assert (error["code"], error["param"]) == ("no_chat_template", "input")
