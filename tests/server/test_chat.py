"""POST /v1/chat/completions, /tokenize and /detokenize."""

from __future__ import annotations

import threading
from typing import Any

import openai
import pytest

from quire import LLM, SamplingParams
from quire.text.tokenizer import TextTokenizer
from tests.engine.conftest import tokenizer
from tests.server.conftest import Running, running
from tests.server.test_completions import events
from tests.tensors.checkpoints import make

CHAT: list[Any] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": " the lazy dog "}]
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "jump", "parameters": {"type": "object", "properties": {}}}}


def prompt_ids(server: Running, messages: list[Any] = CHAT, **more: Any) -> list[int]:
    found: list[int] = server.llm.tokenizer.apply_chat_template(messages, **({"add_generation_prompt": True} | more))["input_ids"]
    return found


def ask(server: Running, **body: Any) -> Any:
    answer = server.post("/v1/chat/completions", {"messages": CHAT, "max_tokens": 6, "seed": 3} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize(
    "more", [{}, {"n": 3}, {"temperature": 0}, {"stop": ["e"], "max_tokens": 40}, {"max_tokens": None, "max_completion_tokens": 7}], ids=str
)
def test_the_same_bits_as_from_the_library(server: Running, client: openai.OpenAI, more: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": CHAT, "max_tokens": 6, "temperature": 0.9, "seed": 3} | more
    given = {name: value for name, value in asked.items() if name not in ("model", "messages", "max_completion_tokens", "max_tokens")}
    tokens = asked["max_tokens"] or asked["max_completion_tokens"]
    (wanted,) = server.llm.generate([prompt_ids(server)], SamplingParams(max_tokens=tokens, **given))
    whole = client.chat.completions.create(**asked)
    assert [choice.message.content for choice in whole.choices] == [one.text for one in wanted.outputs]
    assert [choice.finish_reason for choice in whole.choices] == [one.finish_reason for one in wanted.outputs]
    assert whole.usage is not None and whole.usage.prompt_tokens == len(wanted.prompt_token_ids)
    assert whole.usage.prompt_tokens_details is not None and whole.usage.prompt_tokens_details.cached_tokens is not None
    parts = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True, "include_obfuscation": False}))
    assert parts[-1].usage is not None and parts[-1].usage.completion_tokens == whole.usage.completion_tokens
    for choice in whole.choices:
        own = [part.choices[0] for part in parts if part.choices and part.choices[0].index == choice.index]
        assert own[0].delta.role == "assistant" and own[-1].finish_reason == choice.finish_reason
        assert "".join(one.delta.content or "" for one in own) == choice.message.content


def test_logprobs_carry_bytes(server: Running, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": CHAT, "max_tokens": 10, "seed": 4, "logprobs": True, "top_logprobs": 2}
    (wanted,) = server.llm.generate([prompt_ids(server)], SamplingParams(max_tokens=10, seed=4, logprobs=2))
    one, (choice,) = wanted.outputs[0], client.chat.completions.create(**asked).choices
    assert choice.logprobs is not None and choice.logprobs.content is not None and one.top_logprobs is not None
    assert [token.logprob for token in choice.logprobs.content] == one.logprobs
    assert [[other.logprob for other in token.top_logprobs] for token in choice.logprobs.content] == [
        [t.logprob for t in top] for top in one.top_logprobs
    ]
    raw = bytes(byte for token in choice.logprobs.content for byte in token.bytes or [])
    assert raw.decode(errors="replace") == server.llm.tokenizer.decode(one.token_ids)
    parts = list(client.chat.completions.create(**asked, stream=True))
    streamed = [token for part in parts for token in (part.choices[0].logprobs and part.choices[0].logprobs.content) or []]
    assert streamed == choice.logprobs.content
    plain = ask(server, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert all(token["top_logprobs"] == [] for token in plain) and len(plain) == 6


def test_messages_as_clients_send_them(server: Running) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "the"}, {"type": "text", "text": "dog"}]}]
    back = {"role": "assistant", "content": "yes", "refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    told = ask(server, messages=[*parts, back, CHAT[1]], return_token_ids=True)
    assert told["prompt_token_ids"] == prompt_ids(server, [{"role": "user", "content": "the\ndog"}, {"role": "assistant", "content": "yes"}, CHAT[1]])
    developer = ask(server, messages=[{"role": "developer", "content": "be brief"}, CHAT[1]], return_token_ids=True)
    assert developer["prompt_token_ids"] == prompt_ids(server), "a template that knows no developer is told of a system"
    labels = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "modalities": ["text"], "prompt_cache_key": "k"}
    assert ask(server, **labels)["choices"][0]["message"]["role"] == "assistant"
    unasked = (
        "audio",
        "prediction",
        "web_search_options",
        "functions",
        "function_call",
        "verbosity",
        "prompt_cache_retention",
        "tools",
        "tool_choice",
        "stop",
    )
    assert ask(server, **dict.fromkeys(unasked))["choices"] == ask(server)["choices"], "null asks for nothing"
    nameless = [*CHAT, {"role": "tool", "content": "a dog"}]
    assert ask(server, messages=nameless, return_token_ids=True)["prompt_token_ids"] == prompt_ids(server, nameless)
    tools = ask(server, tools=[TOOL], tool_choice="none", return_token_ids=True)
    assert tools["prompt_token_ids"] == prompt_ids(server, tools=[TOOL])


