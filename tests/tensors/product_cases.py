"""What tests of products have in common, whichever kernels compute them."""

from __future__ import annotations

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    integers = torch.int32 if got.dtype == torch.float32 else torch.int16
    assert got.dtype == expected.dtype
    assert torch.equal(got.contiguous().view(integers), expected.contiguous().view(integers))


def assert_close_to_fp64(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, num_roundings: int) -> None:
    """Within the rounding of the result and so many roundings in fp32 of the absolute sum (the worst case)."""
    wide_bias = torch.zeros(weight.shape[0]) if bias is None else bias
    exact = x.double() @ weight.double().t() + wide_bias.double()
    size = x.double().abs() @ weight.double().abs().t() + wide_bias.double().abs()
    limits = torch.finfo(got.dtype)
    allowed = limits.eps / 2 * (exact.abs() + limits.smallest_normal) + num_roundings * 2.0**-24 * size
    assert ((got.double() - exact).abs() <= allowed).all()
