"""States that layers carry over pages: close to what transformers computes, and the same bits however tokens come in steps and pages."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import mamba2_selective_state_update
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

native = pytest.importorskip("quire.tensors.native", reason="the native kernels are not built")

from quire.policy.copies import PageCopy  # noqa: E402
from quire.tensors.attention.base import StatePlace, StepInputs, TableInputs  # noqa: E402
from quire.tensors.attention.carried import MOST_K_DIM, MOST_WIDTH, PlainCarried, Recurrence, Segments  # noqa: E402
from quire.tensors.attention.native import NativeAttention  # noqa: E402
from quire.tensors.attention.reference import ReferenceAttention  # noqa: E402
from quire.tensors.store import PageStore, StagedStep  # noqa: E402

Rule = Callable[..., None]
POISON = 255  # NaN in every dtype
WIDTH = 4
# Hk, Hv, Dk, Dv: heads of values that share one of keys, sizes that no vector of 16 ends at, and one of each.
SHAPES = [(2, 6, 19, 27), (2, 2, 32, 16), (1, 1, 3, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def made(
    shape: tuple[int, int, int, int], length: int, seed: int, dtype: torch.dtype, *, normalized: bool = True, corrects: bool = True
) -> Recurrence:
    """What some layer may be given for `length` tokens of a sequence."""
    generator = torch.Generator().manual_seed(seed)
    k_heads, v_heads, k_dim, v_dim = shape
    q, k, v = (torch.randn(length, *x, generator=generator).to(dtype) for x in ((k_heads, k_dim), (k_heads, k_dim), (v_heads, v_dim)))
    decay, beta = (torch.rand(length, v_heads, generator=generator) for _ in range(2))
    return Recurrence(q, k, v, decay, beta, k_dim**-0.5, normalized, corrects)


def part(given: Recurrence, first: int, end: int) -> Recurrence:
    return Recurrence(*(x[first:end] for x in given[:5]), *given[5:])


def packed(parts: Sequence[Recurrence]) -> Recurrence:
    return Recurrence(*(torch.cat(x) for x in zip(*(one[:5] for one in parts), strict=True)), *parts[0][5:])


def step_of(
    counts: Sequence[int], committed: Sequence[int], tables: Sequence[Sequence[int]], page_size: int
) -> tuple[StepInputs, list[torch.Tensor]]:
    """A step over tables of the second of two groups, and the slots of its tokens."""
    starts, page_start = ([0, *itertools.accumulate(x)] for x in (counts, [len(table) for table in tables]))
    ints = [torch.tensor(x, dtype=torch.int32) for x in (starts, committed, [page for table in tables for page in table], page_start)]
    positions = [(table, p) for table, done, count in zip(tables, committed, counts, strict=True) for p in range(done, done + count)]
    slots = [table[p // page_size] * page_size + p % page_size if table[p // page_size] >= 0 else -1 for table, p in positions]
    none = torch.zeros(0, dtype=torch.int32)
    return StepInputs(ints[0], ints[1], (TableInputs(none, ints[3] * 0), TableInputs(ints[2], ints[3]))), [none.long(), torch.tensor(slots)]


def test_segments_end_where_pages_and_sequences_do() -> None:
    rng = random.Random(1)
    for _ in range(300):
        size, count = rng.choice([1, 2, 3, 7, 16]), rng.randint(1, 5)
        committed, counts = (
            [rng.choice(x) for _ in range(count)] for x in ((0, 0, 1, 2, size, rng.randrange(40)), (1, 1, 2, size, rng.randint(1, 50)))
        )
        ids = iter(rng.sample(range(500), 500))
        tables = [[next(ids) for _ in range(-(-(done + new) // size))] for done, new in zip(committed, counts, strict=True)]
        for table, done in zip(tables, committed, strict=True):  # pages that left the window, or will have by the end of the step
            for i in range(len(table)):
                table[i] = -1 if rng.random() < 0.3 and i != (done - 1) // size else table[i]
        inputs, slots = step_of(counts, committed, tables, size)
        ends, pages, of = [0], [], [0]
        for table, done, new in zip(tables, committed, counts, strict=True):
            first = ends[-1]
            last = [p for p in range(done, done + new) if p % size == size - 1 or p == done + new - 1]
            ends += [first + p + 1 - done for p in last]
            pages += [table[p // size] for p in last]
            of.append(len(pages))
        before = [table[(done - 1) // size] if done else -1 for table, done in zip(tables, committed, strict=True)]
        assert Segments.cut(inputs, StatePlace(0, 1, size, 0, 64), slots[1]) == Segments(ends, of, before, pages)


def test_a_sequence_whose_state_has_been_given_back_is_told() -> None:
    inputs, slots = step_of([1, 2], [3, 4], [[5], [-1, 6]], 4)
    with pytest.raises(RuntimeError, match="sequence 1 has 4 tokens in the cache, and no page with the state behind them"):
        Segments.cut(inputs, StatePlace(0, 1, 4, 0, 64), slots[1])


def whole(rule: Rule, given: Recurrence, before: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and last state of one sequence in one segment."""
    out, after = torch.full_like(given.v, torch.nan), torch.full((1, *given.state_shape), torch.nan)
    rule(given, Segments([0, len(given.v)], [0, 1], [-1], [-1]), [before], list(after), out)
    return out, after[0]


