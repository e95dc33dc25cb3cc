"""POST /v1/completions, against the engine asked directly."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from quire import LLM, SamplingParams
from quire.server.infill import TOKENS, infilled
from tests.engine.conftest import tokenizer
from tests.server.conftest import KEY, OTHER_KEY, Running, running
from tests.tensors.checkpoints import make

FOX = "the quick brown fox jumps over"
GREEDY: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}}
ASKED: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 12},
    {"temperature": 0.8, "seed": 5, "max_tokens": 12},
    {"temperature": 1.5, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "seed": 2**63 + 1, "max_tokens": 10},
    {"temperature": 1, "seed": 1, "presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.3, "max_tokens": 12},
    {"temperature": 1, "seed": 3, "ignore_eos": True, "min_tokens": 6, "stop_token_ids": list(range(60, 120)), "max_tokens": 12},
    {"temperature": 1, "seed": 4, "allowed_token_ids": [70, 71, 72], "max_tokens": 6},
    {"temperature": 0, "logit_bias": {"70": 100, "71": -100}, "max_tokens": 6},
    {"temperature": 1, "seed": 6, "n": 3, "max_tokens": 5},
    {"temperature": 1, "seed": 7, "n": 2, "best_of": 4, "max_tokens": 5},
    {"temperature": 1, "seed": 8, "stop": ["a", "e", "o"], "max_tokens": 40},
    {"temperature": 1, "seed": 8, "stop": "e", "include_stop_str_in_output": True, "max_tokens": 40},
    {"temperature": 1, "seed": 9, "skip_special_tokens": False, "logit_bias": {"1": 8.5}, "max_tokens": 12},
]


def params(asked: dict[str, Any]) -> SamplingParams:
    given = dict(asked)
    if "include_stop_str_in_output" in given:
        given["include_stop_in_output"] = given.pop("include_stop_str_in_output")
    if "logit_bias" in given:
        given["logit_bias"] = {int(i): bias for i, bias in given["logit_bias"].items()}
    return SamplingParams(**given)


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, which ended as it should."""
    parts = text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""], parts[-3:]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: "-".join(asked))
