"""A step is a transaction: one that fails leaves cache and tables as they were and ends only the requests that were in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from quire import LLM, NonFiniteLogitsError, SamplingParams, StepError
from tests.engine.conftest import Checkpoint

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, logprobs=0, ignore_eos=True)
PROMPT = list(range(3, 40))


class Fault(MemoryError):
    pass


class Watched:
    """A `ProgramStep` that calls `before` as each native call comes to attend in it: of a layer, or of a chain of them."""

    def __init__(self, step: Any, before: Callable[[], None]) -> None:
        self._step, self._before = step, before
        self.commit = step.commit

    @property
    def handle(self) -> Any:
        self._before()
        return self._step.handle

    @property
    def staged_layers(self) -> list[int]:
        layers: list[int] = self._step.staged_layers
        return layers


def before_layers(llm: LLM, call: Callable[[], None]) -> Callable[[], None]:
    """Have `call` called before each native call of layers; returns what undoes it. All layers are native programs here, in chains but in the
    first forward."""
    store = llm._built.engine.runner.store
    original = store.program_steps
    assert original is not None
    store.program_steps = lambda *given: Watched(original(*given), call)

    def undo() -> None:
        store.program_steps = original

    return undo


def snapshot(llm: LLM) -> tuple[Any, ...]:
    cache = llm._built.engine.scheduler.cache
    return {k: v for k, v in cache.index._pages.items()}, llm._built.engine.runner.store.pages.clone()


@pytest.mark.parametrize("where", ["layer", "sampler", "first layer", "build"])
def test_a_fault_changes_nothing(checkpoint: Checkpoint, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(checkpoint("gemma3_text"), page_size=4, max_tokens_per_step=16) as llm:
        runner = llm._built.engine.runner
        runner.store.pages.zero_()
        expected = llm.generate([PROMPT], GREEDY)[0]
        index, pages = snapshot(llm)
        calls = 0

        def fail(*args: Any, **kwargs: Any) -> None:
            nonlocal calls
            calls += 1
            if where != "layer" or calls % 2 == 0:  # between two chains of this family
                raise Fault("injected")

        undo: Callable[[], None] = monkeypatch.undo
        if where == "build":
            monkeypatch.setattr("quire.engine.runner.Batches.of", fail)
        elif where == "sampler":
            monkeypatch.setattr(runner.sampler, "sample", fail)
        else:
            undo = before_layers(llm, fail)
        if where == "layer":  # whose forward is several native calls, not one
            lowered = llm._built.model.lowered
            assert lowered is not None and lowered.replay.native is not None
            lowered.replay.native = None
        other = [7, 5, *PROMPT]
        output = llm.generate([other], GREEDY)[0]
        assert isinstance(output.error, StepError) and isinstance(output.error.__cause__, Fault)
        assert output.outputs[0].finish_reason == "error" and output.outputs[0].token_ids == []
        assert output.receipt.rejected_tokens > 0 and output.receipt.staged_tokens == output.receipt.rejected_tokens + output.receipt.computed_tokens
        after_index, after_pages = snapshot(llm)
        assert after_index == index and torch.equal(pages, after_pages)
        undo()
        llm.check_integrity()
        assert llm.stats()["num_held_pages"] == 0
        again = llm.generate([PROMPT], GREEDY)[0]
        assert again.outputs[0].logprobs == expected.outputs[0].logprobs and again.receipt.cached_tokens > 0


def test_only_requests_of_the_failed_step_end(checkpoint: Checkpoint) -> None:
    """One sequence at a time: the step that fails is the first request's; the second runs on, from pages the first had committed."""
    with LLM(checkpoint("llama"), page_size=4, max_tokens_per_step=8, max_sequences=1) as llm:
        llm.generate([[50, 51]], GREEDY)  # from here on layers are in chains
        calls = 0

        def fail() -> None:
            nonlocal calls
            calls += 1
            if calls == 4:  # the fourth step of the first request, in which a chain is all of the layers
                raise Fault("injected")

        before_layers(llm, fail)
        first, second = llm.generate([PROMPT, PROMPT], GREEDY)
        assert isinstance(first.error, StepError)
        assert second.error is None and len(second.outputs[0].token_ids) == 12
        assert second.receipt.cached_tokens == 24, "the three chunks committed before the fault"
        llm.check_integrity()


def test_nan_logits_fail_one_request(checkpoint: Checkpoint) -> None:
    with LLM(checkpoint("llama"), prefix_sharing=True) as llm:
        model = llm._built.engine.runner.model
        expected = llm.generate([PROMPT[:9]], GREEDY)[0].outputs[0].token_ids
        original = model.forward

        def poisoned(step: Any, ids: torch.Tensor, positions: torch.Tensor, logits_at: torch.Tensor, *more: Any) -> torch.Tensor:
            logits = original(step, ids, positions, logits_at, *more).clone()
            logits[ids[logits_at] == 599] = float("nan")
            return logits

        model.forward = poisoned
        good, bad = llm.generate([PROMPT[:9], [5, 6, 599]], GREEDY)
        assert good.outputs[0].token_ids == expected
        assert isinstance(bad.error, NonFiniteLogitsError) and bad.outputs[0].finish_reason == "error"
        llm.check_integrity()
        assert llm.generate([[5, 6, 599, 7]], GREEDY)[0].receipt.cached_tokens == 0, "pages behind NaN are not reused"


def test_nan_logits_of_one_sister_end_both_and_nothing_else(checkpoint: Checkpoint) -> None:
    with LLM(checkpoint("llama")) as llm:
        model = llm._built.engine.runner.model
        original = model.forward

        def poisoned(step: Any, ids: torch.Tensor, positions: torch.Tensor, logits_at: torch.Tensor, *more: Any) -> torch.Tensor:
            logits = original(step, ids, positions, logits_at, *more).clone()
            if len(logits_at) == 2:
                logits[0] = float("nan")
            return logits

        model.forward = poisoned
        (output,) = llm.generate([PROMPT[:9]], SamplingParams(n=2, max_tokens=8, seed=1, ignore_eos=True))
        assert isinstance(output.error, NonFiniteLogitsError) and [one.finish_reason for one in output.outputs] == ["error", "error"]
        assert llm.failure is None
        llm.check_integrity()
        model.forward = original
        assert llm.generate([PROMPT[:9]], GREEDY)[0].error is None
