"""What callers bring, checked and made into requests, before anything shared is touched."""

from __future__ import annotations

import operator
import os
import secrets
from bisect import bisect_right
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

from quire.engine.build import Built
from quire.errors import InvalidRequestError
from quire.params import SamplingParams
from quire.request import Request, check_fits, check_namespace, check_priority, check_prompt, num_committed_at_most
from quire.tensors.models.geometry import NOT_TAKEN_BACK, carries

Prompt = str | Sequence[int]


class Intake:
    """The checks of one engine. May be used from any thread."""

    def __init__(self, built: Built) -> None:
        self._built = built

    def token_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """A prompt's token ids, of which something could be cached.

        Raises:
            InvalidRequestError: it is no prompt, or one that could never run.
        """
        token_ids = tuple(self._encode(prompt))
        check_prompt(token_ids, SamplingParams(max_tokens=1), self._built.limits)
        return token_ids

    def request(self, prompt: Prompt, params: SamplingParams, namespace: str | None, priority: int, request_id: str | None, *, read: bool) -> Request:
        """A request that can run. Raises InvalidRequestError as `LLM.submit`, UnsupportedModelError for ends of a live model that are no ids."""
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError("params", params, "a SamplingParams")
        if self._built.model.live:
            self._built.model.read_ends()
        if params.logit_bias is not None:
            params = replace(params)  # with a mapping of its own, checked again: the caller's may have changed since, or may yet
        if request_id is not None and not (isinstance(request_id, str) and request_id):
            raise InvalidRequestError("request_id", request_id, "a string that is not empty, or None")
        if params.stop_strings and self._built.tokenizer is None:
            raise InvalidRequestError("stop", params.stop, "left out: this model came without a tokenizer, and gives no text")
        if params.pooling is not None and self._built.model.hidden_size is None:
            raise InvalidRequestError("pooling", params.pooling, "None: this model has no plain output layer to take hidden states from")
        if carries(self._built.model.layers):
            for field in ("prompt_lookup_num_tokens", "prediction"):
                if given := getattr(params, field):
                    raise InvalidRequestError(field, given, f"left out for this model, {NOT_TAKEN_BACK}")
        whose = check_namespace(namespace), check_priority(priority)
        text = prompt if isinstance(prompt, str) else None
        token_ids = tuple(self._encode(prompt))
        max_tokens = self._max_tokens(token_ids, params)
        seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(8), "little")
        grammar = self._built.grammars.compile(params.structured) if params.structured is not None else None
        name = request_id if request_id is not None else f"request-{secrets.token_hex(8)}"  # which no caller's own can be
        return Request(name, text, token_ids, params, max_tokens, seed, *whose, grammar, read, self._prediction(params.prediction))

    def _prediction(self, given: Prompt | None) -> tuple[int, ...]:
        """A prediction's tokens: each one the model's, as it may be drafted, and no more than a prompt could have: every step looks through them."""
        limits, tokenizer = self._built.limits, self._built.tokenizer
        if isinstance(given, str):
            if tokenizer is None:
                raise InvalidRequestError("prediction", given, "a list of token ids: this model came without a tokenizer")
            given = tokenizer.encode(given, field="prediction", add_special_tokens=False)
        token_ids = tuple(given or ())
        if len(token_ids) > limits.context_len:
            raise InvalidRequestError("prediction", f"{len(token_ids)} tokens", f"at most {limits.context_len} tokens, the context")
        if token_ids and max(token_ids) >= limits.vocab_size:
            raise InvalidRequestError("prediction", max(token_ids), f"token ids from 0 to {limits.vocab_size - 1}")
        return token_ids

    def _max_tokens(self, token_ids: tuple[int, ...], params: SamplingParams) -> int:
        """`max_tokens` resolved: of a number that nobody asked for as much as context and pool have room for."""
        max_tokens = check_prompt(token_ids, params, self._built.limits)
        engine = self._built.engine
        num_pages = engine.keeper.num_pages_for_requests

        def pages_needed(max_tokens: int) -> int:
            return engine.scheduler.cache.pages_to_finish(num_committed_at_most(len(token_ids), max_tokens, params))

        if params.takes_what_fits and pages_needed(max_tokens) > num_pages:
            max_tokens = max(1, bisect_right(range(1, max_tokens + 1), num_pages, key=pages_needed))
        check_fits(num_committed_at_most(len(token_ids), max_tokens, params), pages_needed(max_tokens), num_pages)
        if params.min_tokens > max_tokens:
            raise InvalidRequestError("min_tokens", params.min_tokens, f"at most {max_tokens}, for which there is room behind this prompt")
        return max_tokens

    def _encode(self, prompt: Prompt) -> Sequence[int]:
        prompt = _listed(prompt)
        if not isinstance(prompt, str | bytes | bytearray | Mapping | Set):
            with suppress(TypeError):
                return [token if isinstance(token, bool) else operator.index(token) for token in prompt]
        if not isinstance(prompt, str):
            raise InvalidRequestError("prompt", prompt, "text or a list of token ids")
        if self._built.tokenizer is None:
            raise InvalidRequestError("prompt", prompt, "a list of token ids: this model came without a tokenizer")
        return self._built.tokenizer.encode(prompt)


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt is text, or ids: a list, an array or a tensor that begins with an integer. An empty one is a list of no prompts.

    Raises:
        InvalidRequestError: it is none of these.
    """
    prompts = _listed(prompts)
    try:
        if isinstance(prompts, Mapping):  # a tokenizer's encoding would be two prompts, "input_ids" and "attention_mask"
            raise TypeError
        one = isinstance(prompts, str | bytes | bytearray) or (len(prompts) > 0 and _is_integer(prompts[0]))
        return [cast(Prompt, prompts)] if one else list(cast(Sequence[Prompt], prompts))
    except (TypeError, LookupError):
        raise InvalidRequestError("prompts", prompts, "text, a list of token ids (of an encoding its input_ids), or a list of such prompts") from None


def _is_integer(x: Any) -> bool:
    """Python's, numpy's, or a tensor's; an array or a tensor of one integer is a prompt."""
    return hasattr(x, "__index__") and not getattr(x, "ndim", 0)


def _listed(given: Any) -> Any:
    """An array's or a tensor's numbers as Python's own, anything else as it is."""
    return given.tolist() if hasattr(given, "tolist") else given
