"""Steps of few tokens on an accelerator as captured graphs: all kernels of a step started at once, without the model's Python between them.

    load    for each size N a step of N tokens runs; one on other numbers is captured; replayed on the first ones it must give the same bits
    step    T <= N tokens: their numbers, padded to N, in one copy to where the graph reads them; replay; the first R of N rows of logits

    T = 3, N = 4   input_ids  a b b b    query_start  0 1 3 3 3    num_committed  7 4 0 0    slots  71 20 21 -1    logits_at  0 2 0 0
                          padding ┘            of no sequence ┘ ┘                       nowhere ┘            unread ┘ ┘

A padded token belongs to no sequence: it attends to nothing and nothing of it is kept; and no row's bits depend on the rows beside it, which is why
steps of any sizes have the same ones. What a step stages lies in the graph's memory until its commit, which is a graph as well.

Graphs of decoding steps, their sizes and their padding are vLLM's and SGLang's practice.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch

from quire.engine.batch import Batch, fresh, packed, placed
from quire.policy.groups import Group
from quire.policy.plan import StepPlan
from quire.tensors.attention.base import StepInputs, TableInputs
from quire.tensors.device import Graphs
from quire.tensors.feeds import Feed
from quire.tensors.models.facts import ordinary_tokens
from quire.tensors.models.hidden import NO_STATES
from quire.tensors.models.model import CausalModel
from quire.tensors.store import PageStore, StagedStep

MAX_SIZE = 512  # tokens: beyond, a step's kernels take longer than it takes to start them
_ROWS = 64  # that a product computes at once: sizes beyond it are its multiples

Forward = tuple[torch.Tensor, torch.Tensor, Callable[[], None]]  # logits [R, V], final hidden states [H, D], and what commits the step


@dataclass(frozen=True, slots=True)
class _Graph:
    """Steps of up to `size` tokens. `logits` [size, V] are there behind `replay`, until the next one."""

    size: int
    feed: Feed
    logits: torch.Tensor
    replay: Callable[[], None]
    commit: Callable[[], None]


class CapturedSteps:
    """Graphs of steps of up to `limit` tokens over a store. `told`: which sizes there are, and why no more."""

    def __init__(self, graphs: Graphs, model: CausalModel, store: PageStore, groups: Sequence[Group], *, context_len: int, limit: int) -> None:
        """Call it on the thread of `Device.on_a_thread`. Where a step cannot be captured (experts, whose code asks which tokens they get; no memory),
        it runs as without, and `told` tells the reason.
        """
        self._graphs, self._model, self._store, self._groups = graphs, model, store, tuple(groups)
        self._table_len = sum(-(-context_len // group.page_size) for group in groups)
        self._captured: list[_Graph] = []
        why = ""
        try:
            for size in sizes(min(limit, MAX_SIZE)):
                self._captured.append(self._capture(size))
        except Exception as error:  # a model's own code may raise anything
            why = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        most = f"steps of up to {self._captured[-1].size} tokens captured" if self._captured else "no step captured"
        self.told = f"{most} ({why})" if why else most

    def run(self, plan: StepPlan) -> Forward | None:
        """What a plan's forward gives, its logits until the next one runs; None if it fits no graph or has hidden states to give."""
        num_tokens = plan.num_tokens
        graph = next((graph for graph in self._captured if graph.size >= num_tokens), None)
        if graph is None or any(work.pooled for work in plan.works):
            return None
        ids, positions, logits_at, _, starts, committed = packed(plan)
        num_rows = len(logits_at)
        graph.feed.tensors(_padded([ids, positions, logits_at, starts, committed], [placed(plan, group) for group in self._groups], graph.size))
        graph.replay()
        return graph.logits[:num_rows], NO_STATES, graph.commit

    def _capture(self, size: int) -> _Graph:
        feed, numbers = self._graphs.feed(self._room(size)), self._fresh([size], 1)
        batch = _batch(feed.tensors(numbers))

        def run() -> tuple[torch.Tensor, StagedStep]:
            step = StagedStep(self._store, batch.inputs, batch.slots)
            return self._model.forward(step, batch.input_ids, batch.positions, batch.logits_at), step

        with self._graphs.without_waiting():
            logits, step = run()
            step.commit()
        expected = self._bits(logits)
        feed.tensors(self._fresh([1] * size, 0))
        (logits, step), replay = self._graphs.capture(run)
        _, commit = self._graphs.capture(step.commit)
        feed.tensors(numbers)
        replay()
        if not torch.equal(self._bits(logits), expected):
            raise RuntimeError(f"a captured step of {size} tokens gave other bits than it gives itself")
        return _Graph(size, feed, logits, replay, commit)

    def _bits(self, logits: torch.Tensor) -> torch.Tensor:
        (rows,) = self._store.device.to_host(logits)
        return rows.view(torch.uint8)

    def _fresh(self, lengths: Sequence[int], first: int) -> list[array[int]]:
        """Numbers of new sequences that have no page and get none, of the tokens from the first one on."""
        tokens, num = ordinary_tokens(self._model.transformers_model.config, min(self._model.vocab_size, 2 * MAX_SIZE)), sum(lengths)
        ids = array("q", (tokens[(first + i) % len(tokens)] for i in range(num)))
        positions = array("q", (i for count in lengths for i in range(count)))
        starts, committed, *nowhere = fresh(lengths)
        return _padded([ids, positions, array("q", range(num)), starts, committed], [nowhere] * len(self._groups), num)

    def _room(self, size: int) -> list[array[int]]:
        """Arrays of the lengths that `_padded` gives, but for page ids, of which so many sequences have no more."""
        lengths = [("q", size)] * 3 + [("i", size + 1), ("i", size)] + [("i", size + 1), ("q", size)] * len(self._groups)
        return [array(code, [0]) * num for code, num in [*lengths, ("i", size * self._table_len)]]


def sizes(limit: int) -> Iterator[int]:
    """Of graphs for steps of up to `limit` tokens."""
    size = 1
    while size < limit:
        yield size
        size = size * 2 if size < _ROWS else size + _ROWS
    yield limit


def _padded(numbers: list[array[int]], tables: Sequence[Sequence[array[int]]], size: int) -> list[array[int]]:
    """ids, positions, logits_at, query_start, num_committed; for each group where its sequences' tables begin, and slots; all page ids on end."""
    ids, positions, logits_at, starts, committed = numbers
    for values, num, value in (
        (ids, size, ids[-1]),
        (positions, size, positions[-1]),
        (logits_at, size, 0),
        (starts, size + 1, starts[-1]),
        (committed, size, 0),
    ):
        values.extend(repeat(value, num - len(values)))
    page_ids, rest = array("i"), []
    for table, begins, slots in tables:
        begins = array("i", (len(page_ids) + begin for begin in begins))
        begins.extend(repeat(begins[-1], size + 1 - len(begins)))
        slots.extend(repeat(-1, size - len(slots)))
        page_ids.extend(table)
        rest += [begins, slots]
    return [*numbers, *rest, page_ids]


def _batch(tensors: Sequence[torch.Tensor]) -> Batch:
    ids, positions, logits_at, starts, committed, *rest, page_ids = tensors
    tables = tuple(TableInputs(page_ids, begins) for begins in rest[::2])
    return Batch(ids, positions, logits_at, logits_at[:0], StepInputs(starts, committed, tables), tuple(rest[1::2]))
