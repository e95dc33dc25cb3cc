"""POST /v1/embeddings, driven by the openai client."""

from __future__ import annotations

from typing import Any

import openai
import pytest
import torch

from tests.server.conftest import Running

TEXTS = ["the lazy dog", "the quick brown fox jumps", "x"]


def vectors(answer: Any) -> torch.Tensor:
    assert [one.index for one in answer.data] == list(range(len(answer.data)))
    return torch.tensor([one.embedding for one in answer.data], dtype=torch.float32)


@pytest.mark.parametrize("pooling", [None, "mean", "last"])
def test_the_same_bits_as_from_the_library(server: Running, client: openai.OpenAI, pooling: Any) -> None:
    more: dict[str, Any] = {"extra_body": {"pooling": pooling}} if pooling else {}
    wanted = server.llm.embed(TEXTS, pooling=pooling or "mean")
    answer = client.embeddings.create(model="tiny", input=TEXTS, **more)  # which asks for base64
    assert vectors(answer).equal(wanted)
    assert vectors(client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float", **more)).equal(wanted)
    num_tokens = sum(len(server.llm.tokenizer(text).input_ids) for text in TEXTS)
    assert (answer.object, answer.model, answer.usage.prompt_tokens, answer.usage.total_tokens) == ("list", "tiny", num_tokens, num_tokens)


def test_every_kind_of_input(server: Running, client: openai.OpenAI) -> None:
    ids = server.llm.tokenizer(TEXTS[0]).input_ids
    wanted = server.llm.embed(TEXTS[0])
    size = wanted.shape[1]
    for given in (TEXTS[0], ids, [ids]):
        assert vectors(client.embeddings.create(model="tiny", input=given, dimensions=size, user="me")).equal(wanted)
    plain = vectors(client.embeddings.create(model="tiny", input=ids, extra_body={"normalize": False}))
    assert plain.equal(server.llm.embed([ids], normalize=False)) and not plain.equal(wanted)


def test_a_hit_shows_in_the_usage(server: Running) -> None:
    body = {"input": "the lazy dog " * 10, "pooling": "last", "cache_salt": "of this test"}
    first, again = (server.post("/v1/embeddings", body).json() for _ in range(2))
    assert first["data"] == again["data"] and first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert 0 < again["usage"]["prompt_tokens_details"]["cached_tokens"] < again["usage"]["prompt_tokens"]
