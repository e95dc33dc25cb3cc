"""One plan through the model: copies, forward, draws, and at the very end the commit. Anything that raises leaves the cache as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from quire.engine.batch import Batches
from quire.engine.captured import CapturedSteps, Forward
from quire.engine.steps import StepLog
from quire.policy.groups import Group
from quire.policy.plan import StepPlan
from quire.tensors.models.hidden import HiddenRows
from quire.tensors.models.model import CausalModel
from quire.tensors.sampler import Row, Sampled, Sampler
from quire.tensors.store import PageStore, StagedStep


class Runner:
    """A model, the store it attends to and the sampler behind it; on an accelerator, small steps may be `captured`."""

    def __init__(
        self, model: CausalModel, store: PageStore, sampler: Sampler, groups: Sequence[Group], captured: CapturedSteps | None = None
    ) -> None:
        self.model, self.store, self.sampler, self.groups, self.device = model, store, sampler, tuple(groups), store.device
        self.log = StepLog()
        self._batches, self._captured = Batches(groups, store.device), captured

    def run(
        self,
        plan: StepPlan,
        rows: Sequence[Sequence[Row]],
        before_sampling: Callable[[], None] = lambda: None,
        before_commit: Callable[[Sequence[Sampled]], None] = lambda drawn: None,
    ) -> tuple[list[list[Sampled]], torch.Tensor]:
        """Compute the plan and draw or score a token for each of `rows[i]`, all from the i-th row of logits that its works give.

        Returns these, and the final hidden states [H, D] of the tokens that its works pool, one work after the other, on the CPU. Logits and states
        are what a step brings back from its device, and all that it waits for.
        The rows' masks are read after `before_sampling` has returned; until then somebody else may still be filling them. Where `before_commit`
        raises of what was drawn, nothing has happened: what a step computes twice must be committed once, for a state moves on with each commit.
        """
        self.store.copy_pages(plan.copies)
        logits, states, commit = (self._captured.run(plan) if self._captured is not None else None) or self._forward(plan)
        logits, states = self.device.to_host(logits, states)
        self.log.mark("forward")
        flat = [row for together in rows for row in together]
        if any(len(together) != 1 for together in rows):
            logits = logits[torch.tensor([i for i, together in enumerate(rows) for _ in together], dtype=torch.long)]
        before_sampling()
        sampled = self.sampler.sample(logits, flat)
        self.log.mark("sample")
        before_commit(sampled)
        commit()
        drawn = iter(sampled)
        return [[next(drawn) for _ in together] for together in rows], states

    def _forward(self, plan: StepPlan) -> Forward:
        batch = self._batches.of(plan)
        step = StagedStep(self.store, batch.inputs, batch.slots)
        hidden = HiddenRows(batch.hidden_at)
        logits = self.model.forward(step, batch.input_ids, batch.positions, batch.logits_at, hidden)
        return logits, hidden.states, step.commit
