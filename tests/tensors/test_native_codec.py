"""Encoded rows in the kernels: written as the torch codec writes them, read as what they decode to, and no broken one mended."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

native = pytest.importorskip("quire.tensors.native", reason="the native kernels are not built")

from quire.tensors.attention.native import NativeAttention  # noqa: E402
from quire.tensors.codec import RowFormat, decode, encode  # noqa: E402
from tests.tensors.attention_cases import NAN, Geometry, assert_close, compute_alone, make_sequence, run_ragged  # noqa: E402
from tests.tensors.test_codec import DIMS, DTYPES, sample  # noqa: E402


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_equals_the_reference(isa: str, name: str, dtype: torch.dtype) -> None:
    for dim in DIMS:
        row = RowFormat(name, dim)
        wide = sample((9, 3, dim), dtype, dim, spread=1.0 if dtype == torch.float16 else 12.0)  # most of it past what scales hold, or zeros
        x = torch.cat([wide, sample((100, 3, dim), dtype, dim + 1, spread=1.0 if dtype == torch.float16 else 4.0)])
        x[1, 0], x[2, 1, dim // 2], x[3, 2, dim - 1], x[4, 0, 0] = 0.0, math.nan, -math.inf, math.inf
        x[5], x[6] = x[5].sign(), -x[6].abs()
        x[7, 0, :2] = torch.tensor([-1.0, 1.0])[:dim]
        for laid_out in (x, x.transpose(0, 1).contiguous().transpose(0, 1), torch.cat([x, x], dim=2)[..., dim:]):
            for num_threads in (1, 2):
                assert torch.equal(NativeAttention(num_threads).encode(laid_out, row), encode(x, row)), (dim, num_threads)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_all_sizes_and_past_them_equal_the_reference(isa: str, name: str) -> None:
    """Extremes in fine steps from below the smallest scale to past the largest, either sign alone and both in one row."""
    size = torch.exp2(torch.linspace(-26, 18, 30_000))[:, None]
    other = size * torch.rand(size.shape, generator=torch.Generator().manual_seed(7)) * 2
    x = torch.stack([torch.cat([size, size], 1), torch.cat([-size, -size / 3], 1), torch.cat([size, -other], 1)], dim=1)
    row = RowFormat(name, 2)
    assert torch.equal(NativeAttention(2).encode(x, row), encode(x, row))


def test_many_rows_on_threads_and_none(isa: str) -> None:
    row, x = RowFormat("int4", 128), sample((200, 8, 128), torch.bfloat16, 4)
    assert torch.equal(NativeAttention(2).encode(x, row), encode(x, row))
    assert NativeAttention(2).encode(x[:0], row).shape == (0, 8, row.num_bytes)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"encode cannot take x \(2, 2, 16\) torch.int32"):
        NativeAttention(1).encode(torch.zeros(2, 2, 16, dtype=torch.int32), RowFormat("int8", 16))
    with pytest.raises(ValueError, match="encode cannot take .* dim=17"):
        NativeAttention(1).encode(torch.zeros(2, 2, 16), RowFormat("int8", 17))


CODECS = [("int8", "int8"), ("int4", "int4"), ("int8", None), (None, "int4"), ("int4", "int8")]


@pytest.mark.parametrize("dims", [(1, 1), (2, 3), (17, 16), (40, 33), (32, 32), (64, 80), (128, 128), (72, 200)])
@pytest.mark.parametrize("codec", CODECS)
def test_codes_count_as_what_they_decode_to(isa: str, dims: tuple[int, int], codec: tuple[str | None, str | None]) -> None:
    """Decoding is exact in fp32, so attention over codes has the very bits of attention over the decoded."""
    geometry = Geometry(4, 2, *dims, dtype=torch.float32, codec=codec)
    sequence = make_sequence(geometry, 90, seed=12)
    k, v = (decode(encode(x, row), row) for x, row in zip((sequence.k, sequence.v), geometry.rows, strict=True))
    plain, decoded = dataclasses.replace(geometry, codec=(None, None)), dataclasses.replace(sequence, k=k, v=v)
    counts = [1, 70, 1, 18]
    assert torch.equal(compute_alone(geometry, sequence, counts, 7, 2), compute_alone(plain, decoded, counts, 16, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("codec", CODECS)
def test_ragged_mixes_of_codes_equal_the_reference(isa: str, dtype: torch.dtype, codec: tuple[str | None, str | None]) -> None:
    geometry = Geometry(6, 2, k_dim=48, v_dim=35, dtype=dtype, codec=codec)
    for sequence in run_ragged(geometry, [1, 65, 150], page_size=16, seed=1):
        assert_close(geometry, sequence)


@pytest.mark.parametrize("codec", CODECS)
def test_a_broken_key_or_value_is_not_mended_by_its_codec(isa: str, codec: tuple[str | None, str | None]) -> None:
    geometry = Geometry(codec=codec)
    sequence = make_sequence(geometry, 100, seed=6)
    whole = compute_alone(geometry, sequence, [100], 16, 1)
    for name, counts in (("k", [100]), ("k", [60, *[1] * 40]), ("v", [100]), ("v", [60, *[1] * 40])):
        broken = dataclasses.replace(sequence, **{name: getattr(sequence, name).clone()})
        getattr(broken, name)[71, :, 3] = NAN if None in codec else torch.inf  # a plain infinite key may well score -inf
        out = compute_alone(geometry, broken, counts, 16, 1)
        assert torch.equal(out[:71], whole[:71]) and not out[71:].isfinite().all(dim=2).any(), (name, counts)
