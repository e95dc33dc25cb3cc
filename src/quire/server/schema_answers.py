"""What answers hold, for the OpenAPI document. Answers are made as plain dicts; that they are as they are declared here is for tests to see, not
for each answer to be checked again."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

REF = "#/components/schemas/{model}"


class Answer(BaseModel):
    """A part of an answer."""

    model_config = ConfigDict(extra="forbid")


class ErrorObject(Answer):
    """What went wrong, for people and for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(Answer):
    """The one shape of errors, in a stream too."""

    error: ErrorObject


class CachedTokens(Answer):
    """Prompt tokens that were not computed again."""

    cached_tokens: int


class PredictedTokens(Answer):
    """How many guessed tokens were right, and how many were wrong."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(Answer):
    """What a request cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: PredictedTokens | None = Field(default=None, description="Where tokens were guessed.")


class PromptLogprob(Answer):
    """A token that may stand at a place of the prompt."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None] | None


class CompletionLogprobs(Answer):
    """One entry a token in each list."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Answer):
    """A text, or in a stream the next part of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(Answer):
    """The answer of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(Answer):
    """An event of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class CalledFunction(Answer):
    """What is called, with arguments as JSON text; in a stream the next part of it."""

    name: str | None = None
    arguments: str


class Call(Answer):
    """A tool call. In a stream `index` says which one goes on, and the others come with its first part alone."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class ChatMessage(Answer):
    """What the model said."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    tool_calls: list[Call] | None = None


class ChatDelta(Answer):
    """The next part of what the model says."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[Call] | None = None


class LikelyToken(Answer):
    """A token as text and as its exact bytes."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(LikelyToken):
    """A token that was drawn, with the likeliest in its place."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(Answer):
    """One entry a token."""

    content: list[ChatToken]
    refusal: None


ChatFinish = Literal["stop", "length", "tool_calls"]


class ChatChoice(Answer):
    """An answer to a chat."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinish
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class ChatChunkChoice(Answer):
    """The next part of an answer to a chat."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinish | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatCompletion(Answer):
    """The answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs = None
    prompt_token_ids: list[int] | None = None


class ChatCompletionChunk(Answer):
    """An event of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class Embedding(Answer):
    """The vector of one text: numbers, or the base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Answer):
    """What embeddings cost."""

    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Embeddings(Answer):
    """The answer of POST /v1/embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


def answers(model: type[BaseModel], event: dict[str, Any] | None = None) -> dict[int | str, dict[str, Any]]:
    """A route's `responses`: this, or events of that schema if there is a stream."""
    content = {} if event is None else {"content": {"text/event-stream": {"itemSchema": event}}}
    return {200: {"model": model, "description": "The answer.", **content}}


def chunks_of(model: type[BaseModel]) -> dict[str, Any]:
    """The schema of the events of an OpenAI stream: chunks and at last [DONE], or an error."""
    told = {"anyOf": [{"$ref": REF.format(model=one.__name__)} for one in (model, ErrorEnvelope)]}
    data = {"anyOf": [{"const": "[DONE]"}, {"type": "string", "contentMediaType": "application/json", "contentSchema": told}]}
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}
