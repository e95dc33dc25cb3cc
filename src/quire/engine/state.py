"""What the engine keeps of a running request beside its pages: text so far, stops, counters. One `Branch` for each of its n sequences."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field, replace

import torch

from quire.engine.pooling import Pool
from quire.outputs import Completion, FinishReason, Receipt, RequestOutput, TokenEvent, TopLogprob
from quire.policy.lookup import Miss
from quire.policy.sequence import Sequence
from quire.request import Request
from quire.tensors.sampler import Row, Sampled, SequenceState
from quire.text.detokenizer import Detokenizer
from quire.text.grammar import Guide
from quire.text.stops import StopMatcher
from quire.text.tokenizer import TextTokenizer

Sink = Callable[[TokenEvent], None]
DECODED_TOGETHER = 16  # tokens whose text nobody waits for


@dataclass(frozen=True, slots=True)
class PromptToken:
    """A token of a prompt whose logprob is wanted."""

    scoring: SequenceState
    position: int
    token_id: int

    def next_row(self) -> Row:
        """What the sampler must know to score it."""
        return Row(self.scoring, self.position, given=self.token_id)


class Branch:
    """One sequence of a request, from its first draw to its end."""

    def __init__(
        self, request: Request, index: int, sequence: Sequence, tokenizer: TextTokenizer | None, eos_token_ids: frozenset[int], vocab_size: int
    ) -> None:
        params = request.params
        self.request, self.index, self.sequence = request, index, sequence
        self.stop_ids = frozenset(params.stop_token_ids or ()) | (frozenset() if params.ignore_eos else eos_token_ids)
        self.eos_token_ids = eos_token_ids
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[list[TopLogprob]] = []
        self.logits: list[torch.Tensor] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self._text: list[str] = []
        self._to_decode: list[int] = []
        self._decoded_together = 1 if request.read or params.stop_strings else DECODED_TOGETHER
        self.failure: Exception | None = None  # what the tokenizer has raised; no more text comes then
        self._detokenizer: Detokenizer | None = None
        if tokenizer is not None:
            try:
                held = request.grammar is not None
                self._detokenizer = Detokenizer(tokenizer, request.prompt_token_ids, params.skip_special_tokens, whole=held)
            except Exception as error:
                self.failure = error
        self._stops = StopMatcher(params.stop_strings, params.include_stop_in_output)
        if params.best_of is not None and params.logprobs is None:
            params = replace(params, logprobs=0)  # the best are told by them
        self._sampling = SequenceState(params, (request.seed + index) % 2**64, vocab_size, request.prompt_token_ids)
        self.guide: Guide | None = request.grammar.start(self.stop_ids) if request.grammar is not None else None

    def next_row(self) -> Row:
        """What the sampler must know to draw the next token."""
        return self.row_after((), self.guide)

    def row_after(self, drafts: Tokens[int], guide: Guide | None) -> Row:
        """What it must know to draw the one after these drafts, where the branch's guide would be as `guide` is."""
        early = len(self.token_ids) + len(drafts) < self.request.params.min_tokens
        scoring, position = self._sampling.after(drafts), len(self.sequence.tokens) + len(drafts)
        if guide is not None:  # which knows best when the sequence may end
            guide.early = early
            return Row(scoring, position, mask=torch.frombuffer(guide.mask, dtype=torch.int32))
        return Row(scoring, position, tuple(self.stop_ids) if early else ())

    def push(self, drawn: Sampled) -> TokenEvent:
        """Take a drawn token: what is now certain of the text, and whether the sequence has ended."""
        token_id, params = drawn.token_id, self.request.params
        self.sequence.tokens.append(token_id)
        self.token_ids.append(token_id)
        self._sampling.append(token_id)
        if drawn.logprob is not None:
            self.logprobs.append(drawn.logprob)
        if drawn.top is not None:
            self.top_logprobs.append(drawn.top)
        if drawn.logits is not None:
            self.logits.append(drawn.logits)
        if token_id in self.stop_ids:
            text = self._end("stop", None if token_id in self.eos_token_ids else token_id)
        else:
            self._to_decode.append(token_id)
            text = self._push_text(self._decoded()) if len(self._to_decode) >= self._decoded_together else ""
            if self.guide is not None and self.finish_reason is None:
                self.guide.accept(token_id)
                if self.guide.complete:
                    text += self._end("stop", None)
            if self.finish_reason is None and len(self.token_ids) >= self.request.max_tokens:
                text += self._end("length", None)
        return TokenEvent(
            self.request.request_id,
            self.index,
            text=text,
            token_ids=[token_id],
            logprobs=None if params.logprobs is None else [drawn.logprob or 0.0],
            top_logprobs=[drawn.top] if drawn.top is not None else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def end(self, reason: FinishReason) -> TokenEvent:
        """End it from outside (cancelled, error); what was held back of its text comes out."""
        text = self._end(reason, None)
        return TokenEvent(self.request.request_id, self.index, text=text, finish_reason=self.finish_reason, stop_reason=self.stop_reason)

    def completion(self) -> Completion:
        """What it came to."""
        params = self.request.params
        assert self.finish_reason is not None
        return Completion(
            self.index,
            "".join(self._text),
            list(self.token_ids),
            self.finish_reason,
            self.stop_reason,
            None if params.logprobs is None else list(self.logprobs),
            list(self.top_logprobs) if params.logprobs else None,
            self.cumulative_logprob if self.logprobs else None,
            torch.stack(self.logits) if self.logits else None,
        )

    @property
    def cumulative_logprob(self) -> float:
        """The sum of its tokens' logprobs, as far as they were asked for."""
        return math.fsum(self.logprobs)

    def _decoded(self, last: bool = False) -> str:
        tokens, self._to_decode, text = self._to_decode, [], self._detokenizer
        if text is None:
            return ""
        try:
            return text.push(tokens) + (text.flush() if last else "")
        except Exception as error:  # a tokenizer may be anybody's code: what it raises ends this request and no other
            self.failure, self._detokenizer = error, None
            return ""

    def _push_text(self, text: str, may_stop: bool = True) -> str:
        found = self._stops.push(text, may_stop=may_stop and len(self.token_ids) >= self.request.params.min_tokens)
        if found.stop is not None:
            self.finish_reason, self.stop_reason = "stop", found.stop
        self._text.append(found.text)
        return found.text

    def _end(self, reason: FinishReason, stop_reason: int | None) -> str:
        # The last half character may complete a stop string; what ends from outside might yet have made a whole one of it.
        text = self._push_text(self._decoded(last=True), may_stop=reason in ("stop", "length"))
        if self.finish_reason is None:
            self.finish_reason, self.stop_reason = reason, stop_reason
            held = self._stops.flush()
            self._text.append(held)
            text += held
        return text


@dataclass(frozen=True, slots=True)
class AfterDraft:
    """The draw behind `drafts`: it stands if they were drawn, behind the `num_tokens` that its branch had."""

    branch: Branch
    num_tokens: int
    drafts: tuple[int, ...]
    guide: Guide | None

    def next_row(self) -> Row:
        """What the sampler must know to draw it."""
        return self.branch.row_after(self.drafts, self.guide)

    @property
    def stands(self) -> bool:
        """Whether they were, and the branch goes on."""
        token_ids = self.branch.token_ids
        return self.branch.finish_reason is None and len(token_ids) == self.num_tokens + len(self.drafts) and token_ids[-1] == self.drafts[-1]


@dataclass(slots=True)
class RequestState:
    """A request's branches and what it has cost so far. Times are `time.perf_counter` seconds."""

    request: Request
    sink: Sink
    branches: list[Branch] = field(default_factory=list)
    error: Exception | None = None
    submitted_s: float = field(default_factory=time.perf_counter)
    started_s: float | None = None
    first_token_s: float | None = None
    cached_tokens: int = 0
    computed_tokens: int = 0
    rejected_tokens: int = 0
    accepted_tokens: int = 0
    waited_for: str | None = None
    peak_pages: int = 0  # of several branches, which may share pages; one that is alone knows its own
    capacities: list[int] = field(default_factory=list)  # of the branches when their pages were last counted
    miss: Miss | None = None
    scoring: SequenceState | None = None
    prompt_scores: dict[int, Sampled] = field(default_factory=dict)
    pool: Pool | None = field(init=False)

    def __post_init__(self) -> None:
        pooling = self.request.params.pooling
        self.pool = Pool(pooling, len(self.request.prompt_token_ids)) if pooling is not None else None

    def score_prompt(self, vocab_size: int) -> None:
        """Make ready for `prompt_token`."""
        params = replace(self.request.params, logprobs=self.request.params.prompt_logprobs)
        self.scoring = SequenceState(params, self.request.seed, vocab_size)

    def prompt_token(self, position: int) -> PromptToken:
        """The token to be scored at a position."""
        assert self.scoring is not None
        return PromptToken(self.scoring, position, self.request.prompt_token_ids[position])

    def note_pages(self) -> None:
        """Note how many pages its branches name together, each counted once; only growth can have made them more."""
        capacities = [branch.sequence.capacity for branch in self.branches]
        if capacities != self.capacities:
            named = set[int]().union(*(table for branch in self.branches for table in branch.sequence.tables)) - {-1}
            self.capacities, self.peak_pages = capacities, max(self.peak_pages, len(named))

    @property
    def ended(self) -> bool:
        """Whether every branch there will be has ended."""
        return len(self.branches) == self.request.num_branches and all(branch.finish_reason is not None for branch in self.branches)

    @property
    def answered(self) -> bool:
        """Whether no token is wanted, and all else that is wanted is there: the last token is scored a step before its own state may come."""
        scored = self.scoring is None or len(self.prompt_scores) == len(self.request.prompt_token_ids) - 1
        return self.request.max_tokens == 0 and scored and (self.pool is None or self.pool.complete)

    def output(self, page_bytes: int, text_of: Callable[[int], str | None]) -> RequestOutput:
        """The whole of it, once it has ended. `text_of` decodes one token."""
        now = time.perf_counter()
        started, first = self.started_s or now, self.first_token_s or now
        receipt = Receipt(
            prompt_tokens=len(self.request.prompt_token_ids),
            cached_tokens=self.cached_tokens,
            computed_tokens=self.computed_tokens,
            rejected_tokens=self.rejected_tokens,
            accepted_tokens=self.accepted_tokens,
            drawn_tokens=sum(len(b.token_ids) for b in self.branches),
            num_preemptions=sum(b.sequence.num_preemptions for b in self.branches),
            peak_cache_bytes=max([self.peak_pages, *(b.sequence.peak_pages for b in self.branches)]) * page_bytes,
            queued_s=started - self.submitted_s,
            prefill_s=first - started,
            decode_s=now - first,
            waited_for=self.waited_for,
            miss_index=self.miss.index if self.miss else None,
            miss_text=text_of(self.request.prompt_token_ids[self.miss.index]) if self.miss else None,
            miss_reason=self.miss.reason if self.miss else None,
        )
        branches = self.branches
        if self.request.params.best_of is not None:
            branches = sorted(branches, key=lambda branch: -branch.cumulative_logprob)[: self.request.params.n]
        completions = [replace(branch.completion(), index=i) for i, branch in enumerate(branches)]
        logprobs, top_logprobs = self._prompt_logprobs()
        return RequestOutput(
            self.request.request_id,
            self.request.prompt,
            list(self.request.prompt_token_ids),
            completions,
            receipt,
            self.error,
            logprobs,
            top_logprobs,
            self.pool.embedding() if self.pool is not None else None,
        )

    def _prompt_logprobs(self) -> tuple[list[float | None] | None, list[list[TopLogprob] | None] | None]:
        num_scored = len(self.request.prompt_token_ids) - 1
        if self.scoring is None or len(self.prompt_scores) < num_scored:
            return None, None
        scores = [self.prompt_scores[position] for position in range(1, num_scored + 1)]
        top = [None, *(score.top for score in scores)] if self.request.params.prompt_logprobs else None
        return [None, *(score.logprob for score in scores)], top
