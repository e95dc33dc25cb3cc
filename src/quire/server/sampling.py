"""From a body's fields to the engine's `SamplingParams`."""

from __future__ import annotations

from typing import Any

from quire.params import SamplingParams
from quire.server.errors import refused
from quire.server.limits import MAX_BIAS
from quire.server.schema import Sampling

# Fields that both sides call the same, and of which None means what the engine takes where nothing is said.
SAME = (
    *("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "n"),
    *("min_tokens", "ignore_eos", "stop", "stop_token_ids", "skip_special_tokens", "allowed_token_ids"),
)


def params_of(asked: Sampling, **more: Any) -> SamplingParams:
    """The params of one prompt. `more` are what the endpoints name differently: max_tokens, logprobs, prompt_logprobs, best_of, structured,
    prediction.

    Raises:
        InvalidRequestError, ServerError: a value is out of its range.
    """
    given = {name: value for name in SAME if (value := getattr(asked, name)) is not None}
    if asked.top_k is not None:
        given["top_k"] = max(0, asked.top_k)
    if asked.seed is not None:
        given["seed"] = asked.seed % 2**64  # clients draw it as a signed number
    if asked.include_stop_str_in_output is not None:
        given["include_stop_in_output"] = asked.include_stop_str_in_output
    if asked.logit_bias:
        given["logit_bias"] = {_token_id(name): _bias(value) for name, value in asked.logit_bias.items()}
    return SamplingParams(**given, **{name: value for name, value in more.items() if value is not None or name == "max_tokens"})


def _token_id(name: str) -> int:
    if not (name.isascii() and name.isdigit() and len(name) < 10) or (len(name) > 1 and name[0] == "0"):  # '05' would be 5 once more
        raise refused("logit_bias", "must be an object from token ids, written as strings, to numbers")
    return int(name)


def _bias(value: float) -> float:
    if not -MAX_BIAS <= value <= MAX_BIAS:
        raise refused("logit_bias", f"each value must be from {-MAX_BIAS:g} to {MAX_BIAS:g}")
    return value
