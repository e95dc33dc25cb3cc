"""Steps that the caller decides: no queue and no budget, only the cache, the forward and the sampler, each call a transaction."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from quire.config import EngineConfig
from quire.engine.build import build_engine
from quire.engine.home import OwnThread
from quire.errors import InvalidRequestError, NonFiniteLogitsError, NothingToDrawError, OutOfPagesError, StepError
from quire.params import SamplingParams
from quire.policy import sequence as policy
from quire.policy.plan import StepPlan, Work
from quire.tensors.models.probe import probe_again
from quire.tensors.sampler import Row, Sampled, SequenceState


@dataclass(slots=True)
class Held:
    """A sequence that holds pages, what its draws depend on, and the token that a step has drawn for it and nobody has taken yet.

    `suspect`: nobody shall hit its pages. A step has given NaN logits for it, so its keys and values may be NaN themselves; or a copy has failed.
    """

    sequence: policy.Sequence
    state: SequenceState
    drawn: Sampled | None = None
    suspect: bool = False

    @property
    def next_row(self) -> Row:
        """What the sampler must know to draw its next token."""
        return Row(self.state, len(self.sequence.tokens))

    def take(self, token: Sampled) -> int:
        """Append a drawn token, and return it."""
        self.drawn = None
        self.sequence.tokens.append(token.token_id)
        self.state.append(token.token_id)
        return token.token_id


class ManualEngine:
    """One model and its cache, moved by hand. Methods may be called from any thread; one runs at a time."""

    def __init__(self, source: str | PreTrainedModel, config: EngineConfig) -> None:
        self.built = build_engine(source, config)
        self._cache, self._runner = self.built.engine.scheduler.cache, self.built.engine.runner
        self._max_tokens = self.built.info.max_tokens_per_step
        self._arrivals = itertools.count()
        self._thread = OwnThread("quire-manual", self._runner.device.take_thread)
        self.home = self._thread.home

    def prefill(self, prompt: tuple[int, ...], params: SamplingParams) -> tuple[Held, Sampled]:
        """A prompt, computed in chunks, and the token drawn after it, with its logits. Raises OutOfPagesError, StepError; then nothing is held."""
        return self._thread.run(lambda: self._prefill(prompt, params), lambda computed: self._release(computed[0]))

    def fork(self, held: Held, logits: torch.Tensor, seeds: Sequence[int]) -> list[tuple[Held, Sampled]]:
        """Sisters that share a computed prompt, one for each seed, each with the token drawn for it. Raises OutOfPagesError; then none is held."""
        return self._thread.run(lambda: self._fork(held, logits, seeds), lambda sisters: self._let_go([sister for sister, _ in sisters]))

    def step(self, many: Mapping[str, Held]) -> list[Sampled]:
        """Compute the last token of each sequence and draw its next, not yet appended. Raises OutOfPagesError, StepError, and NonFiniteLogitsError
        with the names of those whose logits they were; then nothing has happened. One whose token nobody has taken, as the call that drew it was
        broken off, has that one again."""
        return self._thread.run(lambda: self._step_on(many))

    def release(self, held: Held) -> None:
        """Let a sequence's pages go; the complete ones stay cached, unless logits behind them were NaN."""
        self._thread.run(lambda: self._release(held))

    def release_later(self, held: Held) -> None:
        """`release`, from where nothing may be waited for or raised."""
        self._thread.run_later(lambda: self._release(held))

    def check_integrity(self) -> None:
        """Raise IntegrityError if an invariant of the cache does not hold."""
        self._thread.run(self._cache.check_integrity)

    def close(self) -> None:
        """End the thread and leave a live model as it was."""
        self._thread.close()
        self.built.model.close()

    # -- on the thread --------------------------------------------------------------------------------------------------------------------

    def _prefill(self, prompt: tuple[int, ...], params: SamplingParams) -> tuple[Held, Sampled]:
        self._forget_old_weights()
        seq = self.built.engine.keeper.sequence(prompt, "", arrival=next(self._arrivals))
        seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(8), "little")
        held = Held(seq, SequenceState(replace(params, seed=seed), seed, self.built.model.vocab_size, prompt))
        wants_logits = SequenceState(replace(params, return_logits=True), seed, self.built.model.vocab_size, prompt)
        try:
            self._cache.match(seq)
            held.suspect = True  # until the part of a page that it starts with is there
            self._copy()
            held.suspect = False
            while True:
                num_tokens = min(seq.num_remaining, self._max_tokens)
                if not self._cache.grow(seq, num_tokens):
                    raise OutOfPagesError(self._cache.pages_wanted(seq, seq.num_known), self._cache.pool.num_available)
                drawn = self._step({"the prompt": held}, num_tokens, [Row(wants_logits, len(prompt))])
                if drawn:
                    return held, drawn[0]
        except BaseException:
            self._release(held)
            raise

    def _fork(self, held: Held, logits: torch.Tensor, seeds: Sequence[int]) -> list[tuple[Held, Sampled]]:
        self._forget_old_weights()
        sisters: list[Held] = []
        try:
            for seed in seeds:
                seq = held.sequence.fork(next(self._arrivals))
                state = SequenceState(held.state.params, seed, held.state.vocab_size, seq.tokens)
                if not self._cache.fork(held.sequence, seq):
                    raise OutOfPagesError(len(self._cache.groups), self._cache.pool.num_available)
                sisters.append(Held(seq, state))
            drawn = self._runner.sampler.sample(logits.expand(len(seeds), -1), [sister.next_row for sister in sisters])
            self._copy()
        except BaseException:
            self._let_go(sisters)
            raise
        return list(zip(sisters, drawn, strict=True))

    def _let_go(self, sisters: Sequence[Held]) -> None:
        for sister in sisters:
            self._cache.release(sister.sequence, keep=False)

    def _step_on(self, many: Mapping[str, Held]) -> list[Sampled]:
        self._forget_old_weights()
        lacking = {name: held for name, held in many.items() if held.drawn is None}
        wanted = sum(self._cache.pages_wanted(held.sequence, held.sequence.num_known) for held in lacking.values())
        if not all(self._cache.grow(held.sequence, 1) for held in lacking.values()):
            raise OutOfPagesError(wanted, self._cache.pool.num_available)
        if lacking:
            drawn = self._step(lacking, 1, [held.next_row for held in lacking.values()])
            for held, token in zip(lacking.values(), drawn, strict=True):
                held.drawn = token
        return [held.drawn for held in many.values() if held.drawn is not None]

    def _release(self, held: Held) -> None:
        self._cache.release(held.sequence, keep=not held.suspect)

    def _step(self, named: Mapping[str, Held], num_tokens: int, rows: list[Row]) -> list[Sampled]:
        works = tuple(Work(held.sequence, num_tokens) for held in named.values())
        drawing = [name for name, work in zip(named, works, strict=True) if work.draws]

        def check(drawn: Sequence[Sampled]) -> None:
            if broken := [name for name, token in zip(drawing, drawn, strict=True) if token.failure == "not_finite"]:
                for name in broken:
                    named[name].suspect = True
                raise NonFiniteLogitsError(f"{', '.join(broken)}: the model's logits hold NaN or infinity")
            if not all(token.ok for token in drawn):
                raise NothingToDrawError("allowed_token_ids and logit_bias together leave no token to draw")

        asked = [[row] for row, work in zip(rows, works, strict=True) if work.draws]
        try:
            drawn, _ = self._runner.run(StepPlan(works, ()), asked, before_commit=check)
        except (NonFiniteLogitsError, NothingToDrawError):
            raise
        except Exception as error:
            raise StepError(f"the model's forward failed: {type(error).__name__}: {error}") from error
        for work in works:
            self._cache.commit(work.sequence, work.num_tokens)
        return [token for together in drawn for token in together]

    def _copy(self) -> None:
        copies = self._cache.copies.take()
        try:
            self._runner.store.copy_pages(copies)
        finally:
            self._cache.copies.done(copies)

    def _forget_old_weights(self) -> None:
        """Nothing cached outlives a change of a live model's weights; what is held cannot be forgotten, so then the change is refused."""
        model = self.built.model
        if not model.changed:
            return
        if self._cache.pool.num_held:
            raise InvalidRequestError("model", "other weights", "what it was while sequences are held")
        self._cache.reset()
        probe_again(model)
