"""POST /v1/embeddings: one vector for each text."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field, PlainValidator, WithJsonSchema

from quire.outputs import RequestOutput
from quire.params import Pooling, SamplingParams
from quire.server.completions import PROMPT_SCHEMA
from quire.server.errors import refused
from quire.server.limits import MAX_LABEL_CHARS
from quire.server.models import check_model
from quire.server.runs import Job, start_run
from quire.server.schema import Asked, Label, as_prompts
from quire.server.schema_answers import Embeddings, answers
from quire.server.serving import serving_of
from quire.server.sse import answer_at_end, new_id
from quire.server.structure import named_as

ENDPOINT = "embeddings"
Texts = Annotated[list[str | list[int]], PlainValidator(as_prompts), WithJsonSchema(PROMPT_SCHEMA)]
router = APIRouter()


class EmbeddingRequest(Asked):
    """The body of POST /v1/embeddings."""

    input: Texts
    model: Annotated[str, Field(max_length=MAX_LABEL_CHARS)] | None = Field(default=None, description="The served model's name; it may be left out.")
    encoding_format: Literal["float", "base64"] | None = Field(default=None, description="base64 is of little-endian float32.")
    dimensions: int | None = Field(default=None, ge=1, lt=2**31, description="The model's own number, or left out: vectors are not cut.")
    user: Label | None = Field(default=None, description="A label. Nothing depends on it.")
    pooling: Pooling | None = Field(default=None, description="Extension. The mean of all tokens' states, so where not given, or the last one's.")
    normalize: bool | None = Field(default=None, description="Extension. Vectors of length 1, so where not given.")
    priority: int | None = Field(default=None, ge=-(2**31), lt=2**31, description="Extension. Higher goes first.")
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_LABEL_CHARS)] | None = Field(
        default=None, description="Extension. Cached pages are shared among this key's requests with the same salt alone."
    )


@router.post("/v1/embeddings", tags=["OpenAI"], responses=answers(Embeddings))
async def embeddings(request: Request, asked: EmbeddingRequest) -> Response:
    """The model's final hidden states of each text, pooled to one vector."""
    serving = serving_of(request)
    size = serving.engine().info.hidden_size
    check_model(serving, asked.model)
    if asked.dimensions not in (None, size):
        raise refused("dimensions", f"must be {size} or left out: this model's vectors are not made to be cut")
    params = SamplingParams(max_tokens=0, pooling=asked.pooling or "mean")
    with named_as({"prompt": "input"}):
        run = await start_run(
            request, ENDPOINT, new_id("embd"), [Job(text, params) for text in asked.input], priority=asked.priority or 0, cache_salt=asked.cache_salt
        )
    return await answer_at_end(request, run, lambda outputs: _told(asked, serving.settings.model, outputs))


def _told(asked: EmbeddingRequest, model: str, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    from quire.engine.pooling import normalized  # brings torch: a server listens before that

    data = []
    for i, output in enumerate(outputs):
        vector = output.embedding if asked.normalize is False else normalized(output.embedding)
        told = base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode() if asked.encoding_format == "base64" else vector.tolist()
        data.append({"object": "embedding", "index": i, "embedding": told})
    tokens = sum(output.receipt.prompt_tokens for output in outputs)
    details = {"cached_tokens": sum(output.receipt.cached_tokens for output in outputs)}
    return {
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "prompt_tokens_details": details},
    }
