"""States that layers carry from token to token, over pages: recurrent layers, whose past is no list of rows.

A page of such a layer holds one state: the one behind the last of its tokens that are in the cache. So the state that a sequence goes on from is in
the page of its last token, and a page that is full holds what anybody needs who has the same tokens up to its end.

    tokens in a step     3 4 5 | 6 7          page size 3: a sequence with 3 tokens in the cache goes on from page 0
    segments             [3 .. 5] [6 .. 7]    cut where pages end; the state behind each is staged, and written to its page at the commit

Shape letters: T packed tokens of the step, S sequences, N segments, P pages, C channels, W width of a kernel, Hk/Hv heads of keys and of values,
Dk/Dv their sizes.
"""

from __future__ import annotations

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


class CarriedKernels(Protocol):
    """What computes in layers that carry a state. A row's bits depend on its own sequence alone."""

    def convolve(
        self, before: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, query_start: torch.Tensor
    ) -> torch.Tensor:
        """The convolution (convolve.py) of x [T,C] behind `before` [S,W-1,C], the rows that each sequence had last; [T,C]. `query_start` [S + 1]."""
        ...

    def recur(self, given: Recurrence, seg: Segments, before: Sequence[torch.Tensor | None], after: torch.Tensor, out: torch.Tensor) -> None:
        """The recurrence: before [Hv,Dk,Dv] of each sequence, None where one begins, -> after [N,Hv,Dk,Dv], and out [T,Hv,Dv]."""
        ...


class CarriedStates:
    """The states of one step: what they are before it, and, staged, what they are behind its segments."""

    def __init__(self, pages: torch.Tensor, inputs: StepInputs, slots: Sequence[torch.Tensor], kernels: CarriedKernels | None) -> None:
        self._pages, self._inputs, self._slots, self._kernels = pages, inputs, slots, kernels
        self._segments: dict[int, Segments] = {}
        self._staged: dict[int, tuple[StatePlace, torch.Tensor]] = {}

    @property
    def layers(self) -> set[int]:
        """The layer_idx of every layer that has staged its states."""
        return set(self._staged)

    def convolve(self, place: StatePlace, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T,C] along each sequence, whose last W - 1 rows are the first part of a state; [T,C]."""
        seg, back, staged = self._cut(place), weight.shape[1] - 1, self._stage(place)
        size = back * x.shape[1] * x.element_size()
        none = x.new_zeros(back, x.shape[1])
        rows = [none if page < 0 else self._pages[page, place.offset : place.offset + size].view(x.dtype).view_as(none) for page in seg.before]
        before = torch.stack(rows)
        for s, (first, end) in enumerate(pairwise(seg.of)):
            for n in range(first, end) if back else ():
                stop = seg.starts[n + 1]
                last = torch.cat([before[s], x[max(seg.starts[first], stop - back) : stop]])[-back:]
                staged[n, :size] = last.view(torch.uint8).flatten()
        assert self._kernels is not None, "refused where there are none"
        return self._kernels.convolve(before, x, weight, bias, self._inputs.query_start)

    def recur(self, place: StatePlace, given: Recurrence) -> torch.Tensor:
        """[T,Hv,Dv] of v's dtype; the state [Hv,Dk,Dv] fp32 is the last part of a layer's."""
        seg, shape, staged = self._cut(place), given.state_shape, self._stage(place)
        size = 4 * shape[0] * shape[1] * shape[2]
        end = place.offset + place.num_bytes
        before = [None if page < 0 else self._pages[page, end - size : end].view(torch.float32).view(shape) for page in seg.before]
        after = staged[:, place.num_bytes - size :].view(torch.float32).view(-1, *shape)
        out = torch.empty_like(given.v)
        assert self._kernels is not None, "refused where there are none"
        self._kernels.recur(given, seg, before, after, out)
        return out

    def commit(self) -> None:
        """Write the states to their pages."""
        for place, staged in self._staged.values():
            for page, state in zip(self._cut(place).after, staged, strict=True):
                if page >= 0:
                    self._pages[page, place.offset : place.offset + place.num_bytes] = state

    def _cut(self, place: StatePlace) -> Segments:
        if place.group not in self._segments:
            self._segments[place.group] = Segments.cut(self._inputs, place, self._slots[place.group])
        return self._segments[place.group]

    def _stage(self, place: StatePlace) -> torch.Tensor:
        if place.layer_idx not in self._staged:
            self._staged[place.layer_idx] = (place, torch.empty(len(self._cut(place).after), place.num_bytes, dtype=torch.uint8))
        return self._staged[place.layer_idx][1]


class PlainCarried:
    """`CarriedKernels` in plain torch, a token at a time."""

    def convolve(
        self, before: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, query_start: torch.Tensor
    ) -> torch.Tensor:
        """See `CarriedKernels`."""
        return convolved(torch.cat([before.flatten(0, 1), x]), sources(query_start, before.shape[1], x.shape[0]), weight, bias)

    def recur(self, given: Recurrence, seg: Segments, before: Sequence[torch.Tensor | None], after: torch.Tensor, out: torch.Tensor) -> None:
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
                after[n] = state


def unit(x: torch.Tensor) -> torch.Tensor:
    """Rows of x [..., D] as fp32 vectors of length one, nearly."""
    x = x.float()
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)
