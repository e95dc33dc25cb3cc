"""The C++ attention against a plain torch one, and against itself: a row's bits must not depend on how it was computed."""

from __future__ import annotations

import dataclasses
import itertools
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


def reference(geometry: Geometry, sequence: Sequence) -> torch.Tensor:
    """All rows at once in float64: the whole score matrix, masked, then softmax."""
    k, v = (decode(encode(x, row), row) for x, row in zip((sequence.k, sequence.v), geometry.rows, strict=True))
    q, k, v = (t.double().transpose(0, 1) for t in (sequence.q, k, v))
    group = geometry.num_heads // geometry.num_kv_heads
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
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
    return (weights @ v).transpose(0, 1)


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


def assert_close(geometry: Geometry, sequence: Sequence, scale: float = 1.0) -> None:
    """Within the rounding of the result's dtype; scores `scale` times larger than usual have rounding errors as much larger."""
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2e-6}[geometry.dtype]
    torch.testing.assert_close(sequence.out.double(), reference(geometry, sequence), rtol=unit * 1.01, atol=3e-6 * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1), (5, 1)])
def test_ragged_mixes_equal_the_reference(isa: str, dtype: torch.dtype, heads: tuple[int, int]) -> None:
    geometry = Geometry(*heads, k_dim=48, v_dim=32, dtype=dtype)
    for sequence in run_ragged(geometry, [1, 3, 64, 65, 150], page_size=16, seed=1):
        assert_close(geometry, sequence)


