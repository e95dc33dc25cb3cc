"""POST /v1/chat/completions: the next message of a chat."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from quire.outputs import Completion, RequestOutput, TokenEvent
from quire.params import SamplingParams
from quire.server.calling import Calling, StreamedMessage, calling_of, delta_of, finish_reason_of, message_of, naming_tools, with_calls
from quire.server.chat_template import ChatTemplate
from quire.server.errors import ServerError, refused
from quire.server.models import check_model
from quire.server.runs import Job, Run, start_run
from quire.server.sampling import params_of
from quire.server.schema_answers import ChatCompletion, ChatCompletionChunk, answers, chunks_of
from quire.server.schema_chat import ChatPrompt, ChatRequest, Message, Tool, ToolChoice, as_template_messages
from quire.server.serving import Serving, serving_of
from quire.server.sse import Chunks, EventStream, answer_at_end, event, new_id
from quire.server.structure import named_as, structure_names, structure_of
from quire.server.token_texts import TokenTexts
from quire.server.usage import chat_logprobs, prompt_logprobs, usage_of
from quire.structured import StructuredOutput

ENDPOINT = "chat/completions"
PROMPT_NAMES = {"prompt": "messages"}  # which became the prompt
TOOL_NAMES = {"structured": "tools", "structured.grammar": "tools"}
router = APIRouter()


@router.post("/v1/chat/completions", tags=["OpenAI"], responses=answers(ChatCompletion, chunks_of(ChatCompletionChunk)))
async def chat_completions(request: Request, asked: ChatRequest) -> Response:
    """Answer a chat, `n` times."""
    serving = serving_of(request)
    serving.engine()
    check_model(serving, asked.model)
    prompt = await chat_prompt(serving, asked, asked.messages, asked.reasoning_effort)
    with named_as(PROMPT_NAMES | _limit_names(asked) | structure_names(asked)):
        params = _params(asked)
        calling = chat_calling(serving, asked.tools, asked.tool_choice, asked.parallel_tool_calls, params.structured)
        with naming_tools(calling, "function.parameters"):
            job = Job(prompt, with_calls(params, calling))
            run = await start_run(request, ENDPOINT, new_id("chatcmpl"), [job], priority=asked.priority or 0, cache_salt=asked.cache_salt)
    told = Told(asked, run, serving.settings.model, serving.texts, calling)
    return EventStream(run, told.chunks(prompt)) if asked.stream else await answer_at_end(request, run, told.whole)


async def chat_prompt(serving: Serving, asked: ChatPrompt, messages: Sequence[Message], reasoning_effort: str | None = None) -> list[int]:
    """The token ids of a chat, by the model's own template.

    Raises:
        ServerError: the model has none, or it refuses this chat.
    """
    template = _template(serving)
    tools = [tool.model_dump(exclude_none=True) for tool in asked.tools] if asked.tools else None
    continued = bool(asked.continue_final_message)
    if continued and asked.add_generation_prompt:
        raise refused("add_generation_prompt", "must be false with continue_final_message")
    values = dict(asked.chat_template_kwargs or {})
    if reasoning_effort is not None:
        if not template.mentions("reasoning_effort", tools):
            raise refused("reasoning_effort", "must be left out: this model's chat template has no such variable")
        if values.setdefault("reasoning_effort", reasoning_effort) != reasoning_effort:
            raise refused("reasoning_effort", "must be left out, or equal, where chat_template_kwargs has it")

    def render() -> list[int]:
        text = template.render(
            as_template_messages(messages, knows_developer=template.mentions("developer", tools)),
            tools,
            add_generation_prompt=not continued if asked.add_generation_prompt is None else asked.add_generation_prompt,
            continue_final_message=continued,
            values=values,
        )
        return template.encode(text)

    return await asyncio.to_thread(render)


def chat_calling(
    serving: Serving,
    tools: Sequence[Tool] | None,
    tool_choice: ToolChoice | None,
    parallel_tool_calls: bool | None,
    form: StructuredOutput | None,
) -> Calling | None:
    """How a chat's tools are called, None where none is. Raises ServerError as `calling_of`, and where the model has no chat template."""
    with named_as(TOOL_NAMES):
        return calling_of(_template(serving), tools, tool_choice, parallel_tool_calls, form)


