"""What a caller gets back: events while a request runs, outputs when it has ended."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

FinishReason = Literal["stop", "length", "cancelled", "error"]


class TopLogprob(NamedTuple):
    """One of the most likely tokens at a position and its log-probability (natural log, raw logits)."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one request cost.

    `cached_tokens` prompt tokens came from the cache (counted at first admission), `computed_tokens` tokens went through the model and were
    committed (again after a preemption), `rejected_tokens` were staged in a step that failed or as drafts that were wrong, `staged_tokens` are both
    together. `accepted_tokens` of the computed ones were drafts that were right, each of which saved a step.
    `drawn_tokens` were drawn, with those of sequences that `best_of` leaves out.
    `peak_cache_bytes` is the most page memory its tables named at once (a page shared with others counts whole, one that its own sequences share
    once). Times in seconds: `queued_s` until first admission, `prefill_s` from there to the first token, `decode_s` from there to the end.
    `waited_for` is what kept it from starting: "sequences" (as many run already as may), "pages", "prefix" (another was computing its prefix),
    "disk", "logits" (others' prompts were being scored), or None if it started at once.

    Where the prompt could have hit more than it did, `miss_index` is its first token that was not found, `miss_text` that token's text and
    `miss_reason` why, as far as is remembered: "never seen"; "not kept", seen, but what a hit there would need was not kept (a recurrent layer's
    state is only where a page or a text ended, pages behind a window only while there is plenty of room); "evicted", kept, and left for want of
    room; or "other namespace". Doors to callers that must not learn of each other leave the reason out.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    rejected_tokens: int = 0
    accepted_tokens: int = 0
    drawn_tokens: int = 0
    num_preemptions: int = 0
    peak_cache_bytes: int = 0
    queued_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    waited_for: str | None = None
    miss_index: int | None = None
    miss_text: str | None = None
    miss_reason: str | None = None

    @property
    def staged_tokens(self) -> int:
        """Tokens whose keys and values were computed in any step."""
        return self.computed_tokens + self.rejected_tokens


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a prompt would find in the cache now, and why not more.

    `cached_tokens` would be reused, those that would be read from the disk first among them; `pages_needed` more pages hold the rest of the prompt
    and what comes from the disk, and `fits` says whether they can be had now without preempting anybody. `miss_index`, `miss_text` and `reason` are
    as in `Receipt`, None where nothing is missing.
    """

    cached_tokens: int
    pages_needed: int
    fits: bool
    miss_index: int | None
    miss_text: str | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class Completion:
    """One generated sequence. `token_ids` hold every token drawn, a stop token included; `text` leaves it out.

    `logprobs` (one float a token) and `top_logprobs` (one list a token, most likely first) are None unless asked for. `stop_reason` is the
    stop string or stop token id that ended it, None for end-of-sequence or another finish reason. `cumulative_logprob` is the sum of the
    tokens' logprobs where they were computed (`logprobs` or `best_of`). `logits` is a float32 tensor [tokens, V] with `return_logits`.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: list[float] | None = None
    top_logprobs: list[list[TopLogprob]] | None = None
    cumulative_logprob: float | None = None
    logits: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request that has ended: its prompt, its completions in order, its error if it failed, and its receipt.

    `prompt_logprobs` and `prompt_top_logprobs` have one entry for each token of the prompt, None for the first, and are None unless asked for
    and complete. `embedding` is a float32 tensor [D] with `pooling`, D the model's hidden size.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion]
    receipt: Receipt
    error: Exception | None = None
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[list[TopLogprob] | None] | None = None
    embedding: Any = field(default=None, repr=False, compare=False)

    def raise_for_error(self) -> RequestOutput:
        """Itself. Raises `error` if the request failed."""
        if self.error is not None:
            raise self.error
        return self


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """News of one sequence: tokens drawn and text that is now certain, either possibly empty.

    Text held back because it may begin a stop string, or is half a character, comes with a later event; the last event of a sequence
    has `finish_reason` and flushes it. The last event of a request also has `output`.
    """

    request_id: str
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
    top_logprobs: list[list[TopLogprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    output: RequestOutput | None = None

    def with_output(self, output: RequestOutput) -> TokenEvent:
        """The same event as the last of its request."""
        return replace(self, output=output)
