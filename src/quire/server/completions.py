"""POST /v1/completions: text that goes on where the prompt ends."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field, PlainValidator, WithJsonSchema

from quire.outputs import Completion, RequestOutput, TokenEvent
from quire.params import Implied, SamplingParams
from quire.server.errors import refused
from quire.server.infill import infilled
from quire.server.limits import MAX_CHOICES, MAX_N, MAX_TOP_LOGPROBS
from quire.server.models import check_model
from quire.server.runs import Job, Run, start_run
from quire.server.sampling import params_of
from quire.server.schema import ResponseFormat, Sampling, as_prompts
from quire.server.schema_answers import Completion as Completed
from quire.server.schema_answers import CompletionChunk, answers, chunks_of
from quire.server.serving import serving_of
from quire.server.sse import Chunks, EventStream, answer_at_end, event, new_id
from quire.server.structure import named_as, structure_names, structure_of
from quire.server.token_texts import Offsets, TokenTexts
from quire.server.usage import completion_logprobs, prompt_logprobs, usage_of

DEFAULT_MAX_TOKENS = Implied(16)  # OpenAI's
ENDPOINT = "completions"
PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "integer"}, "minItems": 1},
        {
            "type": "array",
            "items": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}, "minItems": 1}]},
            "minItems": 1,
        },
    ]
}
Prompts = Annotated[list[str | list[int]], PlainValidator(as_prompts), WithJsonSchema(PROMPT_SCHEMA)]
router = APIRouter()


class CompletionRequest(Sampling):
    """The body of POST /v1/completions."""

    prompt: Prompts
    max_tokens: int | None = Field(default=None, ge=0, lt=2**31, description="16 where not given, or what fits; 0 with echo scores the prompt alone.")
    best_of: int | None = Field(default=None, ge=1, le=MAX_N, description="Draw this many and give back the n likeliest; not in a stream.")
    echo: bool | None = Field(default=None, description="Begin the text with the prompt, and the logprobs with the prompt's.")
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS, description="Logprobs of tokens drawn and of this many likeliest.")
    suffix: str | None = Field(default=None, description="What comes after the text; for models with fill-in-the-middle tokens.")
    response_format: ResponseFormat | None = None

    @property
    def num_drawn(self) -> int:
        """Choices that are drawn for each prompt, of which `num_choices` are given back."""
        return self.best_of or self.num_choices

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's logprobs are part of the choices' own."""
        return bool(self.echo) and (self.logprobs is not None or self.max_tokens == 0)


@router.post("/v1/completions", tags=["OpenAI"], responses=answers(Completed, chunks_of(CompletionChunk)))
async def completions(request: Request, asked: CompletionRequest) -> Response:
    """Continue one prompt or several. Choice `i` of prompt `p` has the index `p * n + i`."""
    serving = serving_of(request)
    llm = serving.engine()
    check_model(serving, asked.model)
    prompts = asked.prompt
    if asked.best_of is not None and asked.best_of < asked.num_choices:
        raise refused("best_of", f"must be from n={asked.num_choices} to {MAX_N}")
    if len(prompts) * asked.num_drawn > MAX_CHOICES:
        which = "best_of" if asked.num_drawn > asked.num_choices else "n"
        raise refused(which, f"must be so that there are at most {MAX_CHOICES} choices of all prompts together")
    if asked.suffix is not None:
        prompts = [infilled(llm.tokenizer, prompt, asked.suffix) for prompt in prompts]
    with named_as(structure_names(asked)):
        params = _params(asked)
        jobs = [Job(prompt, params) for prompt in prompts]
        run = await start_run(request, ENDPOINT, new_id("cmpl"), jobs, priority=asked.priority or 0, cache_salt=asked.cache_salt)
    told = Told(asked, run, serving.settings.model, serving.texts)
    return EventStream(run, told.chunks()) if asked.stream else await answer_at_end(request, run, told.whole)


def _params(asked: CompletionRequest) -> SamplingParams:
    max_tokens = DEFAULT_MAX_TOKENS if asked.max_tokens is None else asked.max_tokens
    scored = asked.prompt_logprobs
    if asked.scores_prompt:
        scored = max(asked.logprobs or 0, scored or 0)
    if asked.stream:
        if scored is not None:
            raise refused("stream", "must be false with prompt_logprobs, or echo with logprobs: a prompt's are known when it has run")
        if asked.num_drawn > asked.num_choices:
            raise refused("best_of", "must be left out of a stream: which are the best is known at the end")
    return params_of(
        asked,
        max_tokens=max_tokens,
        logprobs=asked.logprobs,
        prompt_logprobs=scored,
        best_of=asked.best_of if asked.num_drawn > asked.num_choices else None,
        structured=structure_of(asked.response_format, asked.structured_outputs),
    )


