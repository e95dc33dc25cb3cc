"""Turns a plan into tensors: the packed tokens of all works, one after the other, and the page tables they need.

plan: a 3 tokens (a prompt's chunk), b 1 token (decoding), c 2 tokens

input_ids     a a a b c c      positions   6 7 8 40 0 1      logits_at   2 3 5   (a, b and c each draw after their last token)
query_start   0 3 4 6          num_committed   6 40 0      (a work with scores or drafts gives logits after earlier tokens, too)
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat

import torch

from quire.policy.groups import Group
from quire.policy.plan import StepPlan
from quire.tensors.attention.base import StepInputs, TableInputs
from quire.tensors.device import CPU, Device


@dataclass(frozen=True, slots=True)
class Batch:
    """`input_ids`, `positions` int64 [T]; `logits_at` int64 [R] and `hidden_at` int64 [H], the packed index of each token behind which logits, or
    whose final hidden state, are wanted, in the plan's order; `slots[g]` int64 [T], where group g's keys and values go."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    logits_at: torch.Tensor
    hidden_at: torch.Tensor
    inputs: StepInputs
    slots: tuple[torch.Tensor, ...]


class Batches:
    """Makes the batch of each plan for these groups. One of the same shape as the last may be the last one, its memory written anew."""

    def __init__(self, groups: Sequence[Group], device: Device = CPU) -> None:
        self._groups = tuple(groups)
        self._feed = device.feed()
        self._tensors: tuple[torch.Tensor, ...] = ()
        self._batch: Batch | None = None

    def of(self, plan: StepPlan) -> Batch:
        """The batch of a plan, on the device, until the next one is made."""
        tensors = self._feed.tensors([*packed(plan), *(values for group in self._groups for values in placed(plan, group))])
        if self._batch is None or tensors is not self._tensors:
            self._tensors, self._batch = tensors, _batch(tensors)
        return self._batch


def packed(plan: StepPlan) -> list[array[int]]:
    """Ids, positions, places of logits and of hidden states; query starts and committed lengths."""
    ids, positions, logits_at, hidden_at = array("q"), array("q"), array("q"), array("q")
    starts, committed = array("i", [0]), array("i")
    for work in plan.works:
        seq, first = work.sequence, work.sequence.num_committed
        logits_at.extend(range(len(ids), len(ids) + work.num_scored))
        hidden_at.extend(len(ids) - first + position for position in work.pooled)
        ids.extend(seq.tokens[first : first + work.num_sure])
        ids.extend(work.drafts)
        positions.extend(range(first, first + work.num_tokens))
        starts.append(len(ids))
        committed.append(first)
        if work.draws:
            logits_at.extend(range(len(ids) - 1 - len(work.drafts), len(ids)))
    return [ids, positions, logits_at, hidden_at, starts, committed]


def placed(plan: StepPlan, group: Group) -> list[array[int]]:
    """The page tables of one group, where each begins, and its slots."""
    flat, starts, slots, size = array("i"), array("i", [0]), array("q"), group.page_size
    for work in plan.works:
        table, at, end = work.sequence.tables[group.group_id], work.sequence.num_committed, work.sequence.num_committed + work.num_tokens
        flat.extend(table)
        starts.append(len(flat))
        while at < end:  # a page at a time
            page, count = table[at // size], min(size - at % size, end - at)
            first = page * size + at % size
            slots.extend(range(first, first + count) if page >= 0 else repeat(-1, count))
            at += count
    return [flat, starts, slots]


def fresh(lengths: Sequence[int]) -> tuple[array[int], ...]:
    """Of new sequences of these lengths, which have no page and get none: query starts and committed lengths; page tables of any group, where each
    begins, and its slots."""
    none, nowhere = array("i", [0] * (len(lengths) + 1)), array("q", [-1] * sum(lengths))
    return array("i", accumulate(lengths, initial=0)), none[1:], array("i"), none, nowhere


def _batch(tensors: Sequence[torch.Tensor]) -> Batch:
    ids, positions, logits_at, hidden_at, starts, committed, *placed = tensors
    tables = tuple(TableInputs(flat, first) for flat, first in zip(placed[::3], placed[1::3], strict=True))
    return Batch(ids, positions, logits_at, hidden_at, StepInputs(starts, committed, tables), tuple(placed[2::3]))
