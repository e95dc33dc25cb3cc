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
from quire.tensors.triton_cut import ALWAYS

_PAGE_SIZE = 16


class FreshSteps:
    """Makes the step for sequences of these lengths, packed in order, each from position 0. Raises as `PageStore`.

    Within its context all sums of packed sequences are cut among programs and none of a single one: what has the same bits packed and alone has them
    either way.
    """

    def __init__(self, model: CausalModel, kernels: Kernels) -> None:
        layers = cached_layers(model.layers, model.dtype, None, None)
        arrangement = arrange(layers, _PAGE_SIZE)
        self._store = PageStore(layer_places(arrangement, layers), 1, arrangement.page_bytes, kernels.attention, kernels.device)
        self._cut, self._usual = kernels.cut, kernels.cut.least_programs
        self._num_groups = len(arrangement.groups)
        self._feed = kernels.device.feed()

    def __enter__(self) -> FreshSteps:
        return self

    def __exit__(self, *_: object) -> None:
        self._cut.least_programs = self._usual

    def __call__(self, lengths: Sequence[int]) -> StagedStep:
        self._cut.least_programs = 1 if len(lengths) == 1 else ALWAYS
        starts, committed, page_ids, page_start, slots = self._feed.tensors(fresh(lengths))
        tables = (TableInputs(page_ids, page_start),) * self._num_groups
        return StagedStep(self._store, StepInputs(starts, committed, tables), (slots,) * self._num_groups)