class Told:
    """What is said of one run."""

    def __init__(self, asked: CompletionRequest, run: Run, model: str, texts: TokenTexts | None) -> None:
        self._asked, self._run, self._texts = asked, run, texts
        self._head = {"id": run.name, "object": "text_completion", "created": int(time.time()), "model": model}
        self._skip = asked.skip_special_tokens is not False
        self._offsets: dict[int, Offsets] = {}

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The answer at the end."""
        choices = [self._choice(p, output, completion) for p, output in enumerate(outputs) for completion in output.outputs]
        return {**self._head, "choices": choices, "usage": usage_of(outputs)}

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The events of a stream."""
        asked, n, outputs = self._asked, self._asked.num_choices, []
        chunks = Chunks(self._head, {"usage": None} if asked.include_usage else {})
        if asked.echo:
            for p, prompt in enumerate(asked.prompt):
                for i in range(n):
                    yield chunks.of(self._bare(p * n + i, self._prompt_text(prompt)))
        async for p, news in self._run.events():
            if news.text or news.token_ids or news.finish_reason:
                yield chunks.of(self._delta(p, news))
            if news.output is not None:
                outputs.append(news.output)
        if asked.include_usage:
            yield event({**self._head, "choices": [], "usage": usage_of(outputs)})

    def _choice(self, p: int, output: RequestOutput, completion: Completion) -> dict[str, Any]:
        asked = self._asked
        echoed = self._prompt_text(asked.prompt[p]) if asked.echo else ""
        told = self._bare(p * asked.num_choices + completion.index, echoed + completion.text)
        told |= {"finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}
        if asked.logprobs is not None and self._texts is not None and completion.logprobs is not None:
            ids, logprobs = completion.token_ids, list[float | None](completion.logprobs)
            top: list[Any] | None = list(completion.top_logprobs or []) if asked.logprobs else None
            offsets = self._offsets_of(ids, len(echoed))
            if asked.echo and output.prompt_logprobs is not None:
                offsets = self._offsets_of(output.prompt_token_ids, 0, echoed) + offsets
                ids, logprobs = output.prompt_token_ids + ids, output.prompt_logprobs + logprobs
                if top is not None:
                    top = [*(likeliest and likeliest[: asked.logprobs] for likeliest in output.prompt_top_logprobs or []), *top]
            told["logprobs"] = completion_logprobs(self._texts, ids, logprobs, top, offsets)
        if asked.prompt_logprobs is not None and self._texts is not None:
            told["prompt_logprobs"] = prompt_logprobs(self._texts, output)
        if asked.return_token_ids:
            told |= {"token_ids": completion.token_ids, "prompt_token_ids": output.prompt_token_ids}
        return told

    def _delta(self, p: int, news: TokenEvent) -> dict[str, Any]:
        asked, index = self._asked, p * self._asked.num_choices + news.index
        told = self._bare(index, news.text)
        told |= {"finish_reason": news.finish_reason, "stop_reason": news.stop_reason}
        if asked.logprobs is not None and self._texts is not None and news.token_ids and news.logprobs is not None:
            if index not in self._offsets:
                self._offsets[index] = Offsets(self._texts, len(self._prompt_text(asked.prompt[p])) if asked.echo else 0, self._skip)
            top = news.top_logprobs if asked.logprobs else None
            offsets = [self._offsets[index].next(token_id) for token_id in news.token_ids]
            told["logprobs"] = completion_logprobs(self._texts, news.token_ids, news.logprobs, top, offsets)
        if asked.return_token_ids:
            told["token_ids"] = news.token_ids
        return told

    def _offsets_of(self, token_ids: Sequence[int], start: int, prompt: str | None = None) -> list[int]:
        assert self._texts is not None
        offsets = Offsets(self._texts, start, self._skip, prompt)
        return [offsets.next(token_id) for token_id in token_ids]

    def _bare(self, index: int, text: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    def _prompt_text(self, prompt: str | Sequence[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        return self._texts.decode(prompt, self._skip) if self._texts is not None else ""
