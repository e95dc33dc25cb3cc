"""The C++ attention against itself: a row's bits must not depend on how it was computed."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

pytest.importorskip("quire.tensors.native", reason="the native kernels are not built")

from quire.tensors.attention.native import NativeAttention
from tests.tensors.attention_cases import NAN, Cache, Geometry, assert_close, compute_alone, make_sequence, run_ragged

INT8 = ("int8", "int8")
BIT_GEOMETRIES = {
    "bf16": Geometry(6, 2, 64, 64),
    "bf16 of many heads": Geometry(20, 1, 64, 96),
    "bf16 odd": Geometry(4, 4, 35, 21),
    "fp16": Geometry(4, 2, 64, 48, torch.float16),
    "fp32": Geometry(7, 1, 20, 64, torch.float32),
    "window": Geometry(4, 2, 32, 32, window=75),
    "chunk": Geometry(4, 2, 32, 32, chunk=100, softcap=5.0, sinks=True),
    "int8": Geometry(6, 2, 64, 64, codec=INT8),
    "int8 of sixteen heads": Geometry(16, 1, 136, 128, codec=INT8),
    "int8 of many heads": Geometry(20, 1, 64, 96, codec=INT8),
    "int8 odd": Geometry(5, 5, 35, 21, codec=INT8),
    "int8 of wide heads": Geometry(5, 1, 136, 150, codec=INT8),
    "int8 window": Geometry(4, 2, 64, 64, window=75, codec=INT8),
    "int8 chunk": Geometry(14, 2, 32, 32, chunk=100, softcap=5.0, sinks=True, codec=INT8),
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


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float32}, {"codec": INT8}], ids=["bf16", "fp32", "int8"])
def test_bits_where_scores_keep_growing(isa: str, options: dict[str, Any]) -> None:
    """Scores of hundreds, so that rows find larger ones in later tiles and parts, and what they have shrinks."""
    geometry = Geometry(6, 2, 64, 32, **options)
    sequence = make_sequence(geometry, 700, seed=12, scale=3.0)
    sequence.k *= torch.linspace(0.1, 2.0, 700)[:, None, None].to(geometry.dtype)
    whole = compute_alone(geometry, sequence, [700], page_size=16, num_threads=1)
    assert_close(geometry, dataclasses.replace(sequence, rows=[whole]), scale=30.0)
    for counts in ([1] * 700, [3, 200, 497], [511, 1, 1, 187]):
        assert torch.equal(whole, compute_alone(geometry, sequence, counts, page_size=7, num_threads=2))


@pytest.mark.parametrize("codec", [(None, None), INT8], ids=["bf16", "int8"])
def test_bits_where_one_score_is_just_high_enough(isa: str, codec: tuple[str | None, str | None]) -> None:
    """One key's score is 7.3 to 9.8 binary orders above all others, so that bases follow it in some rows: in the same ones on every path."""
    geometry = Geometry(8, 1, 32, 64, codec=codec)
    sequence = make_sequence(geometry, 600, seed=14)
    sequence.q[:] = 0.0
    sequence.q[:, :, 0] = torch.linspace(3.6, 4.8, 600 * 8).reshape(600, 8).to(geometry.dtype)
    sequence.k[:] = 0.0
    sequence.k[64:, :, 0] = -8.0
    sequence.k[69, :, 0] = 8.0
    whole = compute_alone(geometry, sequence, [600], page_size=16, num_threads=2)
    assert torch.equal(whole, compute_alone(geometry, sequence, [2] * 300, page_size=16, num_threads=2))


