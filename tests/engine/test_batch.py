"""Plans as tensors (batch.py): what one of the last one's shape is made of."""

from __future__ import annotations

import random
from array import array
from dataclasses import fields
from types import SimpleNamespace
from typing import Any, cast

import torch

from quire.engine.batch import Batch, Batches
from quire.policy.groups import Group
from quire.policy.plan import StepPlan, Work
from quire.policy.prefix import PrefixKey
from quire.policy.sequence import Sequence

GROUPS = (Group(0, 4, 0, 0, ()), Group(1, 8, 6, 0, ()))


def some_plan(rng: random.Random) -> StepPlan:
    works = []
    for arrival in range(rng.randrange(1, 3)):
        tokens, pooling = [rng.randrange(1000) for _ in range(rng.randrange(3, 8))], rng.choice((None, None, "mean"))
        seq = Sequence(arrival, tokens, cast(PrefixKey, SimpleNamespace()), scores=rng.random() < 0.3, pooling=pooling)
        seq.num_committed = rng.randrange(len(seq.tokens))
        pages = [-(-len(seq.tokens) // group.page_size) for group in GROUPS]
        seq.tables = [array("i", [rng.choice((-1, rng.randrange(50))) for _ in range(count)]) for count in pages]
        works.append(Work(seq, rng.choice((1, len(seq.tokens) - seq.num_committed))))
    return StepPlan(tuple(works), ())


def told(batch: Batch) -> list[Any]:
    inputs = batch.inputs
    tables = [table for group in inputs.tables for table in (group.page_ids, group.page_start)]
    tensors = [batch.input_ids, batch.positions, batch.logits_at, batch.hidden_at, *batch.slots, inputs.query_start, inputs.num_committed, *tables]
    return [(x.dtype, x.tolist()) for x in tensors]


def test_a_batch_is_what_its_plan_says_whatever_came_before() -> None:
    rng, batches, again = random.Random(3), Batches(GROUPS), 0
    last = None
    for _ in range(2000):
        plan = some_plan(rng)
        batch = batches.of(plan)
        assert told(batch) == told(Batches(GROUPS).of(plan))
        again, last = again + (batch is last), batch
    assert again > 10, "some have the shape of the one before"
    assert {field.name for field in fields(Batch)} == {"input_ids", "positions", "logits_at", "hidden_at", "inputs", "slots"}, "all are compared"


def test_the_numbers_of_a_small_one() -> None:
    """Of the page docs/architecture.md: a chunk of a prompt, and one that decodes."""
    rng = random.Random(1)
    a, b = (Sequence(i, [rng.randrange(9) for _ in range(n)], cast(PrefixKey, SimpleNamespace())) for i, n in enumerate((12, 41)))
    a.num_committed, b.num_committed = 6, 40
    a.tables, b.tables = [array("i", [5, 6, 7])], [array("i", range(10, 21))]
    batch = Batches(GROUPS[:1]).of(StepPlan((Work(a, 3), Work(b, 1)), ()))
    assert batch.input_ids.tolist() == [*a.tokens[6:9], b.tokens[40]] and batch.positions.tolist() == [6, 7, 8, 40]
    assert batch.logits_at.tolist() == [3] and batch.inputs.query_start.tolist() == [0, 3, 4] and batch.inputs.num_committed.tolist() == [6, 40]
    assert batch.slots[0].tolist() == [6 * 4 + 2, 6 * 4 + 3, 7 * 4, 20 * 4] and batch.slots[0].dtype == torch.int64