def test_the_same_bits_as_from_the_library(server: Running, asked: dict[str, Any]) -> None:
    (wanted,) = server.llm.generate(FOX, params(asked))
    told = server.complete(prompt=FOX, return_token_ids=True, logprobs=0, **asked)
    choices = told["choices"]
    (scored,) = server.llm.generate(FOX, params(asked | {"logprobs": 0}))
    (all_of_it,) = server.llm.generate(FOX, replace(params(asked), n=asked.get("best_of", asked.get("n", 1)), best_of=None))
    assert told["usage"]["completion_tokens"] == sum(len(one.token_ids) for one in all_of_it.outputs)  # those left out were drawn, too
    assert [choice["index"] for choice in choices] == list(range(len(wanted.outputs)))
    for choice, one, with_logprobs in zip(choices, wanted.outputs, scored.outputs, strict=True):
        assert (choice["text"], choice["token_ids"], choice["finish_reason"]) == (one.text, one.token_ids, one.finish_reason)
        assert choice["stop_reason"] == one.stop_reason
        assert choice["logprobs"]["token_logprobs"] == with_logprobs.logprobs
    if "best_of" in asked:
        return
    streamed = events(server.post("/v1/completions", {"prompt": FOX, "stream": True, "return_token_ids": True, **asked}).text)
    for choice in choices:
        own = [part["choices"][0] for part in streamed if part["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert [i for part in own for i in part["token_ids"]] == choice["token_ids"]
        assert [part["finish_reason"] for part in own if part["finish_reason"]] == [choice["finish_reason"]]


def test_several_prompts_in_order_and_interleaved(server: Running, client: openai.OpenAI) -> None:
    prompts: list[Any] = [FOX, [5, 6, 7, 8], "pack my box", [9]]
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": prompts,
        "n": 2,
        "max_tokens": 40,  # of few steps all may be there before the first piece is sent
        "temperature": 1,
        "seed": 11,
        "extra_body": {"ignore_eos": True},
    }
    whole = client.completions.create(**asked)
    wanted = server.llm.generate(prompts, SamplingParams(n=2, max_tokens=40, seed=11, ignore_eos=True))
    assert [choice.index for choice in whole.choices] == list(range(8))
    assert [choice.text for choice in whole.choices] == [one.text for output in wanted for one in output.outputs]
    assert whole.usage is not None and whole.usage.completion_tokens == 8 * 40
    assert whole.usage.prompt_tokens == sum(len(output.prompt_token_ids) for output in wanted)
    parts = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    order = [part.choices[0].index for part in parts if part.choices]
    assert order != sorted(order), "no choice waits for another"
    assert parts[-1].choices == [] and parts[-1].usage is not None and parts[-1].usage.completion_tokens == 8 * 40
    assert all(part.usage is None for part in parts[:-1])
    for choice in whole.choices:
        assert "".join(part.choices[0].text for part in parts if part.choices and part.choices[0].index == choice.index) == choice.text


def test_cached_tokens_are_told_and_private(server: Running) -> None:
    client, other = server.client(), server.client(OTHER_KEY)
    asked = GREEDY | {"prompt": "five dozen liquor jugs " * 6}

    def cached(who: openai.OpenAI, salt: str | None = None) -> int:
        answer = who.completions.create(**(asked | {"extra_body": {"ignore_eos": True} | ({} if salt is None else {"cache_salt": salt})}))
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    assert cached(client) == 0
    assert cached(client) > 20
    assert cached(other) == 0
    assert cached(client, "salt") == cached(other, "salt") == 0
    assert cached(client, "salt") > 20


def test_logprobs(server: Running) -> None:
    (choice,) = server.complete(prompt=FOX, max_tokens=8, temperature=1, seed=3, logprobs=3)["choices"]
    (wanted,) = server.llm.generate(FOX, SamplingParams(max_tokens=8, seed=3, logprobs=3))
    told, one = choice["logprobs"], wanted.outputs[0]
    assert told["token_logprobs"] == one.logprobs and one.top_logprobs is not None
    for token, logprob, named, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], one.top_logprobs, strict=True):
        assert named[token] == logprob and max(named.values()) == top[0].logprob
        assert 3 <= len(named) <= 4
    streamed = events(server.post("/v1/completions", {"prompt": FOX, "max_tokens": 8, "seed": 3, "logprobs": 3, "stream": True}).text)
    parts = [part["choices"][0]["logprobs"] for part in streamed if part["choices"][0]["logprobs"]]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for part in parts for value in part[name]] == told[name], name


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_scores_the_prompt_as_an_evaluation_harness_asks_for_it(server: Running, max_tokens: int) -> None:
    ids = server.llm.tokenizer("the lazy dog jumps over five boxes").input_ids
    asked = {"prompt": [ids, ids[:-2]], "max_tokens": max_tokens, "echo": True, "logprobs": 1, "temperature": 0, "seed": 1234}
    answer = server.complete(**asked)
    wanted = server.llm.generate([ids, ids[:-2]], SamplingParams(max_tokens=max_tokens, temperature=0, prompt_logprobs=1, logprobs=1))
    for choice, output in zip(answer["choices"], wanted, strict=True):
        told, drawn = choice["logprobs"], output.outputs[0]
        assert output.prompt_logprobs is not None and drawn.logprobs is not None
        assert told["token_logprobs"] == output.prompt_logprobs + drawn.logprobs
        assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
        assert len(told["tokens"]) == len(output.prompt_token_ids) + max_tokens == len(told["text_offset"])
        assert choice["text"] == server.llm.tokenizer.decode(output.prompt_token_ids) + drawn.text
        assert drawn.finish_reason == choice["finish_reason"] == "length"
        for token, offset in list(zip(told["tokens"], told["text_offset"], strict=True))[: len(output.prompt_token_ids)]:
            assert choice["text"][offset : offset + len(token)] == token
        for logprob, named in list(zip(told["token_logprobs"], told["top_logprobs"], strict=True))[1:]:
            assert logprob <= max(named.values())


def test_echo_without_logprobs_and_in_a_stream(server: Running) -> None:
    whole = server.complete(prompt=[FOX, "pack"], max_tokens=4, temperature=0, echo=True)["choices"]
    assert [choice["text"].startswith(prompt) for choice, prompt in zip(whole, (FOX, "pack"), strict=True)] == [True, True]
    streamed = events(server.post("/v1/completions", {"prompt": [FOX, "pack"], "max_tokens": 4, "temperature": 0, "echo": True, "stream": True}).text)
    for choice in whole:
        assert "".join(part["choices"][0]["text"] for part in streamed if part["choices"][0]["index"] == choice["index"]) == choice["text"]
    refused = server.post("/v1/completions", {"prompt": FOX, "echo": True, "logprobs": 1, "stream": True})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "stream"


def test_prompt_logprobs_and_token_ids(server: Running) -> None:
    (choice,) = server.complete(prompt=FOX, max_tokens=1, prompt_logprobs=2, return_token_ids=True)["choices"]
    (output,) = server.llm.generate(FOX, SamplingParams(max_tokens=1, prompt_logprobs=2))
    assert choice["prompt_token_ids"] == output.prompt_token_ids and choice["prompt_logprobs"][0] is None
    assert output.prompt_logprobs is not None
    for token_id, told, logprob in zip(output.prompt_token_ids[1:], choice["prompt_logprobs"][1:], output.prompt_logprobs[1:], strict=True):
        assert told[str(token_id)]["logprob"] == logprob and 2 <= len(told) <= 3
        assert {one["rank"] for one in told.values()} >= {1, 2}


