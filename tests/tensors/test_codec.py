"""The codec of pages in torch: sizes, how far a decoded row may be from the row, and that it encodes to itself."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.tensors.codec import RowFormat, decode, encode, row_format

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIMS = [1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 35, 64, 65, 80, 96, 127, 128, 129, 192, 256]


def sample(shape: tuple[int, ...], dtype: torch.dtype, seed: int, spread: float = 0.0) -> torch.Tensor:
    """Normal numbers, each row scaled by up to 10**spread either way."""
    g = torch.Generator().manual_seed(seed)
    size = 10.0 ** (spread * (2 * torch.rand((*shape[:-1], 1), generator=g) - 1))
    return (torch.randn(shape, generator=g) * size).to(dtype)


@pytest.mark.parametrize(("name", "at_16", "at_128"), [("int8", 0.60, 0.53), ("int4", 0.40, 0.30)])
def test_sizes(name: str, at_16: float, at_128: float) -> None:
    assert RowFormat(name, 16).num_bytes <= at_16 * 32 and RowFormat(name, 128).num_bytes <= at_128 * 256


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_rows_are_their_own_bytes(dtype: torch.dtype) -> None:
    row, x = row_format(None, dtype, 5), sample((3, 2, 5), dtype, 1)
    assert row.dtype == dtype and row.num_bytes == 5 * dtype.itemsize
    assert torch.equal(decode(encode(x, row), row), x)


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(["int8", "int4"]), dim=st.sampled_from(DIMS), seed=st.integers(0, 10**6), dtype=st.sampled_from(DTYPES))
def test_a_decoded_row_is_near_and_encodes_to_itself(name: str, dim: int, seed: int, dtype: torch.dtype) -> None:
    row = RowFormat(name, dim)
    x = sample((4, 2, dim), dtype, seed, spread=0.0 if dtype == torch.float16 else 9.0)
    coded = encode(x, row)
    back = decode(coded, row)
    assert coded.dtype == torch.uint8 and coded.shape == (4, 2, row.num_bytes) and back.shape == x.shape
    assert torch.equal(encode(back, row), coded)
    # Half a step, and a whole one for the far end of int4, whose codes reach from -8 to 7. A step is a share of the largest magnitude; its rounding
    # to bf16 may take 2^-8 off it, seven times at the far end.
    width, share = (dim, 0.5 / 127) if name == "int8" else (32, 1.0 / 8)
    for first in range(0, dim, width):
        part, near = x[..., first : first + width].float(), back[..., first : first + width]
        assert ((part - near).abs() <= part.abs().amax(-1, keepdim=True) * share * (1.0 + 7 / 256)).all()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_zeros_and_tiny_rows_are_zeros(name: str) -> None:
    for value in (0.0, -0.0, 2.0**-101, -(2.0**-120)):
        row = RowFormat(name, 35)
        assert torch.equal(decode(encode(torch.full((2, 35), value), row), row), torch.zeros(2, 35))
    assert decode(encode(torch.full((1, 35), 2.0**-90), RowFormat(name, 35)), RowFormat(name, 35)).ne(0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_what_is_not_finite_stays_so(name: str, bad: float) -> None:
    row, x = RowFormat(name, 80), sample((3, 80), torch.float32, 2)
    x[1, 40] = bad
    back = decode(encode(x, row), row)
    spoilt = slice(0, 80) if name == "int8" else slice(32, 64)
    assert back[1, spoilt].isnan().all() and back[0].isfinite().all() and back[2].isfinite().all()
    assert name == "int8" or back[1, :32].isfinite().all()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_error_of_normal_rows(name: str) -> None:
    """What was measured when the formats were chosen, with a margin: noise against signal in dB, on rows of 128 normal numbers."""
    x = sample((2000, 128), torch.float32, 3)
    noise = decode(encode(x, RowFormat(name, 128)), RowFormat(name, 128)) - x
    assert 10 * math.log10(float(noise.square().mean() / x.square().mean())) < {"int8": -43.0, "int4": -20.5}[name]
