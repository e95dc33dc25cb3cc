"""The sampler's words: what it must know of a sequence, what one row asks of it, what it answers."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from copy import copy
from typing import Literal, NamedTuple

import torch

from quire.errors import InvalidRequestError
from quire.outputs import TopLogprob
from quire.params import SamplingParams

LOWEST_TEMPERATURE = 1e-30  # its inverse is still a finite float32; below it nothing but the most likely token has any mass anyway

Failure = Literal["not_finite", "nothing_left"]


class Sampled(NamedTuple):
    """A token drawn from a row, or why there is none.

    `logprob`, `top` (most likely first; fewer than asked for where fewer tokens have any mass) and `logits` (raw, float32 [V]) are None unless
    asked for. On `failure` the token is -1: "not_finite" when the row's logits hold NaN or +inf, "nothing_left" when masks and -inf logits leave
    no token to draw.
    """

    token_id: int
    logprob: float | None = None
    top: list[TopLogprob] | None = None
    failure: Failure | None = None
    logits: torch.Tensor | None = None

    @property
    def ok(self) -> bool:
        """Whether a token was drawn."""
        return self.failure is None


class SequenceState:
    """What the draws of one sequence depend on besides logits and position. Made when the sequence begins; `append` each token it is given.

    Token counts are kept only if a penalty is used, and cost O(1) a token.

    Attributes:
        inverse_temperature: 1 / temperature, or 0 for greedy decoding. Logits are multiplied by it in float32.
        min_relative: log(min_p), or -inf: a token survives min-p if (logit - max logit) / temperature is no lower.
        scales_logprobs: whether logprobs are wanted of other logits than the raw ones. asks_more: whether that, or logits, are.
        packed: what the native sampler makes of all that stays as it is, once it has.

    Args:
        params: validated sampling parameters.
        seed: in [0, 2**64), with the sequence's index already added.
        vocab_size: V, the width of the logits.
        prompt_ids: the tokens it begins with.

    Raises:
        InvalidRequestError: a token id outside the vocabulary, in params or in the prompt (where a penalty needs it).
        ValueError: the seed is out of range.
    """

    __slots__ = (
        "_index",
        "allowed_ids",
        "asks_more",
        "bias_ids",
        "biases",
        "inverse_temperature",
        "min_relative",
        "output_counts",
        "packed",
        "params",
        "penalised_ids",
        "scales_logprobs",
        "seed",
        "vocab_size",
    )

    def __init__(self, params: SamplingParams, seed: int, vocab_size: int, prompt_ids: Sequence[int] = ()) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed}: must be from 0 to 2**64 - 1")
        for field, token_id in params.token_ids_named():
            _check(field, token_id, vocab_size)
        self.params, self.seed, self.vocab_size, self.packed = params, seed, vocab_size, b""
        self.inverse_temperature = 1.0 / max(params.temperature, LOWEST_TEMPERATURE) if params.temperature > 0.0 else 0.0
        self.min_relative = math.log(params.min_p) if params.min_p > 0.0 else -math.inf
        self.scales_logprobs = params.scaled_logprobs and params.logprobs is not None and params.temperature not in (0.0, 1.0)
        self.asks_more = self.scales_logprobs or params.return_logits
        bias = params.logit_bias or {}
        self.bias_ids, self.biases = array("i", bias.keys()), array("d", bias.values())
        self.allowed_ids = None if params.allowed_token_ids is None else array("i", sorted(set(params.allowed_token_ids)))
        # Parallel: the tokens a penalty applies to, and how often each is in the output. `_index` says where each token stands.
        self.penalised_ids, self.output_counts = array("i"), array("i")
        self._index: dict[int, int] | None = None
        repeats = params.repetition_penalty != 1.0
        if repeats or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
            self._index = {}
            for token_id in prompt_ids if repeats else ():
                self._place(token_id, "prompt")

    def after(self, token_ids: Sequence[int]) -> SequenceState:
        """The state as it would be with these appended; this one stays as it is."""
        if self._index is None:
            return self
        other = copy(self)
        other.penalised_ids, other.output_counts, other._index = self.penalised_ids[:], self.output_counts[:], dict(self._index)
        for token_id in token_ids:
            other.append(token_id)
        return other

    def append(self, token_id: int) -> None:
        """The sequence was given one more token."""
        if self._index is not None:
            self.output_counts[self._place(token_id, "output")] += 1

    def _place(self, token_id: int, field: str) -> int:
        assert self._index is not None
        place = self._index.get(token_id)
        if place is None:
            _check(field, token_id, self.vocab_size)
            place = self._index[token_id] = len(self.penalised_ids)
            self.penalised_ids.append(token_id)
            self.output_counts.append(0)
        return place


class Row(NamedTuple):
    """One row of logits to draw from: a sequence in this step.

    `position` is the absolute position of the token to be drawn (prompt length + tokens generated so far), in [0, 2**31). `banned_ids` must not
    be drawn now: the tokens that would end the sequence, while it is shorter than `min_tokens`. A row with a `given` token draws nothing and tells
    that token's logprob. `mask` holds the tokens that may be drawn at all: int32 [ceil(V / 32)] or longer, on the CPU, bit i % 32 of word i // 32
    for token i; it is read when the row is drawn, no earlier.
    """

    state: SequenceState
    position: int
    banned_ids: Sequence[int] = ()
    given: int = -1
    mask: torch.Tensor | None = None


def _check(field: str, token_id: int, vocab_size: int) -> None:
    if not 0 <= token_id < vocab_size:
        raise InvalidRequestError(field, token_id, f"a token id from 0 to {vocab_size - 1}, the model's vocabulary")