def test_defaults_are_those_of_openai(server: Running) -> None:
    answer = server.complete(prompt=FOX, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 16 and answer["object"] == "text_completion" and answer["model"] == "tiny"
    nothing = dict.fromkeys(("max_tokens", "temperature", "n", "stop", "seed", "logit_bias", "stream", "echo", "logprobs", "suffix", "user"))
    assert server.complete(prompt=FOX, ignore_eos=True, **nothing)["usage"]["completion_tokens"] == 16


def test_many_clients_at_once(server: Running) -> None:
    """The asynchronous client, streaming and not, mixed; everybody gets what the engine gives alone."""
    prompts = [f"pack my box with {word}" for word in ("five", "dozen", "liquor", "jugs", "the", "lazy", "dog", "fox")] * 4
    wanted = server.llm.generate(prompts, SamplingParams(max_tokens=8, temperature=0.9, seed=1))

    async def one(client: openai.AsyncOpenAI, prompt: str, stream: bool) -> str:
        asked: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0.9, "seed": 1}
        if not stream:
            return (await client.completions.create(**asked)).choices[0].text
        return "".join([part.choices[0].text async for part in await client.completions.create(**asked, stream=True)])

    async def everyone() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(one(client, prompt, i % 2 == 0) for i, prompt in enumerate(prompts)))

    assert asyncio.run(everyone()) == [output.outputs[0].text for output in wanted]


def test_a_long_text_is_tokenised_beside_the_loop(server: Running) -> None:
    text = "the quick brown fox " * 1500
    refused = server.post("/v1/completions", {"prompt": text})
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["code"] == "context_length_exceeded" and error["param"] == "prompt"
    tokens = len(server.llm.tokenizer(text).input_ids)
    assert all(str(number) in error["message"] for number in (2048, f"({tokens} + 1 = {tokens + 1})")) and "quick" not in error["message"]


def test_a_number_of_tokens_that_nobody_asked_for_is_what_fits(server: Running) -> None:
    context = server.llm.info.context_len
    told = server.complete(prompt=[5] * (context - 3), ignore_eos=True)
    assert told["choices"][0]["finish_reason"] == "length" and told["usage"]["completion_tokens"] == 3
    assert server.complete(prompt=[5] * 9, ignore_eos=True)["usage"]["completion_tokens"] == 16
    for asked in ({"prompt": [5] * (context - 3), "max_tokens": 16}, {"prompt": [5] * context}):
        assert server.post("/v1/completions", asked).json()["error"]["code"] == "context_length_exceeded"
    refused = server.post("/v1/completions", {"prompt": [5] * (context - 3), "min_tokens": 4}).json()["error"]
    assert refused["param"] == "min_tokens" and "min_tokens=4: must be at most 3" in refused["message"]


def test_suffix_needs_tokens_for_it(server: Running) -> None:
    refused = server.post("/v1/completions", {"prompt": FOX, "suffix": "dog"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "suffix"


@pytest.mark.parametrize("names", TOKENS, ids=lambda names: names[0])
def test_filling_in_the_middle(names: tuple[str, str, str]) -> None:
    hf = tokenizer()
    hf.add_tokens(list(names), special_tokens=True)
    begin, hole, end = (hf.convert_tokens_to_ids(name) for name in names)
    fox, dog = hf("the fox").input_ids, hf("the dog").input_ids
    assert infilled(hf, "the fox", "the dog") == infilled(hf, fox, "the dog") == [begin, *fox, hole, *dog, end]


def test_an_echo_is_the_prompt_without_what_comes_after(tmp_path: Path) -> None:
    folder, hf = make(tmp_path / "tiny", "llama"), tokenizer()
    hf.add_tokens(list(TOKENS[0]), special_tokens=True)
    hf.save_pretrained(folder)
    with running(lambda: LLM(folder, page_size=4, cache_bytes=2**20, num_threads=1)) as one:
        asked: dict[str, Any] = {"prompt": "the fox", "suffix": "the dog", "echo": True, "max_tokens": 3, "temperature": 0}
        (whole,) = one.complete(**asked)["choices"]
        streamed = events(one.post("/v1/completions", asked | {"stream": True}).text)
        assert whole["text"] == "".join(part["choices"][0]["text"] for part in streamed)
        assert whole["text"].startswith("the fox") and "the dog" not in whole["text"]
        (scored,) = one.complete(**asked, logprobs=0)["choices"]
        assert scored["text"] == whole["text"] and scored["logprobs"]["text_offset"][-3] == len("the fox")
        one.serving.close()


def test_what_the_answer_is_called(server: Running) -> None:
    answer = server.post("/v1/completions", {"prompt": FOX, "max_tokens": 2})
    assert answer.headers["x-request-id"] == answer.json()["id"] and answer.json()["id"].startswith("cmpl-")
    with httpx.stream(
        "POST", server.url + "/v1/completions", json={"prompt": FOX, "stream": True}, headers={"authorization": f"Bearer {KEY}"}
    ) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert events(stream.read().decode())[0]["id"] == stream.headers["x-request-id"]
