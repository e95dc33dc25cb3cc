"""Cases of attention for the native kernels: geometries, sequences, a poisoned cache that computes them step by step, and an oracle in float64."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random

import pytest
import torch

native = pytest.importorskip("quire.tensors.native", reason="the native kernels are not built")

from quire.tensors.attention.base import LayerPlace, Mask, StepInputs, TableInputs  # noqa: E402
from quire.tensors.attention.native import NativeAttention  # noqa: E402
from quire.tensors.codec import RowFormat, decode, encode, row_format  # noqa: E402

NAN = float("nan")
POISON = 255  # NaN in every dtype and for every scale


@dataclasses.dataclass
class Geometry:
    num_heads: int = 4
    num_kv_heads: int = 2
    k_dim: int = 32
    v_dim: int = 32
    dtype: torch.dtype = torch.bfloat16
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    sinks: bool = False
    codec: tuple[str | None, str | None] = (None, None)

    @property
    def rows(self) -> tuple[RowFormat, RowFormat]:
        return row_format(self.codec[0], self.dtype, self.k_dim), row_format(self.codec[1], self.dtype, self.v_dim)

    def mask(self) -> Mask:
        sinks = torch.randn(self.num_heads, generator=torch.Generator().manual_seed(5)).to(self.dtype) if self.sinks else None
        return Mask(self.k_dim**-0.5, self.window, self.chunk, self.softcap, sinks)

    def first_key(self, position: int) -> int:
        return max(0, position - self.window + 1 if self.window else 0, position // self.chunk * self.chunk if self.chunk else 0)


@dataclasses.dataclass
class Sequence:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    page_ids: list[int] = dataclasses.field(default_factory=list)
    num_committed: int = 0
    rows: list[torch.Tensor] = dataclasses.field(default_factory=list)

    @property
    def out(self) -> torch.Tensor:
        return torch.cat(self.rows)


def make_sequence(geometry: Geometry, length: int, seed: int, scale: float = 1.0) -> Sequence:
    g = torch.Generator().manual_seed(seed)
    shapes = ((geometry.num_heads, geometry.k_dim), (geometry.num_kv_heads, geometry.k_dim), (geometry.num_kv_heads, geometry.v_dim))
    q, k, v = ((torch.randn((length, *shape), generator=g) * scale).to(geometry.dtype) for shape in shapes)
    return Sequence(q, k, v)


@dataclasses.dataclass
class Reference:
    """Results [T, Hq, Dv], and how far apart the values are that each averages: with d = weight x |value - result| the sum over keys of d, and the
    root of the sum of its squares. For kernels that compute in integers, `step` [T, Hq, 1] is the largest step between their weights, and the
    results' codes are summed up: their magnitudes, and the root of their squares. What is not asked for is not computed: it takes longer than they.
    """

    out: torch.Tensor
    weights: torch.Tensor  # [Hq, T, keys], as what follows
    values: torch.Tensor
    scales: torch.Tensor
    visible: torch.Tensor

    @functools.cached_property
    def _far(self) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.out.transpose(0, 1)
        far = [self.weights * (self.values[:, None, :, d] - out[:, :, None, d]).abs() for d in range(out.shape[2])]
        return torch.stack([x.sum(2) for x in far], dim=2).transpose(0, 1), torch.stack([x.norm(dim=2) for x in far], dim=2).transpose(0, 1)

    @property
    def spread(self) -> torch.Tensor:
        return self._far[0]

    @property
    def noise(self) -> torch.Tensor:
        return self._far[1]

    @property
    def step(self) -> torch.Tensor:
        return ((self.weights * self.scales.transpose(1, 2)).amax(2, keepdim=True) * 2.0**-13).transpose(0, 1)

    @property
    def _codes(self) -> torch.Tensor:
        return torch.where(self.scales > 0, self.values / self.scales, 0.0)

    @property
    def codes(self) -> torch.Tensor:
        return (self.visible.double() @ self._codes.abs()).transpose(0, 1)

    @property
    def codes_noise(self) -> torch.Tensor:
        return (self.visible.double() @ self._codes.square()).sqrt().transpose(0, 1)


def reference(geometry: Geometry, sequence: Sequence) -> Reference:
    """All rows at once in float64: the whole score matrix, masked, then softmax. Queries are rounded first where the kernels do."""
    k, v = (decode(encode(x, row), row) for x, row in zip((sequence.k, sequence.v), geometry.rows, strict=True))
    scales = torch.zeros(len(v), v.shape[1], 1)
    if computes_in_integers(geometry):
        ones = encode(sequence.v, geometry.rows[1])
        ones[..., :-1] = 1
        scales = decode(ones, geometry.rows[1])[..., :1]  # of int8 values: what a code of 1 stands for
    scales = scales.double().transpose(0, 1)
    q, k, v = (t.double().transpose(0, 1) for t in (sequence.q, k, v))
    if computes_in_integers(geometry):
        unit = 2.0 ** (torch.frexp(q.abs().amax(2, keepdim=True)).exponent.clamp(min=-99) - 14.0)
        q = torch.round(q / unit) * unit
    group = geometry.num_heads // geometry.num_kv_heads
    k, v, scales = (x.repeat_interleave(group, 0) for x in (k, v, scales))
    mask = geometry.mask()
    scores = q @ k.transpose(1, 2) * mask.scale
    if mask.softcap:
        scores = mask.softcap * torch.tanh(scores / mask.softcap)
    at = torch.arange(q.shape[1])
    visible = at[None, :] <= at[:, None]
    if mask.window:
        visible &= at[:, None] - at[None, :] < mask.window
    if mask.chunk:
        visible &= at[:, None] // mask.chunk == at[None, :] // mask.chunk
    scores = scores.masked_fill(~visible, -torch.inf)
    if mask.sinks is not None:
        scores = torch.cat([scores, mask.sinks.double()[:, None, None].expand(-1, scores.shape[1], 1)], dim=2)
    weights = torch.softmax(scores, dim=2)[:, :, : k.shape[1]]
    return Reference((weights @ v).transpose(0, 1), weights, v, scales, visible)


class Cache:
    """A pool of pages, poisoned with NaN wherever nothing was committed; pages are handed out in random order."""

    def __init__(self, geometry: Geometry, page_size: int, num_pages: int, num_threads: int = 2, seed: int = 0) -> None:
        self.geometry, self.random = geometry, random.Random(seed)
        (k, v), element = geometry.rows, geometry.dtype.itemsize
        k_bytes, v_bytes = (geometry.num_kv_heads * page_size * row.num_bytes for row in (k, v))
        # The second layer of the page, aligned to elements where there are any and to nothing else.
        k_offset = -(-(k_bytes + v_bytes) // element) * element + 3 * (1 if k.dtype is None else element)
        v_offset = k_offset + k_bytes if v.dtype is None else -(-(k_offset + k_bytes) // element) * element
        self.place = LayerPlace(1, 1, page_size, geometry.num_kv_heads, k, v, k_offset, v_offset)
        self.pages = torch.full((num_pages, -(-(v_offset + v_bytes) // element) * element + 5 * element), POISON, dtype=torch.uint8)
        self.free = list(range(num_pages))
        self.random.shuffle(self.free)
        self.backend, self.mask = NativeAttention(num_threads), geometry.mask()

    def step(self, work: list[tuple[Sequence, int]], num_padding: int = 0) -> None:
        """Computes the next `count` tokens of each sequence and commits them."""
        size, geometry = self.place.page_size, self.geometry
        for sequence, _ in work:
            # A page that no coming query can see has gone back to the pool.
            for entry in range(min(geometry.first_key(sequence.num_committed) // size, len(sequence.page_ids))):
                if (page := sequence.page_ids[entry]) >= 0:
                    self.pages[page] = POISON
                    self.free.append(page)
                    sequence.page_ids[entry] = -1
        counts = [count for _, count in work]
        query_start = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
        page_start = torch.tensor([0, *itertools.accumulate(len(s.page_ids) for s, _ in work)], dtype=torch.int32)
        ids = torch.tensor([page for s, _ in work for page in s.page_ids], dtype=torch.int32)
        num_committed = torch.tensor([s.num_committed for s, _ in work], dtype=torch.int32)
        step = StepInputs(query_start, num_committed, (TableInputs(ids[:0], page_start * 0), TableInputs(ids, page_start)))
        q, k, v = (self._staged([getattr(s, name)[s.num_committed : s.num_committed + n] for s, n in work], name, num_padding) for name in "qkv")
        k, v = self.backend.encode(k, self.place.k), self.backend.encode(v, self.place.v)
        out = self.backend.attend(q, k, v, self.pages, self.place, step, self.mask)
        assert out.is_contiguous() and torch.equal(out[sum(counts) :], torch.zeros_like(out[sum(counts) :]))
        slots: list[int] = []
        for index, (sequence, count) in enumerate(work):
            sequence.rows.append(out[query_start[index] : query_start[index + 1]])
            while len(sequence.page_ids) * size < sequence.num_committed + count:
                sequence.page_ids.append(self.free.pop())
            positions = range(sequence.num_committed, sequence.num_committed + count)
            slots += [sequence.page_ids[p // size] * size + p % size if sequence.page_ids[p // size] >= 0 else -1 for p in positions]
            sequence.num_committed += count
        self.backend.commit(k, v, self.pages, self.place, torch.tensor(slots + [-1] * num_padding, dtype=torch.int64))

    def _staged(self, parts: list[torch.Tensor], name: str, num_padding: int) -> torch.Tensor:
        """Packs the step's tokens as transformers hands them over: a transposed view of [H, T, D]."""
        heads = self.geometry.num_heads if name == "q" else self.geometry.num_kv_heads
        dim = self.geometry.v_dim if name == "v" else self.geometry.k_dim
        pad = torch.full((num_padding, heads, dim), NAN, dtype=self.geometry.dtype)
        return torch.cat([*parts, pad]).transpose(0, 1).contiguous().transpose(0, 1)


