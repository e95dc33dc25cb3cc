"""Turns a plan into tensors: the packed tokens of all works, one after the other, and the page tables they need.

plan: a 3 tokens (a prompt's chunk), b 1 token (decoding), c 2 tokens

input_ids     a a a b c c      positions   6 7 8 40 0 1      logits_at   2 3 5   (a, b and c each draw after their last token)
query_start   0 3 4 6          num_committed   6 40 0      (a work that scores its prompt gives logits after earlier tokens, too)
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import torch

from quire.policy.groups import Group
from quire.policy.plan import StepPlan
from quire.tensors.attention.base import StepInputs, TableInputs


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


def build(plan: StepPlan, groups: Sequence[Group]) -> Batch:
    """The batch of a plan, on CPU."""
    ids, positions, logits_at, hidden_at = array("q"), array("q"), array("q"), array("q")
    starts, committed = array("i", [0]), array("i")
    for work in plan.works:
        seq, first = work.sequence, work.sequence.num_committed
        logits_at.extend(range(len(ids), len(ids) + work.num_scored))
        hidden_at.extend(len(ids) - first + position for position in work.pooled)
        ids.extend(seq.tokens[first : first + work.num_tokens])
        positions.extend(range(first, first + work.num_tokens))
        starts.append(len(ids))
        committed.append(first)
        if work.draws:
            logits_at.append(len(ids) - 1)
    placed = [_placed(plan, group) for group in groups]
    inputs = StepInputs(_tensor(starts, torch.int32), _tensor(committed, torch.int32), tuple(table for table, _ in placed))
    tokens, places, logits, hidden = (_tensor(values, torch.int64) for values in (ids, positions, logits_at, hidden_at))
    return Batch(tokens, places, logits, hidden, inputs, tuple(slots for _, slots in placed))


def _placed(plan: StepPlan, group: Group) -> tuple[TableInputs, torch.Tensor]:
    """The page tables of one group, and its slots."""
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
    return TableInputs(_tensor(flat, torch.int32), _tensor(starts, torch.int32)), _tensor(slots, torch.int64)


def _tensor(values: array[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)