def test_a_prediction_changes_the_usage_alone(server: Running) -> None:
    words = server.llm.tokenizer.encode(" the quick brown fox", add_special_tokens=False)  # so that the text gives the same tokens again
    asked = {"max_tokens": 40, "allowed_token_ids": words, "logprobs": True, "seed": 3}
    plain = ask(server, **asked)
    text = plain["choices"][0]["message"]["content"]
    for content in (text, [{"type": "text", "text": text[:9]}, {"type": "text", "text": text[9:]}]):
        told = ask(server, **asked, prediction={"type": "content", "content": content})
        details = told["usage"].pop("completion_tokens_details")
        assert told["choices"] == plain["choices"] and "completion_tokens_details" not in plain["usage"]
        assert details["accepted_prediction_tokens"] > 0 and details["rejected_prediction_tokens"] >= 0


def test_a_long_prediction_is_tokenised_beside_the_event_loop(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, encode = [], TextTokenizer.encode

    def noting(self: TextTokenizer, text: str, **more: Any) -> list[int]:
        threads.append(threading.current_thread())
        return encode(self, text, **more)

    monkeypatch.setattr(TextTokenizer, "encode", noting)
    for text, status in (("the fox", 200), ("the quick brown fox " * 1000, 400)):
        threads.clear()
        answer = server.post("/v1/chat/completions", {"messages": CHAT, "max_tokens": 2, "prediction": {"type": "content", "content": text}})
        assert answer.status_code == status and threads, answer.text
    assert server.thread not in threads and answer.json()["error"]["param"] == "prediction"


def test_values_for_the_template(server: Running) -> None:
    shout = ask(server, chat_template_kwargs={"shout": "HEY"}, return_token_ids=True)
    assert shout["prompt_token_ids"] == prompt_ids(server, shout="HEY")
    bare = ask(server, add_generation_prompt=False, return_token_ids=True)
    assert bare["prompt_token_ids"] == prompt_ids(server, add_generation_prompt=False)
    begun = [*CHAT, {"role": "assistant", "content": "the fox"}]
    went_on = ask(server, messages=begun, continue_final_message=True, return_token_ids=True)
    wanted = prompt_ids(server, begun, add_generation_prompt=False, continue_final_message=True)
    assert went_on["prompt_token_ids"] == wanted and server.llm.tokenizer.decode(wanted).endswith("the fox")


def test_one_reasoning_effort_reaches_the_template(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.llm.tokenizer, "chat_template", "{{ reasoning_effort }}: {{ messages[1].content }}")
    low, high = {"reasoning_effort": "low"}, {"reasoning_effort": "high"}
    for asked in (low, {"chat_template_kwargs": low}, low | {"chat_template_kwargs": low}):
        assert ask(server, **asked, return_token_ids=True)["prompt_token_ids"] == prompt_ids(server, **low)
    answer = server.post("/v1/chat/completions", {"messages": CHAT, **low, "chat_template_kwargs": high})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "reasoning_effort", answer.text
    answer = server.post("/v1/responses", {"input": "x", "reasoning": {"effort": "low"}, "chat_template_kwargs": high})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "reasoning.effort", answer.text


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("chat_template_kwargs.messages", {"chat_template_kwargs": {"messages": []}}),
        ("chat_template_kwargs.bos_token", {"chat_template_kwargs": {"bos_token": "x"}}),
        ("chat_template_kwargs.enable_thinking", {"chat_template_kwargs": {"shout": "HEY", "enable_thinking": False}}),
        ("chat_template", {"chat_template": "{{ 1 }}"}),
        ("reasoning_effort", {"reasoning_effort": "low"}),
        ("add_generation_prompt", {"add_generation_prompt": True, "continue_final_message": True}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("max_completion_tokens", {"max_tokens": 3, "max_completion_tokens": 4}),
        ("messages", {"messages": []}),
        ("messages.0.role", {"messages": [{"role": "wizard", "content": "x"}]}),
        ("messages.0.content", {"messages": [{"role": "user"}]}),
        ("messages.0.content.0.type", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
        ("messages.0.audio", {"messages": [{"role": "user", "content": "x", "audio": {"id": "y"}}]}),
        ("messages.0.tool_calls.0.function.arguments", {"messages": [
            {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "[1]"}}]}]}),
        ("store", {"store": True}),
        ("prediction.type", {"prediction": {"type": "text", "content": "x"}}),
        ("modalities.0", {"modalities": ["audio"]}),
        ("stream_options.include_everything", {"stream": True, "stream_options": {"include_everything": True}}),
    ],
)  # fmt: skip
def test_what_is_refused(server: Running, param: str, body: dict[str, Any]) -> None:
    answer = server.post("/v1/chat/completions", {"messages": CHAT, "max_tokens": 2} | body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text


def test_token_ids_and_prompt_logprobs(server: Running) -> None:
    told = ask(server, return_token_ids=True, prompt_logprobs=1, n=2)
    (wanted,) = server.llm.generate([told["prompt_token_ids"]], SamplingParams(max_tokens=6, seed=3, n=2, prompt_logprobs=1))
    assert [choice["token_ids"] for choice in told["choices"]] == [one.token_ids for one in wanted.outputs]
    assert len(told["prompt_logprobs"]) == len(told["prompt_token_ids"])
    streamed = events(
        server.post("/v1/chat/completions", {"messages": CHAT, "max_tokens": 6, "seed": 3, "stream": True, "return_token_ids": True}).text
    )
    assert streamed[0]["prompt_token_ids"] == told["prompt_token_ids"]
    assert [i for part in streamed for i in part["choices"][0].get("token_ids", [])] == told["choices"][0]["token_ids"]


def test_tokenize_and_back(server: Running) -> None:
    text = "the quick brown fox — ünïcode 🦊"
    told = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert told["tokens"] == server.llm.tokenizer(text).input_ids and told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert told["max_model_len"] == 2048 and told["token_strs"][0] == "the"
    assert server.post("/detokenize", {"tokens": told["tokens"]}).json() == {"prompt": text}
    assert server.post("/detokenize", {"tokens": [1, 70], "skip_special_tokens": True}).json()["prompt"] == server.llm.tokenizer.decode([70])
    chat = server.post("/tokenize", {"messages": CHAT, "model": "tiny"}).json()
    assert chat["tokens"] == prompt_ids(server)
    for body, param in (
        ({}, "prompt"),
        ({"prompt": "x", "messages": CHAT}, "prompt"),
        ({"prompt": "x", "tools": []}, "tools"),
        ({"prompt": "\ud800"}, "prompt"),
    ):
        answer = server.post("/tokenize", headers={"content-type": "application/json"}, content=__import__("json").dumps(body))
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
    assert server.post("/detokenize", {"tokens": [10**6]}).json()["error"]["param"] == "tokens"


def test_of_several_templates_clients_are_told_the_default(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    for template, told in (({"default": "d", "tool_use": "t"}, "d"), ({"rag": "r"}, None), ("one", "one")):
        monkeypatch.setattr(server.llm.tokenizer, "chat_template", template)
        assert server.get("/tokenizer_info").json()["chat_template"] == told


def test_models(server: Running, client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert (card.id, card.owned_by, card.object) == ("tiny", "quire", "model") and card.created > 10**9
    assert client.models.retrieve("tiny").model_dump()["max_model_len"] == 2048
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("a/b")


def test_a_model_without_a_template_or_a_tokenizer(tmp_path: Any) -> None:
    folder = make(tmp_path / "bare", "llama")
    with running(lambda: LLM(folder, cache_bytes=2**20)) as server:
        for path in ("/v1/chat/completions", "/tokenize"):
            answer = server.post(path, {"messages": CHAT})
            assert answer.status_code == 400 and answer.json()["error"]["code"] == "no_chat_template", answer.text
        assert server.post("/tokenize", {"prompt": "x"}).json()["error"]["code"] == "no_tokenizer"
        assert server.post("/v1/completions", {"prompt": "x"}).json()["error"]["param"] == "prompt"
        told = server.complete(prompt=[5, 6, 7], max_tokens=3, return_token_ids=True, logprobs=1, echo=True)["choices"][0]
        assert len(told["token_ids"]) == 3 and told["text"] == "" and told["logprobs"] is None
        server.serving.close()
    tokenizer().save_pretrained(folder)
    with running(lambda: LLM(folder, cache_bytes=2**20)) as server:
        assert server.post("/v1/chat/completions", {"messages": CHAT}).json()["error"]["code"] == "no_chat_template"
        server.serving.close()