def test_bits_where_two_keys_cancel(isa: str) -> None:
    """Every second pair of keys has large values that cancel, so that whatever takes a pair apart or adds it in another order shows: with few rows
    of two tokens one of which sees half of a pair, with many, alone."""
    geometry = Geometry(2, 1, 32, 64)
    sequence = make_sequence(geometry, 140, seed=15)
    sequence.q[:] = 0.0
    large = 2.0 ** torch.arange(8, 24).repeat_interleave(4)
    sequence.v[2::4], sequence.v[3::4] = large.to(geometry.dtype), -large.to(geometry.dtype)
    whole = compute_alone(geometry, sequence, [140], page_size=16, num_threads=2)
    for counts in ([1] * 140, [2] * 70, [1, *[3] * 46, 1], [100, *[2] * 20]):
        assert torch.equal(whole, compute_alone(geometry, sequence, counts, page_size=7, num_threads=2)), counts


@pytest.mark.parametrize("codec", [(None, None), INT8], ids=["bf16", "int8"])
def test_bits_of_a_million_results(isa: str, codec: tuple[str | None, str | None]) -> None:
    """A sum of probabilities that is off by its last bit shows in one of some ten thousand results in bf16, so it takes many to see it, of
    scores so far apart that such sums are rounded."""
    geometry = Geometry(8, 1, 32, 256, codec=codec)
    sequence = make_sequence(geometry, 600, seed=13, scale=2.0)
    whole = compute_alone(geometry, sequence, [600], page_size=16, num_threads=2)
    assert torch.equal(whole, compute_alone(geometry, sequence, [2] * 300, page_size=16, num_threads=2))


@pytest.mark.parametrize("codec", [(None, None), INT8], ids=["bf16", "int8"])
@pytest.mark.parametrize("num_heads", [2, 16])
def test_bits_do_not_depend_on_splitting_long_sequences(isa: str, num_heads: int, codec: tuple[str | None, str | None]) -> None:
    """One long sequence with few heads is cut over its keys when there are threads to fill: into three parts, or two where heads make them dear."""
    geometry, length = Geometry(num_heads, 1, 32, 40, codec=codec), 1100 if num_heads == 2 else 600
    sequence = make_sequence(geometry, length, seed=10)
    whole = compute_alone(geometry, sequence, [length], page_size=16, num_threads=1)
    if num_heads == 2:
        assert_close(geometry, dataclasses.replace(sequence, rows=[whole]))
    cache = Cache(geometry, page_size=16, num_pages=70, num_threads=16)
    cache.step([(sequence, length - 9)])
    for num_threads in (1, 2, 16):
        cache.backend = NativeAttention(num_threads)
        for _ in range(3):
            cache.step([(sequence, 1)])
            assert torch.equal(whole[: sequence.num_committed], sequence.out), num_threads


@pytest.mark.parametrize("codec", [(None, None), INT8], ids=["bf16", "int8"])
@pytest.mark.parametrize("heads", [(6, 2), (16, 1), (20, 1)])
def test_values_that_are_not_finite_stay_with_rows_that_see_them(isa: str, heads: tuple[int, int], codec: tuple[str | None, str | None]) -> None:
    """In bf16, with a window: the rows before a broken token and those that have left it behind have the bits they have without it, and those
    that see it have the same ones on every path."""
    geometry = Geometry(*heads, k_dim=32, v_dim=48, window=40, codec=codec)
    sequence = make_sequence(geometry, 200, seed=11)
    broken = dataclasses.replace(sequence, v=sequence.v.clone())
    broken.v[71], broken.v[75, :, 3], broken.v[150, 0, 0] = NAN, torch.inf, -torch.inf
    sees = torch.zeros(200, dtype=torch.bool)
    for at in (71, 75, 150):
        sees[at : at + 40] = True
    paths = [[200], [1] * 200, [70, 1, 1, 60, 68], [5] * 40]
    whole, *others = (compute_alone(geometry, sequence, counts, 16, 2) for counts in paths)
    for counts in paths:
        out = compute_alone(geometry, broken, counts, 7, 2)
        assert torch.equal(out[~sees], whole[~sees]), counts
        assert not bool(out[sees].isfinite().flatten(1).all(1).any()), "every row that sees one has it"
        others.append(out)
    for out in others[-3:]:
        torch.testing.assert_close(out, others[-4], rtol=0, atol=0, equal_nan=True)
