"""What a caller may ask of one request's sampling: frozen, validated once, when it is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from quire.config import MAX_DRAFTS
from quire.errors import InvalidRequestError
from quire.structured import StructuredOutput

Pooling = Literal["mean", "last"]

MAX_TOKENS = 2**31 - 1
MAX_SEQUENCES_PER_REQUEST = 1024
MAX_STOP_STRINGS = 256
MAX_STOP_CHARACTERS = 4096  # of all stop strings together; the matcher takes a few hundred bytes for each
MAX_TOP_LOGPROBS = 256
MAX_TEMPERATURE = 100.0
MAX_BIAS = 1000.0


class Implied(int):
    """A number of tokens that nobody asked for: where there is room for fewer, fewer it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen and when it ends.

    The order is: penalties and bias on the raw logits, `min_tokens`, `allowed_token_ids` and `structured` as masks, temperature, top-k, top-p, min-p,
    then one draw whose noise depends on (seed, sequence, position, token) alone.

    Fields:
        max_tokens: the most tokens to generate, >= 1, or 0 with `prompt_logprobs` or `pooling`. `None` means as many as the model's context and
            the cache have room for; the default gives way to that as well, a number that was asked for does not.
        min_tokens: before this many tokens no end-of-sequence or stop token is drawn and no stop string ends the request.
        temperature: 0 takes the argmax of the (penalised) logits, ties to the lowest id; at most 100.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches top_p, in (0, 1].
        min_p: keep tokens at least min_p times as likely as the most likely one, in [0, 1].
        repetition_penalty: > 0, at most 1e6; logits of tokens seen in prompt or output are divided by it if positive, multiplied if negative.
        presence_penalty, frequency_penalty: in [-2, 2]; subtracted once, and once per occurrence, for tokens in the output.
        logit_bias: token id -> added to the raw logit, in [-1000, 1000].
        allowed_token_ids: when given, no other token is ever drawn.
        stop: string or strings that end the request, at most 256 of 4096 characters in all; cut from the text unless `include_stop_in_output`.
        stop_token_ids: ids that end the request like the end-of-sequence token.
        ignore_eos: the model's own end-of-sequence tokens do not end the request (`stop_token_ids` still do).
        seed: in [0, 2**64); the same seed gives the same tokens in any company. `None` draws one from the system.
        n: sequences to generate, at most 1024; sequence i draws as a request with seed + i (modulo 2**64) would.
        best_of: generate this many sequences, at least n, and give back the n of the highest cumulative logprob, best first; not for streaming.
        logprobs: `None` for none, 0 for the chosen tokens' logprobs, k > 0 (at most 256) also for the k most likely tokens'. They are
            the fp32 log-softmax of the raw logits, before penalties, bias and temperature.
        prompt_logprobs: the same for the tokens of the prompt after the first; nothing of such a prompt is taken from the cache.
        scaled_logprobs: all logprobs are of the raw logits over the temperature (greedy: of the raw logits), as trainers score.
        return_logits: give back the raw logits that each token was drawn from, float32 [tokens, V] a sequence.
        pooling: give back one vector for the prompt, of its tokens' final hidden states: their "mean", for which nothing of it is taken from the
            cache, or the "last" one.
        skip_special_tokens: leave special tokens out of the text.
        structured: the form that the text must have. The sequence ends with "stop" as soon as the text is complete and nothing may follow, whatever
            `min_tokens` and `ignore_eos` say; end-of-sequence and stop tokens are drawn where the text may end, and nowhere else. A text that
            `max_tokens` cut short ends with "length". Together with `allowed_token_ids` only what both allow is drawn, and a stop string may
            end the text early.
        prompt_lookup_num_tokens: the engine's option of this name, for this request; 0 to 15.
        prediction: text, or its tokens, that much of the output is thought to repeat, such as a file before an edit; no longer than the context.
            Steps guess from it as well, up to 15 tokens where no `prompt_lookup_num_tokens` above 0 says how many, and draw several at once. No bit
            of the output changes.

    Raises:
        InvalidRequestError: a value out of its range, naming field, value and limit.
    """

    max_tokens: int | None = Implied(128)
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    best_of: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    scaled_logprobs: bool = False
    return_logits: bool = False
    pooling: Pooling | None = None
    skip_special_tokens: bool = True
    structured: StructuredOutput | None = None
    prompt_lookup_num_tokens: int | None = None
    prediction: str | Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1 if self.prompt_logprobs is None and self.pooling is None else 0, MAX_TOKENS)
        _integer("min_tokens", self.min_tokens, 0, MAX_TOKENS)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError("min_tokens", self.min_tokens, f"at most max_tokens={self.max_tokens}")
        _number("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 1e6, above=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _integer("n", self.n, 1, MAX_SEQUENCES_PER_REQUEST)
        if self.best_of is not None:
            _integer("best_of", self.best_of, self.n, MAX_SEQUENCES_PER_REQUEST)
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**64 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_TOP_LOGPROBS)
        for name in ("ignore_eos", "include_stop_in_output", "skip_special_tokens", "scaled_logprobs", "return_logits"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(name, getattr(self, name), "True or False")
        if self.pooling is not None and not (isinstance(self.pooling, str) and self.pooling in ("mean", "last")):
            raise InvalidRequestError("pooling", self.pooling, "'mean', 'last' or None")
        if self.structured is not None and not isinstance(self.structured, StructuredOutput):
            raise InvalidRequestError("structured", self.structured, "a StructuredOutput, or None")
        if self.prompt_lookup_num_tokens is not None:
            _integer("prompt_lookup_num_tokens", self.prompt_lookup_num_tokens, 0, MAX_DRAFTS)
        if self.prediction is not None and not isinstance(self.prediction, str):
            object.__setattr__(self, "prediction", _ids("prediction", self.prediction, "text, or a list of token ids"))
        # Kept as values of one type each that nobody else can change. `logit_bias` stays a dict, which can be pickled: each request takes a copy
        # (engine/intake.py).
        object.__setattr__(self, "stop", _strings(self.stop))
        object.__setattr__(self, "stop_token_ids", () if self.stop_token_ids is None else _ids("stop_token_ids", self.stop_token_ids))
        if self.allowed_token_ids is not None:
            allowed = _ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise InvalidRequestError("allowed_token_ids", self.allowed_token_ids, "at least one id, or None")
            object.__setattr__(self, "allowed_token_ids", allowed)
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise InvalidRequestError("logit_bias", self.logit_bias, "a mapping from token id to number")
            bias = dict(self.logit_bias)
            _ids("logit_bias", bias)
            for value in bias.values():
                _number("logit_bias", value, -MAX_BIAS, MAX_BIAS)
            object.__setattr__(self, "logit_bias", bias)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, empty when there is none."""
        assert isinstance(self.stop, tuple)
        return self.stop

    def token_ids_named(self) -> list[tuple[str, int]]:
        """(field, id) of every token id that the sampler meets, to be checked against a model's vocabulary."""
        named = [("stop_token_ids", i) for i in self.stop_token_ids or ()]
        named += [("allowed_token_ids", i) for i in self.allowed_token_ids or ()]
        return named + [("logit_bias", i) for i in self.logit_bias or ()]

    @property
    def takes_what_fits(self) -> bool:
        """Whether `max_tokens` gives way where there is room for fewer."""
        return self.max_tokens is None or isinstance(self.max_tokens, Implied)