def _template(serving: Serving) -> ChatTemplate:
    """The model's chat template. Raises ServerError where it has none."""
    if serving.template is None:
        raise ServerError(400, "messages: this model has no chat template; ask /v1/completions", param="messages", code="no_chat_template")
    return serving.template


def _limit_names(asked: ChatRequest) -> dict[str, str]:
    return {"max_tokens": "max_completion_tokens"} if asked.max_tokens is None and asked.max_completion_tokens is not None else {}


def _params(asked: ChatRequest) -> SamplingParams:
    if asked.max_tokens is not None and asked.max_completion_tokens not in (None, asked.max_tokens):
        raise refused("max_completion_tokens", "must be left out, or equal, where max_tokens is given")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise refused("top_logprobs", "must be left out without logprobs: true")
    if asked.stream and asked.prompt_logprobs is not None:
        raise refused("stream", "must be false with prompt_logprobs: a prompt's are known when it has run")
    return params_of(
        asked,
        max_tokens=asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens,
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        prompt_logprobs=asked.prompt_logprobs,
        structured=structure_of(asked.response_format, asked.structured_outputs),
        prediction=asked.prediction.text if asked.prediction is not None else None,
    )


class Told:
    """What is said of one run."""

    def __init__(self, asked: ChatRequest, run: Run, model: str, texts: TokenTexts | None, calling: Calling | None) -> None:
        self._asked, self._run, self._calling = asked, run, calling
        self._streamed = [StreamedMessage(calling) for _ in range(asked.num_choices)] if calling is not None else []
        assert texts is not None, "a chat has been encoded"
        self._texts = texts
        self._head = {"id": run.name, "created": int(time.time()), "model": model}

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The answer at the end."""
        (output,) = outputs
        choices = [self._choice(completion) for completion in output.outputs]
        told = {**self._head, "object": "chat.completion", "choices": choices, "usage": usage_of(outputs)}
        if self._asked.prompt_logprobs is not None:
            told["prompt_logprobs"] = prompt_logprobs(self._texts, output)
        if self._asked.return_token_ids:
            told["prompt_token_ids"] = output.prompt_token_ids
        return told

    async def chunks(self, prompt: Sequence[int]) -> AsyncGenerator[bytes, None]:
        """The events of a stream."""
        asked, outputs = self._asked, []
        head = {**self._head, "object": "chat.completion.chunk"}
        more = {"usage": None} if asked.include_usage else {}
        chunks = Chunks(head, more)
        for i in range(asked.num_choices):
            role = {"index": i, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            first = {"prompt_token_ids": list(prompt)} if asked.return_token_ids and i == 0 else {}
            yield event({**head, **first, "choices": [role], **more})
        async for _, news in self._run.events():
            if news.text or news.token_ids or news.finish_reason:
                delta = self._delta(news)
                if delta is not None:
                    yield chunks.of(delta)
            if news.output is not None:
                outputs.append(news.output)
        if asked.include_usage:
            yield event({**head, "choices": [], "usage": usage_of(outputs)})

    def _choice(self, completion: Completion) -> dict[str, Any]:
        message = message_of(self._calling, completion)
        told: dict[str, Any] = {"index": completion.index, "message": message, "logprobs": None}
        calls = message.get("tool_calls")
        return self._with_tokens(told, completion, finish_reason_of(completion, calls[-1]["function"]["arguments"] if calls else None))

    def _delta(self, news: TokenEvent) -> dict[str, Any] | None:
        """A choice of a chunk; None while what came may still be a call, or white space beside one."""
        delta: dict[str, Any] = {"content": news.text} if news.text else {}
        arguments = None
        if self._streamed:
            message = self._streamed[news.index]
            delta = delta_of(message.deltas(news))
            arguments = message.arguments
            if not delta and news.finish_reason is None and not self._asked.logprobs and not self._asked.return_token_ids:
                return None
        told = {"index": news.index, "delta": delta, "logprobs": None}
        return self._with_tokens(told, news, finish_reason_of(news, arguments))

    def _with_tokens(self, told: dict[str, Any], made: Completion | TokenEvent, finish_reason: str | None) -> dict[str, Any]:
        told |= {"finish_reason": finish_reason, "stop_reason": made.stop_reason}
        if self._asked.logprobs and made.logprobs is not None and made.token_ids:
            told["logprobs"] = chat_logprobs(self._texts, made.token_ids, made.logprobs, made.top_logprobs)
        if self._asked.return_token_ids:
            told["token_ids"] = made.token_ids
        return told
