"""Steps of fresh sequences with the engine's own attention, over no pages: what the probe runs on an accelerator.

On the CPU attention is held to the reference by tests, and the probe brings one of its own that is easy to believe. What a compiler made of attention
for the device at hand no test has seen; so there it is asked, too, and compiled, before the first request.
"""

from __future__ import annotations

from collections.abc import Sequence

from quire.engine.batch import fresh
from quire.engine.kernels import Kernels
from quire.policy.groups import arrange
from quire.tensors.attention.base import StepInputs, TableInputs
from quire.tensors.models.model import CausalModel
from quire.tensors.store import PageStore, StagedStep, cached_layers, layer_places

_PAGE_SIZE = 16


class FreshSteps:
    """Makes the step for sequences of these lengths, packed in order, each from position 0; of one sequence with `Kernels.otherwise`, so that what
    has the same bits packed and alone has them either way. Raises as `PageStore`.
    """

    def __init__(self, model: CausalModel, kernels: Kernels) -> None:
        layers = cached_layers(model.layers, model.dtype, None, None)
        arrangement = arrange(layers, _PAGE_SIZE)
        self._packed, self._alone = (
            PageStore(layer_places(arrangement, layers), 1, arrangement.page_bytes, attention, kernels.device)
            for attention in (kernels.attention, kernels.otherwise or kernels.attention)
        )
        self._num_groups = len(arrangement.groups)
        self._feed = kernels.device.feed()

    def __call__(self, lengths: Sequence[int]) -> StagedStep:
        starts, committed, page_ids, page_start, slots = self._feed.tensors(fresh(lengths))
        tables = (TableInputs(page_ids, page_start),) * self._num_groups
        return StagedStep(self._alone if len(lengths) == 1 else self._packed, StepInputs(starts, committed, tables), (slots,) * self._num_groups)