RULES: dict[str, Rule] = {"reference": PlainCarried().recur, "native": NativeAttention(2).carried.recur}


def assert_close(out: torch.Tensor, state: torch.Tensor, their_out: torch.Tensor, their_state: torch.Tensor) -> None:
    """Theirs in fp32, of the same inputs: what is left is the result's rounding."""
    unit = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[out.dtype]
    assert ((out.float() - their_out).abs() <= unit * their_out.abs() + 2e-5).all()
    torch.testing.assert_close(state, their_state, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_delta_rule_is_transformers_own(rule: str, dtype: torch.dtype) -> None:
    for shape, normalized in itertools.product(SHAPES, (True, False)):
        given = made(shape, 23, 1, dtype, normalized=normalized)
        if not normalized:  # else a correction overshoots, ever more
            given = given._replace(k=given.k / 8)
        before = torch.randn(given.state_shape, generator=torch.Generator().manual_seed(2))
        wide = [x[None].float() for x in given[:5]]
        theirs: Any = torch_recurrent_gated_delta_rule(
            *wide[:3], wide[3].log(), wide[4], initial_state=before[None], output_final_state=True, use_qk_l2norm_in_kernel=normalized
        )
        assert_close(*whole(RULES[rule], given, before), theirs[0][0], theirs[1][0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mamba_2_is_transformers_own_one_step(rule: str, dtype: torch.dtype) -> None:
    """Its states lie the other way round, values first."""
    for shape in SHAPES:
        given = made(shape, 23, 3, dtype, normalized=False, corrects=False)._replace(scale=1.0)
        heads, k_dim, v_dim = given.state_shape
        before = torch.randn(given.state_shape, generator=torch.Generator().manual_seed(2))
        state, out = before.mT.clone()[None], []
        for t in range(23):
            dt = given.beta[t, :, None].expand(-1, v_dim)[None]
            slope = (given.decay[t].log() / given.beta[t])[:, None, None].expand(-1, v_dim, k_dim)
            x, b, c = (x[t].float()[None] for x in (given.v, given.k, given.q))
            out.append(mamba2_selective_state_update(state, x, dt, slope, b, c, None, z=None, dt_bias=None, dt_softplus=False)[0])
        assert_close(*whole(RULES[rule], given, before), torch.stack(out), state[0].mT)


def in_steps(given: Recurrence, rng: random.Random) -> list[tuple[int, int, list[int]]]:
    """Some cut of a sequence into steps, and of each into segments: (first, end, ends of segments)."""
    length = len(given.v)
    cuts = [0, *sorted(rng.sample(range(1, length), rng.randrange(length // 2))), length]
    return [(a, b, [*sorted(rng.sample(range(a + 1, b), rng.randrange(min(4, b - a)))), b]) for a, b in itertools.pairwise(cuts)]


@pytest.mark.parametrize("rule", [*RULES, "native, one thread"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("isa")
def test_any_cut_and_any_company_give_the_same_bits(rule: str, dtype: torch.dtype) -> None:
    rng, recur = random.Random(4), RULES.get(rule) or NativeAttention(1).carried.recur
    for shape, kind in ((SHAPES[0], True), (SHAPES[1], False)):
        sequences = [made(shape, rng.randint(2, 30), seed, dtype, normalized=kind, corrects=kind) for seed in range(4)]
        states: list[list[torch.Tensor | None]] = [[None] for _ in sequences]
        outs = [torch.empty_like(given.v) for given in sequences]
        for given, out, known in zip(sequences, outs, states, strict=True):  # alone, a token at a time
            for t in range(len(given.v)):
                out[t], state = whole(recur, part(given, t, t + 1), known[-1])
                known.append(state)
        waiting = [(i, in_steps(given, rng)) for i, given in enumerate(sequences)]
        carried: list[torch.Tensor | None] = [None] * len(sequences)
        while waiting := [one for one in waiting if one[1]]:
            works = [(i, *steps.pop(0)) for i, steps in rng.sample(waiting, rng.randint(1, len(waiting)))]
            given = packed([part(sequences[i], first, end) for i, first, end, _ in works])
            starts, of, wanted = [0], [0], []
            for i, first, _, ends in works:
                begin = starts[-1]
                starts += [begin + end - first for end in ends]
                of.append(len(starts) - 1)
                wanted += [states[i][end] for end in ends]
            rows = torch.full((len(wanted), 5 + given.state_shape[0] * given.state_shape[1] * given.state_shape[2]), torch.nan)
            after, out = rows[:, 5:].view(-1, *given.state_shape), torch.full_like(given.v, torch.nan)  # behind the rest of a layer's state
            recur(given, Segments(starts, of, [], []), [carried[i] for i, *_ in works], list(after), out)
            assert rows[:, :5].isnan().all() and all(torch.equal(x, y) for x, y in zip(after, wanted, strict=True) if y is not None)
            assert torch.equal(out, torch.cat([outs[i][first:end] for i, first, end, _ in works]))
            for (i, *_), last in zip(works, of[1:], strict=True):
                carried[i] = after[last - 1].clone()


def test_limits_that_are_told_without_the_kernels_are_theirs() -> None:
    assert (native.lib.most_taps, native.lib.most_state_rows) == (MOST_WIDTH, MOST_K_DIM)


def test_the_kernel_refuses_a_state_that_is_too_tall() -> None:
    with pytest.raises(ValueError, match="k_dim, v_dim or num_threads is out of range"):
        whole(RULES["native"], made((1, 1, native.lib.most_state_rows + 1, 1), 1, 0, torch.float32), None)


@dataclass
class Text:
    x: torch.Tensor
    given: Recurrence
    pages: list[int] = field(default_factory=list)
    committed: int = 0
    out: list[torch.Tensor] = field(default_factory=list)


class Layer:
    """One layer's states in pages that hold NaN wherever nothing was committed; pages are handed out in random order."""

    def __init__(self, channels: int, given: Recurrence, page_size: int, backend: Any, seed: int = 0) -> None:
        self.random = random.Random(seed)
        heads, k_dim, v_dim = given.state_shape
        self.convolved, self.recurred = (WIDTH - 1) * channels * given.v.element_size(), 4 * heads * k_dim * v_dim
        self.place = StatePlace(3, 1, page_size, 12, -(-self.convolved // 64) * 64 + self.recurred)
        self.store = PageStore([self.place], 40, self.place.num_bytes + 20, backend)
        self.store.pages.fill_(POISON)
        self.free = self.random.sample(range(40), 40)
        generator = torch.Generator().manual_seed(7)
        self.weight, self.bias = (torch.randn(*shape, generator=generator).to(given.v.dtype) for shape in ((channels, WIDTH), (channels,)))

    def staged(self, work: list[tuple[Text, int]]) -> tuple[StagedStep, torch.Tensor]:
        """A step that computes the next `count` tokens of each sequence, and what it gives: not committed yet."""
        for sequence, count in work:
            while len(sequence.pages) * self.place.page_size < sequence.committed + count:
                sequence.pages.append(self.free.pop())
            for i in range(max(0, sequence.committed - 1) // self.place.page_size):  # what left the window may go back to the pool
                if sequence.pages[i] >= 0 and self.random.random() < 0.7:
                    self.store.pages[sequence.pages[i]] = POISON
                    self.free.insert(0, sequence.pages[i])
                    sequence.pages[i] = -1
        counts, committed = [count for _, count in work], [sequence.committed for sequence, _ in work]
        step = StagedStep(self.store, *step_of(counts, committed, [sequence.pages for sequence, _ in work], self.place.page_size))
        x = torch.cat([sequence.x[sequence.committed :][:count] for sequence, count in work])
        given = packed([part(sequence.given, sequence.committed, sequence.committed + count) for sequence, count in work])
        convolved, out = step.convolve_carried(3, x, self.weight, self.bias), step.recur(3, given)
        return step, torch.cat([convolved, out.flatten(1)], dim=1)

    def step(self, work: list[tuple[Text, int]]) -> None:
        step, out = self.staged(work)
        step.commit()
        for (sequence, count), rows in zip(work, out.split([count for _, count in work]), strict=True):
            sequence.out.append(rows)
            sequence.committed += count

    def state(self, sequence: Text) -> tuple[torch.Tensor, torch.Tensor]:
        """What a page holds of it: the rows that the convolution keeps, and the recurrence's state."""
        page = self.store.pages[sequence.pages[(sequence.committed - 1) // self.place.page_size]]
        end = self.place.offset + self.place.num_bytes
        return page[self.place.offset :][: self.convolved].clone(), page[end - self.recurred : end].clone()


def sequences_of(dtype: torch.dtype, lengths: Sequence[int]) -> list[Text]:
    generator = torch.Generator().manual_seed(5)
    return [Text(torch.randn(n, 18, generator=generator).to(dtype), made(SHAPES[0], n, n, dtype)) for n in lengths]


@pytest.mark.parametrize("backend", [ReferenceAttention(), NativeAttention(2)], ids=["reference", "native"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_over_pages_a_sequence_has_the_bits_that_it_has_alone(dtype: torch.dtype, backend: Any) -> None:
    lengths, rng = (1, 2, 11, 24), random.Random(6)
    alone = sequences_of(dtype, lengths)
    states = []
    for sequence in alone:
        layer = Layer(18, sequence.given, 64, backend)
        for _ in range(len(sequence.x)):
            layer.step([(sequence, 1)])
        states.append(layer.state(sequence))
        assert torch.equal(states[-1][0].view(dtype).view(-1, 18)[-len(sequence.x) :], sequence.x[-WIDTH + 1 :])
    for page_size in (1, 3, 8):
        together = sequences_of(dtype, lengths)
        layer = Layer(18, together[0].given, page_size, backend, page_size)
        while waiting := [one for one in together if one.committed < len(one.x)]:
            chosen = rng.sample(waiting, rng.randint(1, len(waiting)))
            layer.step([(one, min(rng.choice([1, 2, 3, 9]), len(one.x) - one.committed)) for one in chosen])
        for one, other, state in zip(together, alone, states, strict=True):
            assert torch.equal(torch.cat(one.out), torch.cat(other.out))
            assert all(map(torch.equal, layer.state(one), state))


def test_a_step_that_is_not_committed_changes_no_page_and_may_be_made_again() -> None:
    (sequence,), (expected,) = (sequences_of(torch.bfloat16, [9]) for _ in range(2))
    layer, other = (Layer(18, sequence.given, 4, NativeAttention(2)) for _ in range(2))
    other.step([(expected, 9)])
    layer.step([(sequence, 3)])
    before = layer.store.pages.clone()
    for _ in range(2):
        layer.staged([(sequence, 6)])
        assert torch.equal(layer.store.pages, before)
    layer.step([(sequence, 6)])
    assert torch.equal(torch.cat(sequence.out), expected.out[0]) and all(map(torch.equal, layer.state(sequence), other.state(expected)))


def test_a_step_in_which_a_layer_staged_no_state_is_not_committed() -> None:
    (sequence,) = sequences_of(torch.float32, [1])
    layer = Layer(18, sequence.given, 4, NativeAttention(2))
    with pytest.raises(RuntimeError, match=r"layers \[3\] staged nothing in this step"):
        StagedStep(layer.store, *step_of([1], [0], [[0]], 4)).commit()


def test_a_copied_page_holds_the_whole_state_and_nothing_of_other_groups() -> None:
    (sequence,) = sequences_of(torch.float32, [6])
    layer = Layer(18, sequence.given, 4, NativeAttention(2))
    layer.step([(sequence, 6)])
    source, target = sequence.pages[1], layer.free[0]
    before = layer.store.pages.clone()
    layer.store.copy_pages([PageCopy(source, target, 0, 2)])
    assert torch.equal(layer.store.pages, before)
    layer.store.copy_pages([PageCopy(source, target, 1, 2)])
    first, end = layer.place.offset, layer.place.offset + layer.place.num_bytes
    before[target, first:end] = before[source, first:end]
    assert torch.equal(layer.store.pages, before)