OPTIONS = {
    "window": {"window": 9},
    "window of one": {"window": 1},
    "window over tiles": {"window": 100},
    "chunk": {"chunk": 24},
    "chunk and window": {"chunk": 70, "window": 30},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "all": {"window": 33, "chunk": 80, "softcap": 2.0, "sinks": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("page_size", [1, 7, 16])
def test_options_equal_the_reference(isa: str, options: dict[str, float], page_size: int) -> None:
    geometry = dataclasses.replace(Geometry(), **options)
    for sequence in run_ragged(geometry, [2, 63, 130, 201], page_size, seed=2):
        assert_close(geometry, sequence)


@pytest.mark.parametrize("dims", [(1, 1), (3, 5), (17, 16), (40, 33), (80, 96), (128, 128), (192, 128), (72, 200)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_head_size(isa: str, dims: tuple[int, int], dtype: torch.dtype) -> None:
    geometry = Geometry(4, 2, *dims, dtype=dtype)
    for sequence in run_ragged(geometry, [5, 90], page_size=8, seed=3):
        assert_close(geometry, sequence)


def test_more_heads_than_a_block_of_rows(isa: str) -> None:
    geometry = Geometry(num_heads=200, num_kv_heads=1, k_dim=16, v_dim=16)
    for sequence in run_ragged(geometry, [3, 70], page_size=16, seed=4):
        assert_close(geometry, sequence)


def test_nothing_to_do() -> None:
    cache = Cache(Geometry(), page_size=4, num_pages=2)
    cache.step([])
    cache.step([], num_padding=3)
    idle, busy = make_sequence(Geometry(), 3, seed=1), make_sequence(Geometry(), 3, seed=2)
    cache.step([(idle, 0), (busy, 3)])
    assert_close(Geometry(), busy)


def test_large_scores_and_later_infinities_stay_apart(isa: str) -> None:
    """Scores far beyond exp's range, and a broken later token: earlier rows do not see it."""
    geometry = Geometry(dtype=torch.float16)
    sequence = make_sequence(geometry, 100, seed=6, scale=30.0)
    whole = dataclasses.replace(sequence, rows=[])
    Cache(geometry, 16, 8).step([(whole, 100)])
    assert_close(geometry, whole, scale=30.0**3)
    broken = dataclasses.replace(sequence, rows=[], k=sequence.k.clone(), v=sequence.v.clone())
    broken.k[71], broken.v[71] = torch.inf, NAN
    Cache(geometry, 16, 8).step([(broken, 100)])
    assert torch.equal(broken.out[:71], whole.out[:71])


def compute_alone(geometry: Geometry, sequence: Sequence, counts: list[int], page_size: int, num_threads: int) -> torch.Tensor:
    fresh = dataclasses.replace(sequence, page_ids=[], rows=[], num_committed=0)
    cache = Cache(geometry, page_size, len(sequence.q) // page_size + 2, num_threads, seed=page_size)
    for count in counts:
        cache.step([(fresh, count)])
    return fresh.out


BIT_GEOMETRIES = {
    "bf16": Geometry(6, 2, 64, 64),
    "bf16 odd": Geometry(4, 4, 35, 21),
    "fp16": Geometry(4, 2, 64, 48, torch.float16),
    "fp32": Geometry(7, 1, 20, 64, torch.float32),
    "window": Geometry(4, 2, 32, 32, window=75),
    "chunk": Geometry(4, 2, 32, 32, chunk=100, softcap=5.0, sinks=True),
    "int8": Geometry(6, 2, 64, 64, codec=("int8", "int8")),
    "int4 odd": Geometry(4, 4, 35, 21, torch.float16, codec=("int4", "int4")),
    "mixed": Geometry(7, 1, 20, 80, torch.float32, window=75, codec=("int8", "int4")),
    "half": Geometry(4, 2, 40, 32, codec=("int4", None)),
}


@pytest.mark.parametrize("geometry", BIT_GEOMETRIES.values(), ids=BIT_GEOMETRIES.keys())
def test_bits_do_not_depend_on_the_path(isa: str, geometry: Geometry) -> None:
    length, choose = 210, random.Random(9)
    sequence = make_sequence(geometry, length, seed=7)
    whole = compute_alone(geometry, sequence, [length], page_size=16, num_threads=1)
    assert torch.equal(whole, compute_alone(geometry, sequence, [1] * length, page_size=16, num_threads=1)), "one token at a time"
    for page_size, num_threads in [(1, 2), (4, 1), (7, 2), (16, 2), (64, 1), (1000, 2)]:
        counts: list[int] = []
        while sum(counts) < length:
            counts.append(min(choose.choice([1, 2, 3, 17, 64, 120]), length - sum(counts)))
        assert torch.equal(whole, compute_alone(geometry, sequence, counts, page_size, num_threads)), (page_size, num_threads, counts)


@pytest.mark.parametrize("geometry", BIT_GEOMETRIES.values(), ids=BIT_GEOMETRIES.keys())
def test_bits_do_not_depend_on_company(isa: str, geometry: Geometry) -> None:
    for sequence in run_ragged(geometry, [1, 31, 64, 130, 201], page_size=7, seed=8, max_count=150):
        assert torch.equal(sequence.out, compute_alone(geometry, sequence, [len(sequence.q)], page_size=64, num_threads=2))


@pytest.mark.parametrize("num_heads", [2, 16])
def test_bits_do_not_depend_on_splitting_long_sequences(isa: str, num_heads: int) -> None:
    """One long sequence with few heads is cut over its keys when there are threads to fill."""
    geometry = Geometry(num_heads, 1, 32, 32)
    sequence = make_sequence(geometry, 1300, seed=10)
    whole = compute_alone(geometry, sequence, [1300], page_size=16, num_threads=1)
    if num_heads == 2:
        assert_close(geometry, dataclasses.replace(sequence, rows=[whole]))
    for num_threads in (1, 2, 16):
        split = compute_alone(geometry, sequence, [1297, 1, 1, 1], page_size=16, num_threads=num_threads)
        assert torch.equal(whole, split), num_threads


def test_wrong_arguments_are_named() -> None:
    geometry = Geometry()
    cache, sequence = Cache(geometry, page_size=4, num_pages=4), make_sequence(geometry, 9, seed=1)
    cache.step([(sequence, 8)])
    sequence.page_ids[1] = 4
    with pytest.raises(RuntimeError, match=r"page id 4 \(sequence 0, entry 1\) is outside 0\.\.3"):
        cache.step([(sequence, 1)])
    sequence.page_ids.pop()
    with pytest.raises(RuntimeError, match="8 committed tokens but only 1 pages of 4"):
        cache.step([(sequence, 1)])
    k = sequence.k[:1]
    with pytest.raises(RuntimeError, match=r"slots\[0\] = 16 is outside the 16 slots of 4 pages"):
        cache.backend.commit(k, sequence.v[:1], cache.pages, cache.place, torch.tensor([16]))
    with pytest.raises(ValueError, match="commit cannot take k .* torch.float32"):
        cache.backend.commit(k.float(), sequence.v[:1], cache.pages, cache.place, torch.tensor([0]))
    with pytest.raises(ValueError, match="slots .* torch.int32"):
        cache.backend.commit(k, sequence.v[:1], cache.pages, cache.place, torch.tensor([0], dtype=torch.int32))
    with pytest.raises(ValueError, match="num_threads"):
        NativeAttention(0)
