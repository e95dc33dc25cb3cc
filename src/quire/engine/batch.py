"""Turns a plan into tensors: the packed tokens of all works, one after the other, and the page tables they need.

plan: a 3 tokens (a prompt's chunk), b 1 token (decoding), c 2 tokens

input_ids     a a a b c c      positions   6 7 8 40 0 1      logits_at   2 3 5   (a, b and c each draw after their last token)
query_start   0 3 4 6          num_committed   6 40 0      (a work that scores its prompt gives logits after earlier tokens, too)
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

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
    ids, starts, committed, logits_at, hidden_at = array("q"), array("i", [0]), array("i"), array("q"), array("q")
    for work in plan.works:
        seq, first = work.sequence, work.sequence.num_committed
        logits_at.extend(range(len(ids), len(ids) + work.num_scored))
        hidden_at.extend(len(ids) - first + position for position in work.pooled)
        ids.extend(seq.tokens[first : first + work.num_tokens])
        starts.append(len(ids))
        committed.append(first)
        if work.draws:
            logits_at.append(len(ids) - 1)
    query_start, num_committed = _tensor(starts, torch.int32), _tensor(committed, torch.int32)
    counts = query_start.diff().long()
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)  # packed token -> place of its work in the plan
    positions = torch.arange(len(ids)) - query_start[owner] + num_committed[owner]
    tables = tuple(_table(plan, group) for group in groups)
    slots = tuple(_slots(table, group, owner, positions) for table, group in zip(tables, groups, strict=True))
    tokens, logits, hidden = (_tensor(values, torch.int64) for values in (ids, logits_at, hidden_at))
    return Batch(tokens, positions, logits, hidden, StepInputs(query_start, num_committed, tables), slots)


def _table(plan: StepPlan, group: Group) -> TableInputs:
    flat, starts = array("i"), array("i", [0])
    for work in plan.works:
        flat.extend(work.sequence.tables[group.group_id])
        starts.append(len(flat))
    return TableInputs(_tensor(flat, torch.int32), _tensor(starts, torch.int32))


def _slots(table: TableInputs, group: Group, owner: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    page = table.page_ids[table.page_start[owner] + positions // group.page_size].long()
    return torch.where(page >= 0, page * group.page_size + positions % group.page_size, -1)


def _tensor(values: array[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)
