"""Whom a chat is held with: a model loaded here, or a server's."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from quire.cli.remote import Remote
from quire.errors import ModelError, RequestFailedError
from quire.params import SamplingParams

if TYPE_CHECKING:
    from quire import LLM, RequestStream

Messages = list[dict[str, str]]
NO_TEMPLATE = "has no chat template, so it cannot hold a chat; `quire generate` has it go on with a text"


class Turn(NamedTuple):
    """What one answer took."""

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    first_s: float
    rest_s: float


class Talker(Protocol):
    """`turn` is what the last answer took, None where that is not known."""

    turn: Turn | None

    def answer(self, messages: Messages) -> Generator[str, None, None]:
        """The answer, piece by piece. Closed early, or left by an exception, it ends where it is.

        Raises:
            InvalidRequestError, RequestFailedError: there is none, or no more of it.
        """


class Here:
    """A model loaded here.

    Raises:
        ModelError: it has no chat template.
    """

    def __init__(self, llm: LLM, name: str, params: SamplingParams) -> None:
        if llm.tokenizer is None or not llm.tokenizer.chat_template:
            raise ModelError(f"{name} {NO_TEMPLATE}")
        self._llm, self._params = llm, params
        self.turn: Turn | None = None

    def answer(self, messages: Messages) -> Generator[str, None, None]:
        """As `Talker`."""
        self.turn = None
        try:
            prompt = self._llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
        except Exception as error:  # a template may raise anything: some want roles in turn, or no system message
            raise RequestFailedError(f"the model's chat template refused this conversation ({error})") from error
        ids = list(prompt["input_ids"] if isinstance(prompt, Mapping) else prompt)
        stream = self._llm.submit(ids, self._params)
        try:
            for event in stream:
                if event.text:
                    yield event.text
        finally:
            stream.cancel()
            self._note(stream)

    def _note(self, stream: RequestStream) -> None:
        output = stream.wait()
        receipt, new = output.receipt, sum(len(one.token_ids) for one in output.outputs)
        self.turn = Turn(receipt.prompt_tokens, receipt.cached_tokens, new, receipt.queued_s + receipt.prefill_s, receipt.decode_s)
        if output.error is not None:
            raise output.error


class There:
    """A server's model. `given` are the fields of every request.

    Raises:
        RequestFailedError: the server is not to be reached, or does not let us in.
    """

    def __init__(self, remote: Remote, name: str | None, given: Mapping[str, Any]) -> None:
        first = remote.check()
        self.name = name if name is not None else first
        self._remote = remote
        self._given = {**given, "stream": True, "stream_options": {"include_usage": True}}
        if self.name is not None:
            self._given["model"] = self.name
        self.turn: Turn | None = None

    def answer(self, messages: Messages) -> Generator[str, None, None]:
        """As `Talker`."""
        self.turn, whole = None, False
        began_s, first_s = time.perf_counter(), 0.0
        response = None
        try:
            response = self._remote.stream("/v1/chat/completions", json.dumps({**self._given, "messages": messages}).encode())
            if response.status != 200:
                self._refused(response.status, response.read())
            for told in _events(response):
                if told.get("error"):
                    raise RequestFailedError(str(told["error"].get("message")))
                text = "".join((choice.get("delta") or {}).get("content") or "" for choice in told.get("choices") or ())
                if text:
                    first_s = first_s or time.perf_counter() - began_s
                    yield text
                if told.get("usage"):
                    self._note(told["usage"], first_s, time.perf_counter() - began_s - first_s)
            whole = True
        except (OSError, http.client.HTTPException) as error:
            raise RequestFailedError(f"the server did not answer to the end ({error.__class__.__name__}: {error})") from error
        finally:
            if not whole:
                self._remote.drop()  # which tells the server to stop
                if response is not None:
                    response.close()  # what the connection does not do where the server had said that it is the last answer in it

    def _note(self, usage: Mapping[str, Any], first_s: float, rest_s: float) -> None:
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        self.turn = Turn(usage["prompt_tokens"], cached, usage["completion_tokens"], first_s, rest_s)

    def _refused(self, status: int, body: bytes) -> None:
        try:
            error = json.loads(body)["error"]
            message, code = str(error["message"]), error.get("code")
        except (ValueError, KeyError, TypeError, AttributeError):
            message, code = f"the server answered with status {status}", None
        if code == "no_chat_template":
            raise ModelError(f"{self.name} {NO_TEMPLATE}")
        raise RequestFailedError(message)


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The objects of a stream of server-sent events, to its end."""
    ended = False
    while line := response.readline():
        if ended or not line.startswith(b"data:"):
            continue  # after the last event the rest is read too, so that the connection can be used again
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            ended = True
            continue
        try:
            told = json.loads(data)
        except ValueError as error:
            raise ConnectionError("an event is no JSON") from error
        yield told
    if not ended:
        raise ConnectionError("the stream ended early")
