"""States that layers carry from token to token, over pages: recurrent layers, whose past is no list of rows.

A page of such a layer holds one state: the one behind the last of its tokens that are in the cache. So the state that a sequence goes on from is in
the page of its last token, and a page that is full holds what anybody needs who has the same tokens up to its end.

    tokens in a step     3 4 5 | 6 7          page size 3: a sequence with 3 tokens in the cache goes on from page 0
    segments             [3 .. 5] [6 .. 7]    cut where pages end; the state behind each is staged, and written to its page by the commit

Of a sequence with one token in a step, as in decoding, no state is staged, which may be a megabyte a layer: the commit computes it again, in
its page, from the state before it and what the token was given. The same arithmetic gives the same bits.

Shape letters: T packed tokens of the step, S sequences, N segments, P pages, C channels, W width of a kernel, Hk/Hv heads of keys and of values,
Dk/Dv their sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch

from quire.tensors.attention.base import StatePlace, StepInputs
from quire.tensors.attention.convolve import convolved, sources

# Of what native kernels take (csrc/kernels.h), told here as well, since models are examined where there are none.
MOST_WIDTH, MOST_K_DIM = 16, 512


class Recurrence(NamedTuple):
    """What a head's state S [Dk,Dv] becomes with each token, and what it gives: S *= decay, S += k (beta (v - k S)), out = scale (q S); in fp32.

    q, k [T,Hk,Dk], v [T,Hv,Dv] of one dtype, contiguous; decay, beta fp32 [T,Hv]. `normalized`: q and k are made unit vectors first. `corrects`:
    else S += k (beta v). A gated delta net does both (Yang et al., "Gated Delta Networks", 2024), Mamba 2 neither (Dao & Gu, "Transformers are
    SSMs", 2024).
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    decay: torch.Tensor
    beta: torch.Tensor
    scale: float
    normalized: bool
    corrects: bool

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """[Hv,Dk,Dv]."""
        return self.v.shape[1], self.k.shape[2], self.v.shape[2]

    def of(self, tokens: Sequence[int]) -> Recurrence:
        """A copy of what some tokens are given."""
        q, k, v, decay, beta = (x[list(tokens)] for x in self[:5])
        return self._replace(q=q, k=k, v=v, decay=decay, beta=beta)


@dataclass(frozen=True, slots=True)
class Segments:
    """A step's tokens, cut where pages end. `starts` [N + 1]: the first token of each; `of` [S + 1]: the first segment of each sequence;
    `before` [S]: the page of the state that it goes on from, -1 for none; `after` [N]: the page that the state behind it goes to, -1 for nowhere."""

    starts: list[int]
    of: list[int]
    before: list[int]
    after: list[int]

    @classmethod
    def cut(cls, step: StepInputs, place: StatePlace, slots: torch.Tensor) -> Segments:
        """Those of a step for layers of a group; `slots` int64 [T]: where each token's row would go."""
        table, size, to = step.tables[place.group], place.page_size, slots.tolist()
        ids, first, committed = table.page_ids.tolist(), table.page_start.tolist(), step.num_committed.tolist()
        found = cls([0], [0], [], [])
        for s, (start, end) in enumerate(pairwise(step.query_start.tolist())):
            found.before.append(ids[first[s] + (committed[s] - 1) // size] if committed[s] else -1)
            if committed[s] and found.before[-1] < 0:
                raise RuntimeError(f"sequence {s} has {committed[s]} tokens in the cache, and no page with the state behind them")
            while start < end:
                start = min(end, start + size - (committed[s] + start - found.starts[found.of[-1]]) % size)
                found.starts.append(start)
                found.after.append(to[start - 1] // size)
            found.of.append(len(found.after))
        return found

    @property
    def single(self) -> list[int]:
        """The sequences that have one token in the step."""
        return [s for s, (first, end) in enumerate(pairwise(self.of)) if self.starts[end] - self.starts[first] == 1]


class CarriedKernels(Protocol):
    """What computes in layers that carry a state. A row's bits depend on its own sequence alone."""

    def convolve(
        self, before: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, query_start: torch.Tensor
    ) -> torch.Tensor:
        """The convolution (convolve.py) of x [T,C] behind `before` [S,W-1,C], the rows that each sequence had last; [T,C]. `query_start` [S + 1]."""
        ...

    def recur(
        self, given: Recurrence, seg: Segments, before: Sequence[torch.Tensor | None], after: Sequence[torch.Tensor | None], out: torch.Tensor
    ) -> None:
        """The recurrence: before [Hv,Dk,Dv] of each sequence, None where one begins, -> after [Hv,Dk,Dv] of each segment, None where nobody wants
        it, and out [T,Hv,Dv]. A sequence's first state after may be the one before."""
        ...


@dataclass(slots=True)
class StagedLayer:
    """What a layer staged in a step: of each segment the rows that its convolution keeps, and the state, None where commit computes it `again`."""

    place: StatePlace
    rows: torch.Tensor | None = None
    states: Sequence[torch.Tensor | None] = ()
    again: Recurrence | None = None


class CarriedStates:
    """The states of one step: what they are before it, and, staged, what they are behind its segments."""

    def __init__(self, pages: torch.Tensor, inputs: StepInputs, slots: Sequence[torch.Tensor], kernels: CarriedKernels | None) -> None:
        self._pages, self._inputs, self._slots, self._given_kernels = pages, inputs, slots, kernels
        self._segments: dict[int, Segments] = {}
        self._staged: dict[int, StagedLayer] = {}

    @property
    def layers(self) -> set[int]:
        """The layer_idx of every layer that has staged its states."""
        return set(self._staged)

    def convolve(self, place: StatePlace, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T,C] along each sequence, whose last W - 1 rows are the first part of a state; [T,C]."""
        seg, back = self._cut(place), weight.shape[1] - 1
        none = x.new_zeros(back, x.shape[1])
        before = torch.stack([none if page < 0 else self._rows(place, page, none.nbytes).view(x.dtype).view_as(none) for page in seg.before])
        staged, single = x.new_empty(len(seg.after), back, x.shape[1]), seg.single
        if back and single:
            tokens = [seg.starts[seg.of[s]] for s in single]
            staged[[seg.of[s] for s in single]] = torch.cat([before[single], x[tokens].unsqueeze(1)], 1)[:, 1:]
        for s in set(range(len(seg.before))) - set(single) if back else ():
            for n in range(seg.of[s], seg.of[s + 1]):
                stop = seg.starts[n + 1]
                staged[n] = torch.cat([before[s], x[max(seg.starts[seg.of[s]], stop - back) : stop]])[-back:]
        self._layer(place).rows = staged.flatten(1).view(torch.uint8)
        return self._kernels.convolve(before, x, weight, bias, self._inputs.query_start)

    def recur(self, place: StatePlace, given: Recurrence) -> torch.Tensor:
        """[T,Hv,Dv] of v's dtype; the state [Hv,Dk,Dv] fp32 is the last part of a layer's."""
        seg, staged, out = self._cut(place), self._layer(place), torch.empty_like(given.v)
        before = [None if page < 0 else self._state(place, page, given.state_shape) for page in seg.before]
        single = {seg.of[s] for s in seg.single}
        space = iter(given.decay.new_empty(len(seg.after) - len(single), *given.state_shape))
        staged.states = [None if n in single else next(space) for n in range(len(seg.after))]
        if single:
            staged.again = given.of([seg.starts[n] for n in sorted(single)])
        self._kernels.recur(given, seg, before, staged.states, out)
        return out

    def commit(self) -> None:
        """Write the states to their pages."""
        for layer in self._staged.values():
            seg = self._cut(layer.place)
            for n, page in enumerate(seg.after):
                if page >= 0 and layer.rows is not None:
                    self._rows(layer.place, page, layer.rows[n].nbytes).copy_(layer.rows[n])
                if page >= 0 and layer.states and (state := layer.states[n]) is not None:
                    self._state(layer.place, page, state.shape).copy_(state)
            if layer.again is not None:
                self._commit_single(layer.place, layer.again, seg)

    def _commit_single(self, place: StatePlace, given: Recurrence, seg: Segments) -> None:
        single = seg.single
        before = [None if seg.before[s] < 0 else self._state(place, seg.before[s], given.state_shape) for s in single]
        after = [None if seg.after[n] < 0 else self._state(place, seg.after[n], given.state_shape) for n in (seg.of[s] for s in single)]
        each = list(range(len(single) + 1))
        self._kernels.recur(given, Segments(each, each, [], []), before, after, torch.empty_like(given.v))

    @property
    def _kernels(self) -> CarriedKernels:
        assert self._given_kernels is not None, "refused where there are none"
        return self._given_kernels

    def _cut(self, place: StatePlace) -> Segments:
        if place.group not in self._segments:
            self._segments[place.group] = Segments.cut(self._inputs, place, self._slots[place.group])
        return self._segments[place.group]

    def _layer(self, place: StatePlace) -> StagedLayer:
        return self._staged.setdefault(place.layer_idx, StagedLayer(place))

    def _rows(self, place: StatePlace, page: int, num_bytes: int) -> torch.Tensor:
        return self._pages[page, place.offset : place.offset + num_bytes]

    def _state(self, place: StatePlace, page: int, shape: Sequence[int]) -> torch.Tensor:
        end = place.offset + place.num_bytes
        return self._pages[page, end - 4 * math.prod(shape) : end].view(torch.float32).view(*shape)


class PlainCarried:
    """`CarriedKernels` in plain torch, a token at a time."""

    def convolve(
        self, before: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, query_start: torch.Tensor
    ) -> torch.Tensor:
        """See `CarriedKernels`."""
        return convolved(torch.cat([before.flatten(0, 1), x]), sources(query_start, before.shape[1], x.shape[0]), weight, bias)

    def recur(
        self, given: Recurrence, seg: Segments, before: Sequence[torch.Tensor | None], after: Sequence[torch.Tensor | None], out: torch.Tensor
    ) -> None:
        """See `CarriedKernels`."""
        q, k = (unit(x) if given.normalized else x.float() for x in (given.q, given.k))
        each = given.v.shape[1] // given.k.shape[1]
        for s, (first, end) in enumerate(pairwise(seg.of)):
            state = given.v.new_zeros(given.state_shape, dtype=torch.float32) if (began := before[s]) is None else began
            for n in range(first, end):
                for t in range(seg.starts[n], seg.starts[n + 1]):
                    key, query = (x[t].repeat_interleave(each, 0).unsqueeze(1) for x in (k, q * given.scale))  # [Hv,1,Dk]
                    state = state * given.decay[t, :, None, None]
                    value = given.v[t].float() - (key @ state).squeeze(1) if given.corrects else given.v[t].float()
                    state = state + key.transpose(1, 2) * (value * given.beta[t, :, None]).unsqueeze(1)
                    out[t] = (query @ state).squeeze(1)
                if (to := after[n]) is not None:
                    to.copy_(state)


def unit(x: torch.Tensor) -> torch.Tensor:
    """Rows of x [..., D] as fp32 vectors of length one, nearly."""
    x = x.float()
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)