def run_ragged(geometry: Geometry, lengths: list[int], page_size: int, seed: int, max_count: int = 40) -> list[Sequence]:
    """Random prefill chunks and decode steps of several sequences, each step with a random part of them."""
    choose = random.Random(seed)
    sequences = [make_sequence(geometry, length, seed + i) for i, length in enumerate(lengths)]
    cache = Cache(geometry, page_size, sum(length // page_size + 2 for length in lengths), seed=seed)
    while open_ones := [s for s in sequences if s.num_committed < len(s.q)]:
        chosen = choose.sample(open_ones, choose.randint(1, len(open_ones)))
        work = [(s, min(choose.choice([1, 1, 2, 7, choose.randint(1, max_count)]), len(s.q) - s.num_committed)) for s in chosen]
        cache.step(work, num_padding=choose.choice([0, 0, 3]))
    return sequences


def compute_alone(geometry: Geometry, sequence: Sequence, counts: list[int], page_size: int, num_threads: int) -> torch.Tensor:
    fresh = dataclasses.replace(sequence, page_ids=[], rows=[], num_committed=0)
    cache = Cache(geometry, page_size, len(sequence.q) // page_size + 2, num_threads, seed=page_size)
    for count in counts:
        cache.step([(fresh, count)])
    return fresh.out


def rounds_probabilities(geometry: Geometry) -> bool:
    """Whether the kernels in use multiply values by probabilities in bf16: those for pairs where values are bf16, those for AMX where all is."""
    plain = geometry.codec[1] is None if native.isa() == "avx512bf16" else native.isa() == "amx" and geometry.codec == (None, None)
    return geometry.dtype == torch.bfloat16 and plain


def computes_in_integers(geometry: Geometry) -> bool:
    """Whether the kernels in use multiply int8 codes by queries and weights made integers, as bf16 queries meet them on AMX and with AVX512-VNNI."""
    codes = geometry.codec == ("int8", "int8") and min(geometry.k_dim, geometry.v_dim) > 2
    return native.isa() in ("amx", "avx512bf16") and geometry.dtype == torch.bfloat16 and codes


def assert_close(geometry: Geometry, sequence: Sequence, scale: float = 1.0) -> None:
    """Within the rounding of the result's dtype; scores `scale` times larger than usual have rounding errors as much larger.

    In bf16 a probability p is p (1 + e), where |e| <= u = 2^-8 from rounding to bf16 and 2^-13.7 from the polynomial before it: 1.02 u. Its sum has
    the same p (1 + e), so the result o moves by sum p e (v - o) / sum p (1 + e), at most 1.02 u / (1 - 1.02 u) < 1.025 u times the spread. Rounding
    the moved result adds u^2 of the spread: 1.03 u in all. In integers u is 2^-13.7, of the polynomial alone, and each weight, p times its value's
    scale, moves by up to half a step, that is, the result by as much of its code.
    """
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2e-6}[geometry.dtype]
    expected = reference(geometry, sequence)
    allowed = unit * 1.01 * expected.out.abs() + 3e-6 * scale
    if rounds_probabilities(geometry):
        allowed += 2**-8 * 1.03 * expected.spread
    if computes_in_integers(geometry):
        allowed += 2**-13.7 * 1.03 * expected.spread + expected.step / 2 * 1.01 * expected.codes
    error = (sequence.out.double() - expected.out).abs()
    assert bool((error <= allowed).all()), f"{(error / allowed).max():.3f} of what rounding explains"


def assert_errors_as_of_rounding(geometry: Geometry, sequence: Sequence) -> None:
    """Far sharper over many bf16 results: errors are on the whole as large as independent roundings make them. A little smaller, since the
    largest p of many a row is exactly 1.

    Rounding m in [1, 2) to 8 bits errs by up to 2^-8, evenly; relative to m, itself spread as 1 / m, the square is 2^-16 / 3 x 3 / (8 ln 2) on
    average. In integers the polynomial errs by 2^-14.5 in the root mean square, and a step is 0.7 of the largest on average, being a power of two.
    """
    expected, unit = reference(geometry, sequence), 2**-8 / (8 * math.log(2)) ** 0.5
    variance = (unit * expected.out) ** 2 + (2**-22 * expected.noise) ** 2  # sums in fp32, which show where a result is all but zero
    if rounds_probabilities(geometry):
        variance += (unit * expected.noise) ** 2
    if computes_in_integers(geometry):
        variance += (2**-14.5 * expected.noise) ** 2 + (0.7 * expected.step * expected.codes_noise) ** 2 / 12
    error = (sequence.out.double() - expected.out)[variance > 0] / variance[variance > 0].sqrt()
    size = float(error.square().mean().sqrt())
    assert error.numel() > 50000 and 0.92 < size < 1.02, f"{size:.3f} times what roundings give"
