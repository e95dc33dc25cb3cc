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


@pytest.mark.parametrize(("name", "at_16", "at_128"), [("int8", 0.54, 0.51), ("int4", 0.29, 0.27)])
def test_sizes(name: str, at_16: float, at_128: float) -> None:
    assert RowFormat(name, 16).num_bytes <= at_16 * 32 and RowFormat(name, 128).num_bytes <= at_128 * 256
    assert RowFormat(name, 32).num_bytes == {"int8": 33, "int4": 17}[name] and RowFormat(name, 33).num_bytes == {"int8": 34, "int4": 19}[name]


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_rows_are_their_own_bytes(dtype: torch.dtype) -> None:
    row, x = row_format(None, dtype, 5), sample((3, 2, 5), dtype, 1)
    assert row.dtype == dtype and row.num_bytes == 5 * dtype.itemsize
    assert torch.equal(decode(encode(x, row), row), x)


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(["int8", "int4"]), dim=st.sampled_from(DIMS), seed=st.integers(0, 10**6), dtype=st.sampled_from(DTYPES))
def test_a_decoded_row_is_near_and_encodes_to_itself(name: str, dim: int, seed: int, dtype: torch.dtype) -> None:
    row = RowFormat(name, dim)
    x = sample((4, 2, dim), dtype, seed, spread=0.0 if dtype == torch.float16 else 4.0)
    coded = encode(x, row)
    back = decode(coded, row)
    assert coded.dtype == torch.uint8 and coded.shape == (4, 2, row.num_bytes) and back.shape == x.shape
    assert torch.equal(encode(back, row), coded)
    # Half a step, which is at most 9/8 of what the largest magnitude would need by itself, or the smallest there is.
    width, codes, least = (dim, 127.0, 2.0**-22) if name == "int8" else (32, 7.4375, 2.0**-18)
    for first in range(0, dim, width):
        part, near = x[..., first : first + width].float(), back[..., first : first + width]
        step = (part.abs().amax(-1, keepdim=True) / codes * 9 / 8).clamp(min=least)
        assert ((part - near).abs() <= step * 0.50001).all()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_every_scale_is_of_use(name: str) -> None:
    """Rows of all codes at every scale but NaN: they decode to what the format's line says, and encode to themselves."""
    codes = torch.arange(-127, 128) if name == "int8" else torch.arange(-8, 8).repeat(2)
    row = RowFormat(name, len(codes))
    for byte in range(255):
        unit = math.ldexp(8 + byte % 8, byte // 8 - 25) * (1 if name == "int8" else 16)
        coded = encode(codes * unit, row)
        assert coded[-1] == byte and torch.equal(decode(coded, row), codes * unit)
        assert torch.equal(encode(decode(coded, row), row), coded)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_extremes_of_all_sizes_encode_to_themselves(name: str, sign: int) -> None:
    """A single extreme in fine steps over all that scales hold, and past it: within half a step, and its decoded row is the same row."""
    row, x = RowFormat(name, 1), sign * torch.exp2(torch.linspace(-24, 17, 200_000))[:, None]
    coded = encode(x, row)
    back = decode(coded, row)
    ends = {"int8": 127.25 * 896, "int4": (7.4375 if sign > 0 else 8.46875) * 16 * 896}[name]
    held = x.abs() <= ends
    assert held.any() and not held.all() and back[held].isfinite().all() and back[~held].isnan().all()
    assert torch.equal(encode(back, row), coded)
    unit = decode(torch.stack([torch.full_like(coded[:, 0], 1 if name == "int8" else 9), coded[:, -1]], dim=1), row)
    assert ((x - back).abs() <= unit * 0.50001)[held].all()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_all_of_float16_is_held(name: str) -> None:
    row = RowFormat(name, 32)
    for most in (65504.0, -65504.0):
        x = torch.linspace(-60000.0, 60000.0, 32).half()
        x[3] = most
        assert ((decode(encode(x, row), row) - x.float()).abs() <= 65504.0 / (112 if name == "int8" else 6.6) / 2).all()


@pytest.mark.parametrize("value", [1.3e5, 1e6, 3.0e38])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_what_no_scale_holds_is_not_clipped(name: str, value: float) -> None:
    row = RowFormat(name, 64)
    for sign in (1, -1):
        x = sample((3, 64), torch.float32, 5)
        x[1, 40] = sign * value
        back = decode(encode(x, row), row)
        assert back[1, 32:].isnan().all() and back[0].isfinite().all() and back[2].isfinite().all()
        assert back[1, :32].isnan().all() == (name == "int8")


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_zeros_and_tiny_rows_are_zeros(name: str) -> None:
    step, row = 2.0**-22 if name == "int8" else 2.0**-18, RowFormat(name, 35)
    for value in (0.0, -0.0, 2.0**-149, step / 2.01, -step / 2.01):
        assert torch.equal(decode(encode(torch.full((2, 35), value), row), row), torch.zeros(2, 35))
    for value in (step / 1.99, -step / 1.99, step, -step):
        assert torch.equal(decode(encode(torch.full((1, 35), value), row), row), torch.full((1, 35), math.copysign(step, value)))


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


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_torchs_default_dtype_changes_no_row(name: str, default: torch.dtype) -> None:
    """Trainers set it, and so does transformers, for all threads, while it loads another model."""
    row, x = RowFormat(name, 32), sample((20000, 1, 32), torch.float32, 3, spread=4.0)
    coded = encode(x, row)
    back = decode(coded, row)
    torch.set_default_dtype(default)
    try:
        assert torch.equal(encode(x, row), coded)
        assert decode(coded, row).dtype == torch.float32 and torch.equal(decode(coded, row), back)
    finally:
        torch.set_default_dtype(torch.float32)
