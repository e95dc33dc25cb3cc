"""The C++ attention against a plain torch one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("quire.tensors.native", reason="the native kernels are not built")

from quire.tensors.attention.native import NativeAttention
from tests.tensors.attention_cases import NAN, Cache, Geometry, assert_close, assert_errors_as_of_rounding, compute_alone, make_sequence, run_ragged


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1), (5, 1)])
def test_ragged_mixes_equal_the_reference(isa: str, dtype: torch.dtype, heads: tuple[int, int]) -> None:
    geometry = Geometry(*heads, k_dim=48, v_dim=32, dtype=dtype)
    for sequence in run_ragged(geometry, [1, 3, 64, 65, 150], page_size=16, seed=1):
        assert_close(geometry, sequence)


@pytest.mark.parametrize("codec", [(None, None), ("int8", "int8")], ids=["bf16", "int8"])
@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_errors_are_those_of_rounding(isa: str, scale: float, codec: tuple[str | None, str | None]) -> None:
    geometry = Geometry(6, 2, k_dim=64, v_dim=64, codec=codec)
    sequence = make_sequence(geometry, 300, seed=14, scale=scale)
    Cache(geometry, 16, 30).step([(sequence, 300)])
    assert_errors_as_of_rounding(geometry, sequence)


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


@pytest.mark.parametrize("num_heads", [200, 1600])
def test_more_heads_than_a_block_of_rows(isa: str, num_heads: int) -> None:
    geometry = Geometry(num_heads, num_kv_heads=1, k_dim=16, v_dim=16)
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


@pytest.mark.parametrize("codec", [(None, None), ("int8", "int8")], ids=["bf16", "int8"])
def test_the_calling_thread_keeps_small_numbers(isa: str, codec: tuple[str | None, str | None]) -> None:
    geometry, small = Geometry(4, 2, 32, 32, codec=codec), torch.full((64,), 1e-30)
    compute_alone(geometry, make_sequence(geometry, 40, seed=5), [38, 1, 1], page_size=16, num_threads=1)
    assert bool(((small * 1e-10) > 0).all())


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
