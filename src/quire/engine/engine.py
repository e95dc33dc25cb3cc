"""The engine: requests in, events out, one step at a time. Synchronous and single-threaded; `worker.py` gives it a thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from quire.engine.drafting import drafter_of
from quire.engine.keeper import CacheKeeper
from quire.engine.masks import MaskThread
from quire.engine.runner import Runner
from quire.engine.state import AfterDraft, Branch, PromptToken, RequestState, Sink
from quire.errors import CacheTooSmallError, NonFiniteLogitsError, NothingToDrawError, RequestFailedError, StepError, TokenizerError
from quire.outputs import FinishReason, TokenEvent
from quire.policy.lookup import find_miss
from quire.policy.plan import StepPlan, Work
from quire.policy.scheduler import Scheduler
from quire.policy.sequence import Sequence
from quire.request import Request
from quire.tensors.sampler import Sampled
from quire.tensors.stacked import StackedView, stacked_view
from quire.text.grammar import Guide
from quire.text.tokenizer import TextTokenizer

log = logging.getLogger("quire")


class Engine:
    """Runs requests to their end. Every accepted request's sink gets its events and, once, an event with its output."""

    def __init__(
        self, runner: Runner, scheduler: Scheduler, tokenizer: TextTokenizer | None, *, reserve_bytes: int = 0, prompt_lookup_num_tokens: int = 0
    ) -> None:
        self.runner, self.scheduler, self.tokenizer = runner, scheduler, tokenizer
        self.prompt_lookup_num_tokens = prompt_lookup_num_tokens
        self.keeper = CacheKeeper(scheduler, runner.store, tokenizer, reserve_bytes)
        self.masks = MaskThread()
        self.num_steps = 0
        self.num_computed_tokens = self.num_drawn_tokens = self.num_drafted_tokens = self.num_accepted_tokens = 0
        self._arrivals = 0
        self._requests: dict[str, RequestState] = {}
        self._branches: dict[int, tuple[RequestState, Branch]] = {}

    @property
    def has_work(self) -> bool:
        """Whether any request is open, or pages are on their way to the tier below."""
        return bool(self._requests) or self.scheduler.tier.busy

    def add(self, request: Request, sink: Sink) -> None:
        """Queue a checked request."""
        state = RequestState(request, sink)
        prompt, cache = request.prompt_token_ids, self.scheduler.cache
        scores, pooling = request.params.prompt_logprobs is not None, request.params.pooling
        if request.max_tokens == 0 and pooling is None:
            prompt = prompt[:-1]  # the last one is scored and never computed
        if scores:
            state.score_prompt(self.runner.model.vocab_size)
        # Sisters share their prompt even where nobody else shares anything, and logits and states of pages that others computed are not kept.
        own_root = f"request {self._arrivals}" if scores or pooling == "mean" or request.num_branches > 1 and not cache.sharing else ""
        sequence = self.keeper.sequence(prompt, request.namespace, arrival=self._arrivals, own_root=own_root, scores=scores, pooling=pooling)
        self._arrivals += request.num_branches
        num_tokens = sequence.num_at_most = request.num_committed_at_most
        sequence.pages_at_most = cache.pages_to_finish(num_tokens)
        self._add_branch(state, sequence)
        self._requests[request.request_id] = state
        if sequence.pages_at_most > self.keeper.num_pages_for_requests:  # it did when it was submitted
            error = CacheTooSmallError(num_tokens, sequence.pages_at_most, self.keeper.num_pages_for_requests)
            self._end_request(request.request_id, "error", error)
            return
        if self._tokenizer_failed(state, state.branches[0]):
            return
        self.scheduler.add(sequence, priority=request.priority, num_tokens=len(prompt) + request.max_tokens * request.num_branches)

    def _add_branch(self, state: RequestState, sequence: Sequence) -> None:
        model, index = self.runner.model, len(state.branches)
        branch = Branch(state.request, index, sequence, self.tokenizer, model.eos_token_ids, model.vocab_size)
        if self.scheduler.cache.takes_back:
            sequence.drafter = drafter_of(branch, self.prompt_lookup_num_tokens)
        state.branches.append(branch)
        self._branches[sequence.arrival] = (state, branch)

    def _fork(self, state: RequestState) -> None:
        """Make the other branches of a request, where they are not there yet; each is drawn its first token from the first one's logits."""
        first = state.branches[0].sequence
        for i in range(len(state.branches), state.request.num_branches):
            self._add_branch(state, first.fork(first.arrival + i))

    def cancel(self, request_id: str) -> None:
        """End a request now; its pages are back before the next step. Nothing happens when it has ended."""
        self._end_request(request_id, "cancelled", None)

    def step(self) -> None:
        """Plan, run, commit, deliver. A forward that raises commits nothing and ends only the requests that were in the step."""
        self.runner.log.begin()
        self.keeper.tend()
        self.scheduler.tier.poll()
        plan = self.scheduler.plan()
        if plan is None:
            self.scheduler.tier.wait()
            return
        self._note_starts(plan)
        for work in plan.works:
            if work.draws:
                self._fork(self._branches[work.sequence.arrival][0])
        wanted = [together for work in plan.works for together in self._wanted(work)]
        pooled = [(self._branches[work.sequence.arrival][0], work.pooled) for work in plan.works if work.pooled]
        self.runner.log.mark("plan")
        began = time.perf_counter()
        try:
            rows = [[one.next_row() for one in together] for _, together in wanted]
            self.masks.start([one.guide for _, together in wanted for one in together if not isinstance(one, PromptToken) and one.guide])
            drawn, hidden = self.runner.run(plan, rows, before_sampling=self.masks.wait)
        except Exception as error:
            self._fail(plan, error)
            return
        self.scheduler.commit(plan)
        self.scheduler.tier.note_step(plan.num_tokens, time.perf_counter() - began)
        self._note_computed(plan)
        self.runner.log.mark("commit")
        self._pool(pooled, hidden)
        for (state, together), tokens in zip(wanted, drawn, strict=True):
            for one, token in zip(together, tokens, strict=True):
                if isinstance(one, PromptToken):
                    self._note_score(state, one, token)
                elif isinstance(one, Branch):
                    self._deliver(state, one, token)
                elif one.stands:
                    self._accept(state, one, token)
        self.scheduler.settle(plan)
        self.runner.log.mark("deliver")

    def _wanted(self, work: Work) -> Iterator[tuple[RequestState, list[Branch | PromptToken | AfterDraft]]]:
        """For each row of logits that a work gives: whose next token it scores or draws. A request's first tokens are drawn from one."""
        state, branch = self._branches[work.sequence.arrival]
        first = work.sequence.num_committed + 1
        for position in range(first, first + work.num_scored):
            yield state, [state.prompt_token(position)]
        if work.draws and state.request.max_tokens:
            yield state, [branch] if branch.token_ids else [*state.branches]
            guide = branch.guide
            for i, draft in enumerate(work.drafts, 1):
                guide = guide.after(draft) if guide is not None else None
                yield state, [AfterDraft(branch, len(branch.token_ids), work.drafts[:i], guide)]
        elif work.draws and state.pool is not None:
            yield state, []
        elif work.draws:
            yield state, [state.prompt_token(first + work.num_tokens - 1)]

    def _pool(self, pooled: list[tuple[RequestState, range]], hidden: torch.Tensor) -> None:
        """Hand the hidden states of a step to the requests that want them, each those of its positions."""
        at = 0
        for state, positions in pooled:
            assert state.pool is not None
            state.pool.add(positions.start, hidden[at : at + len(positions)])
            at += len(positions)
            request_id = state.request.request_id
            if not state.pool.finite:
                self._end_request(request_id, "error", NonFiniteLogitsError(f"request {request_id}: the model's hidden states hold NaN or infinity"))
            elif state.answered:
                self._end_request(request_id, "length", None)

    def _accept(self, state: RequestState, one: AfterDraft, token: Sampled) -> None:
        """A draft was right: it is in the cache, and what was drawn behind it stands."""
        if one.guide is not None and one.branch.guide is not None and one.guide.error:
            one.branch.guide.fail(one.guide.error)
        self.scheduler.accept(one.branch.sequence)
        self.num_accepted_tokens += 1
        state.accepted_tokens += 1
        state.computed_tokens += 1
        state.rejected_tokens -= 1
        self._deliver(state, one.branch, token)

    def _note_score(self, state: RequestState, one: PromptToken, token: Sampled) -> None:
        request_id = state.request.request_id
        if not token.ok:
            self._end_request(request_id, "error", _failure(request_id, token))
            return
        state.prompt_scores[one.position] = token
        if state.answered:
            self._end_request(request_id, "length", None)

    def _deliver(self, state: RequestState, branch: Branch, token: Sampled) -> None:
        if branch.finish_reason is not None:  # a sister's NaN has ended the request within this step
            return
        guide = branch.guide
        if not token.ok or (guide is not None and guide.error):
            if token.failure != "nothing_left" or guide is None or not guide.satisfied:
                self._end_request(state.request.request_id, "error", _failure(state.request.request_id, token, guide))
                return
            event = branch.end("stop")  # the text is complete, and there is no end to be drawn
        else:
            if state.first_token_s is None:
                state.first_token_s = time.perf_counter()
            self.num_drawn_tokens += 1
            event = branch.push(token)
        if self._tokenizer_failed(state, branch):
            return
        if branch.finish_reason is not None:
            self._close(branch)
        elif branch.index and len(branch.token_ids) == 1:  # from here on it is a sequence like any other, with its first token in hand
            self.scheduler.add_fork(branch.sequence)
        self._emit(state, event)

    def _tokenizer_failed(self, state: RequestState, branch: Branch) -> bool:
        """Whether it did, for this branch; its request has ended then."""
        if branch.failure is None:
            return False
        request_id, error = state.request.request_id, branch.failure
        branch.finish_reason = branch.stop_reason = None  # an end within this step does not stand: its text is not whole
        failure = TokenizerError(f"request {request_id}: the tokenizer raised while decoding: {type(error).__name__}: {error}")
        failure.__cause__ = error
        self._end_request(request_id, "error", failure)
        return True

    def _fail(self, plan: StepPlan, error: Exception) -> None:
        log.error("a step failed; its %d requests end, nothing of it was committed", len(plan.works), exc_info=error)
        requests = set()
        for seq, num_tokens, _ in plan.works:
            state = self._branches[seq.arrival][0]
            state.rejected_tokens += num_tokens
            requests.add(state.request.request_id)
        self.scheduler.abandon(plan)
        for request_id in requests:
            failure = StepError(f"request {request_id}: the model's forward failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._end_request(request_id, "error", failure)

    def end_all(self, reason: FinishReason, error: Exception | None) -> None:
        """End every open request."""
        for request_id in list(self._requests):
            self._end_request(request_id, reason, error)

    def _end_request(self, request_id: str, reason: FinishReason, error: Exception | None) -> None:
        state = self._requests.get(request_id)
        if state is None:
            return
        state.error = error
        self._fork(state)
        for branch in state.branches:
            if branch.finish_reason is None:
                event = branch.end(reason)
                # Keys and values behind NaN logits may be NaN themselves; nobody shall hit them.
                self._close(branch, keep=not isinstance(error, NonFiniteLogitsError))
                self._emit(state, event)

    def _close(self, branch: Branch, keep: bool = True) -> None:
        sequence = branch.sequence
        state, _ = self._branches.pop(sequence.arrival)
        sisters = sequence.own_root and any(one.finish_reason is None for one in state.branches)
        self.scheduler.finish(sequence, keep=keep, sisters=sisters)

    def _emit(self, state: RequestState, event: TokenEvent) -> None:
        if state.ended:
            del self._requests[state.request.request_id]
            output = state.output(self.runner.store.page_bytes, self.keeper.text_of)
            if state.request.params.best_of is not None:  # which ended last says nothing, and may not be given back
                one = output.outputs[0]
                told = (one.text, one.token_ids, one.logprobs, one.top_logprobs, one.finish_reason, one.stop_reason)
                event = TokenEvent(output.request_id, one.index, *told)
            event = event.with_output(output)
        elif state.request.params.best_of is not None:  # nobody knows yet which are the best
            return
        state.sink(event)

    def _note_starts(self, plan: StepPlan) -> None:
        """Note, of requests without a token yet, what they found when they started, and how many tokens of them this step computes.

        Of those with several sequences, how many pages these have together.
        """
        several = {}
        for seq, num_tokens, _ in plan.works:
            state, _ = self._branches[seq.arrival]
            if state.request.num_branches > 1:
                several[state.request.request_id] = state
            if state.first_token_s is not None:
                continue
            if state.started_s is None:
                state.started_s = time.perf_counter()
                state.cached_tokens = seq.num_committed
                state.waited_for = seq.waits_for or None
                state.miss = find_miss(self.scheduler.cache, seq, seq.num_committed)
            self.runner.log.note_chunk(state.request.request_id, num_tokens)
        for state in several.values():
            state.note_pages()

    def _note_computed(self, plan: StepPlan) -> None:
        self.num_steps += 1
        self.num_computed_tokens += plan.num_tokens
        for seq, num_tokens, drafts in plan.works:
            state = self._branches[seq.arrival][0]
            state.computed_tokens += num_tokens - len(drafts)
            state.rejected_tokens += len(drafts)  # until they are accepted
            self.num_drafted_tokens += len(drafts)

    def stacked(self) -> StackedView:
        """See `LLM.stacked`."""
        slots = {
            (state.request.request_id, branch.index): (branch.sequence.tables[0][0], branch.sequence.num_committed)
            for state, branch in self._branches.values()
            if branch.sequence.num_committed
        }
        return stacked_view(self.runner.store, slots)

    def branches(self) -> Iterable[tuple[RequestState, Branch]]:
        """Every open sequence and its request."""
        return self._branches.values()

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and the state of the pool now."""
        counts = {"num_computed_tokens": self.num_computed_tokens, "num_drawn_tokens": self.num_drawn_tokens, "num_steps": self.num_steps}
        counts |= {"num_drafted_tokens": self.num_drafted_tokens, "num_accepted_tokens": self.num_accepted_tokens}
        return {**counts, **self.keeper.stats()}


def _failure(request_id: str, token: Sampled, guide: Guide | None = None) -> RequestFailedError:
    if guide is not None and guide.error:
        return RequestFailedError(f"request {request_id}: structured: {guide.error}")
    if token.failure == "not_finite":
        return NonFiniteLogitsError(f"request {request_id}: the model's logits hold NaN or infinity")
    fields = "allowed_token_ids, logit_bias, min_tokens, stop_token_ids and structured"
    return NothingToDrawError(f"request {request_id}: {fields} together leave no token to draw")
