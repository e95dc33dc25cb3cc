"""The engine: requests in, events out, one step at a time. Synchronous and single-threaded; `worker.py` gives it a thread."""

from __future__ import annotations

import logging
import time
from typing import Any

from quire.engine.runner import Runner
from quire.engine.state import Branch, RequestState, Sink
from quire.errors import NonFiniteLogitsError, RequestFailedError, StepError
from quire.outputs import FinishReason, TokenEvent
from quire.policy.plan import StepPlan
from quire.policy.scheduler import Scheduler
from quire.policy.sequence import Sequence
from quire.request import Request
from quire.tensors.sampler import Sampled
from quire.text.tokenizer import TextTokenizer

log = logging.getLogger("quire")


class Engine:
    """Runs requests to their end. Every accepted request's sink gets its events and, once, an event with its output."""

    def __init__(self, runner: Runner, scheduler: Scheduler, tokenizer: TextTokenizer | None) -> None:
        self.runner, self.scheduler, self.tokenizer = runner, scheduler, tokenizer
        self.num_steps = 0
        self.num_computed_tokens = 0
        self._arrivals = 0
        self._requests: dict[str, RequestState] = {}
        self._branches: dict[int, tuple[RequestState, Branch]] = {}

    @property
    def has_work(self) -> bool:
        """Whether any request is open."""
        return bool(self._requests)

    def add(self, request: Request, sink: Sink) -> None:
        """Queue a checked request."""
        state = RequestState(request, sink)
        for index in range(request.params.n):
            sequence = Sequence(self._arrivals, request.prompt_token_ids, self.scheduler.cache.root)
            branch = Branch(request, index, sequence, self.tokenizer, self.runner.model.eos_token_ids, self.runner.model.vocab_size)
            state.branches.append(branch)
            self._branches[self._arrivals] = (state, branch)
            self._arrivals += 1
            self.scheduler.add(sequence)
        self._requests[request.request_id] = state

    def cancel(self, request_id: str) -> None:
        """End a request now; its pages are back before the next step. Nothing happens when it has ended."""
        self._end_request(request_id, "cancelled", None)

    def step(self) -> None:
        """Plan, run, commit, deliver. A forward that raises commits nothing and ends only the requests that were in the step."""
        plan = self.scheduler.plan()
        if plan is None:
            return
        self._note_start(plan)
        drawing = [self._branches[work.sequence.arrival] for work in plan.works if work.draws]
        try:
            drawn = self.runner.run(plan, [branch.next_row() for _, branch in drawing])
        except Exception as error:
            self._fail(plan, error)
            return
        self.scheduler.commit(plan)
        self.num_steps += 1
        self.num_computed_tokens += plan.num_tokens
        for (state, branch), token in zip(drawing, drawn, strict=True):
            self._deliver(state, branch, token)

    def _deliver(self, state: RequestState, branch: Branch, token: Sampled) -> None:
        if branch.finish_reason is not None:  # a sister's NaN has ended the request within this step
            return
        if not token.ok:
            self._end_request(state.request.request_id, "error", _failure(state.request.request_id, token))
            return
        if state.first_token_s is None:
            state.first_token_s = time.perf_counter()
        event = branch.push(token)
        if branch.finish_reason is not None:
            self._close(branch)
        self._emit(state, event)

    def _fail(self, plan: StepPlan, error: Exception) -> None:
        log.error("a step failed; its %d requests end, nothing of it was committed", len(plan.works), exc_info=error)
        requests = {self._branches[work.sequence.arrival][0].request.request_id for work in plan.works}
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
        for branch in state.branches:
            if branch.finish_reason is None:
                event = branch.end(reason)
                # Keys and values behind NaN logits may be NaN themselves; nobody shall hit them.
                self._close(branch, keep=not isinstance(error, NonFiniteLogitsError))
                self._emit(state, event)

    def _close(self, branch: Branch, keep: bool = True) -> None:
        self.scheduler.finish(branch.sequence, keep=keep)
        del self._branches[branch.sequence.arrival]

    def _emit(self, state: RequestState, event: TokenEvent) -> None:
        if state.ended:
            del self._requests[state.request.request_id]
            event = event.with_output(state.output(self.runner.store.page_bytes))
        state.sink(event)

    def _note_start(self, plan: StepPlan) -> None:
        for seq, num_tokens in plan.works:
            state, _ = self._branches[seq.arrival]
            if state.started_s is None:
                state.started_s = time.perf_counter()
                state.cached_tokens = seq.num_committed
            state.computed_tokens += num_tokens

    def reset_cache(self) -> None:
        """Forget all cached pages; what runs is computed again. For when the weights have changed."""
        self.scheduler.preempt_all()
        self.scheduler.cache.reset()

    def check_integrity(self) -> None:
        """Raise IntegrityError if an invariant of scheduler or cache does not hold."""
        self.scheduler.check_integrity()

    def stats(self) -> dict[str, Any]:
        """Counters since the start and the state of the pool now."""
        pool, scheduler = self.scheduler.cache.pool, self.scheduler
        return {
            "num_pages": pool.num_pages,
            "num_free_pages": pool.num_free,
            "num_cached_pages": pool.num_cached,
            "num_held_pages": pool.num_held,
            "num_waiting": scheduler.num_waiting,
            "num_running": scheduler.num_running,
            "num_preemptions": scheduler.num_preemptions,
            "num_cached_tokens": scheduler.num_cached_tokens,
            "num_computed_tokens": self.num_computed_tokens,
            "num_steps": self.num_steps,
        }


def _failure(request_id: str, token: Sampled) -> RequestFailedError:
    if token.failure == "not_finite":
        return NonFiniteLogitsError(f"request {request_id}: the model's logits hold NaN or infinity")
    return RequestFailedError(f"request {request_id}: allowed_token_ids, logit_bias and min_tokens together leave no token to draw")
