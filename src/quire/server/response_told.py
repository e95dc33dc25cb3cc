"""A response as an object, and as the typed events of a stream."""

from __future__ import annotations

import itertools
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence

from quire.outputs import Completion, RequestOutput, TokenEvent
from quire.server.calling import Calling
from quire.server.errors import as_server_error
from quire.server.response_items import Body, Items
from quire.server.runs import Run
from quire.server.schema import Part
from quire.server.schema_chat import Message
from quire.server.schema_responses import ResponseRequest
from quire.server.token_texts import Offsets, TokenTexts
from quire.server.usage import chat_logprobs


class Told:
    """What is said of one response. Its `body` is what a client sees of it now."""

    def __init__(self, asked: ResponseRequest, model: str, texts: TokenTexts | None, calling: Calling | None) -> None:
        assert texts is not None, "a chat has been encoded"
        self._texts = texts
        hides = asked.skip_special_tokens is not False and not (calling is not None and calling.in_special)
        self._items = Items(calling, Offsets(texts, 0, hides))
        self.body = _fields(asked) | {"id": f"resp_{uuid.uuid4().hex}", "created_at": int(time.time()), "model": model}

    @property
    def response_id(self) -> str:
        """Its name."""
        return str(self.body["id"])

    def whole(self, outputs: Sequence[RequestOutput]) -> Body:
        """The whole response, where nothing of it has been told yet."""
        (made,) = outputs[0].outputs
        self._items.push(made, self._logprobs(made))
        return self._ended(outputs)

    def message(self) -> Message:
        """What was said, for a later response to go on from."""
        return self._items.message()

    def _ended(self, outputs: Sequence[RequestOutput]) -> Body:
        (output,) = outputs
        cut = output.outputs[0].finish_reason == "length"
        self.body |= {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "completed_at": None if cut else int(time.time()),
            "output": self._items.items,
            "usage": _usage(output),
        }
        return self.body

    def failed(self, error: BaseException) -> Body:
        """The response, where something went wrong on the way."""
        known = as_server_error(error)
        code = "rate_limit_exceeded" if known.status == 429 else "server_error" if known.status >= 500 else "invalid_prompt"
        self.body |= {"status": "failed", "error": {"code": code, "message": known.message}}
        return self.body

    async def events(self, run: Run, keep: Callable[[Body], None]) -> AsyncGenerator[bytes, None]:
        """The events of a stream. `keep` gets the whole response before the last one.

        One that fails ends with response.failed; so does one that its maker cancelled, for which there is no event, and its response says so.
        """
        numbers = itertools.count()

        def say(kind: str, fields: Body) -> bytes:
            told = {"type": kind, "sequence_number": next(numbers), **fields}
            return f"event: {kind}\ndata: {json.dumps(told, separators=(',', ':'))}\n\n".encode()

        yield say("response.created", {"response": self.body})
        yield say("response.in_progress", {"response": self.body})
        try:
            outputs = []
            async for _, news in run.events():
                for kind, fields in self._items.push(news, self._logprobs(news)):
                    yield say(kind, fields)
                if news.output is not None:
                    outputs.append(news.output)
            body = self.body if self._is_cancelled else self._ended(outputs)
            keep(body)
        except Exception as error:  # the status has been sent: what happened is told by the last event
            body = self.body if self._is_cancelled else self.failed(error)
        if body["status"] in ("failed", "cancelled"):
            yield say("response.failed", {"response": body})
            return
        yield say(f"response.{body['status']}", {"response": body})

    @property
    def _is_cancelled(self) -> bool:
        return bool(self.body["status"] == "cancelled")

    def _logprobs(self, made: Completion | TokenEvent) -> list[Body]:
        if made.logprobs is None or not made.token_ids:
            return []
        found: list[Body] = chat_logprobs(self._texts, made.token_ids, made.logprobs, made.top_logprobs)["content"]
        return found


def _fields(asked: ResponseRequest) -> Body:
    """What a response repeats of the request, and what it has nothing to say of."""
    form = asked.text.format if asked.text is not None else None
    return {
        "object": "response",
        "status": "in_progress",
        "background": bool(asked.background),
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "max_tool_calls": None,
        "metadata": asked.metadata or {},
        "output": [],
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": asked.previous_response_id,
        "prompt_cache_key": asked.prompt_cache_key,
        "reasoning": {"effort": asked.reasoning.effort if asked.reasoning is not None else None, "summary": None},
        "safety_identifier": asked.safety_identifier,
        "service_tier": "default",
        "store": asked.stored,
        "temperature": 1.0 if asked.temperature is None else asked.temperature,
        "text": {"format": form.model_dump(by_alias=True, exclude_none=True) if form is not None else {"type": "text"}},
        "tool_choice": asked.tool_choice.model_dump() if isinstance(asked.tool_choice, Part) else asked.tool_choice or "auto",
        "tools": [tool.model_dump() for tool in asked.tools or ()],
        "top_logprobs": asked.top_logprobs or 0,
        "top_p": 1.0 if asked.top_p is None else asked.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": asked.user,
    }


def _usage(output: RequestOutput) -> Body:
    prompt, cached, made = output.receipt.prompt_tokens, output.receipt.cached_tokens, output.receipt.drawn_tokens
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": prompt - cached},
        "output_tokens": made,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + made,
    }