def _integer(field: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequestError(field, value, f"an integer from {low} to {high}")


def _number(field: str, value: object, low: float, high: float, above: bool = False) -> None:
    limit = f"a number {'above' if above else 'from'} {low:g} {'and at most' if above else 'to'} {high:g}"
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or (above and value == low):
        raise InvalidRequestError(field, value, limit)


def _strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) else _several("stop", stop, "a string that is not empty, or several")
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidRequestError("stop", f"{len(strings)} strings", f"at most {MAX_STOP_STRINGS} strings")
    for string in strings:
        if not isinstance(string, str) or not string:
            raise InvalidRequestError("stop", string, "a string that is not empty, or several")
    if sum(map(len, strings)) > MAX_STOP_CHARACTERS:
        raise InvalidRequestError("stop", f"{sum(map(len, strings))} characters", f"at most {MAX_STOP_CHARACTERS} characters in all")
    return strings


def _ids(field: str, given: Iterable[int], limit: str = "a list of token ids") -> tuple[int, ...]:
    ids = _several(field, given, limit)
    for token_id in ids:
        _integer(field, token_id, 0, 2**31 - 1)
    return ids


def _several(field: str, given: Iterable[Any], limit: str) -> tuple[Any, ...]:
    try:
        return tuple(given)
    except TypeError:
        raise InvalidRequestError(field, given, limit) from None
