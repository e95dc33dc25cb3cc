"""bf16 packed in 12 bits where its exponents allow: every bit comes back whatever the weights are, and products have the bits of plain ones."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("quire.tensors.native", reason="the native kernels are not built")

from quire.tensors.native_library import lib
from quire.tensors.native_numbers import DTYPE_NUMBERS, packed_format
from quire.tensors.native_products import NativeProducts
from quire.tensors.packed import PackedLayout, PackedWeight
from tests.tensors.product_cases import assert_same_bits, random

BF16 = torch.bfloat16
N, K = 200, 330  # four panels, the last of few columns; three blocks, the last of few steps
SHORTENS = ("avx2", "avx2vnni", "avx512", "avx512vnni", "avx512bf16")  # instruction sets that pack in 12 bits


def bits(*shape: int) -> torch.Tensor:
    """Any 16 bits, but that what is no number is a quiet one: no two neighbours have exponents alike."""
    generator = torch.Generator().manual_seed(0)
    any_bits = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator)
    return torch.where(any_bits.view(BF16).isnan(), any_bits | 0x40, any_bits).view(BF16)


def weights(kind: str, n: int = N, k: int = K) -> torch.Tensor:
    weight = random(1, n, k, dtype=BF16) * 0.02
    if kind == "outliers":  # of some columns, far above all others
        weight[3::17] *= 2.0**20
        weight[5, 100] = torch.inf
    elif kind == "zeros":
        weight[random(2, n, k) < 0] = 0
        weight[7, ::50] = -0.0
    elif kind == "rows of zeros":
        weight[n // 3 :] = 0
    elif kind == "tiny":  # down to denormal numbers
        weight *= torch.exp2(-torch.arange(k) % 130.0).to(BF16)
    elif kind == "nan":
        weight[::9, ::11] = torch.nan
    elif kind == "one exponent":
        weight = weight.sign() + (weight == 0)
    elif kind == "any bits":
        weight = bits(n, k)
    return weight


KINDS = ["normal", "outliers", "zeros", "rows of zeros", "tiny", "nan", "one exponent", "any bits"]


def pack(weight: torch.Tensor, num_threads: int) -> PackedWeight:
    products, layout = NativeProducts(num_threads), PackedLayout(*weight.shape, BF16)
    out = torch.full((products.packed_bytes(layout),), 0xFF, dtype=torch.uint8)
    return PackedWeight(out[: products.pack(weight, layout, out)].clone(), layout, products.rows, "layer.weight")


@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_comes_back(product_isa: str, kind: str) -> None:
    weight = weights(kind)
    packed = pack(weight, 2)
    for ids in (torch.arange(N), torch.arange(N).flip(0), torch.tensor([N - 1, 0, 64, 65, 3])):
        assert torch.equal(packed.rows(ids).view(torch.int16), weight[ids].view(torch.int16))


@pytest.mark.parametrize("kind", KINDS)
def test_products_have_the_bits_of_plain(product_isa: str, kind: str) -> None:
    weight = weights(kind)
    packed = pack(weight, 2)
    for m in (1, 2, 3, 4, 5, 6, 7, 8, 13, 33, 70):
        for x in (random(3, m, K, dtype=BF16), random(4, m, K)):
            expected = NativeProducts(2).linear(x, weight.to(x.dtype))
            got = NativeProducts(2).linear(x, packed)
            assert torch.equal(got.isnan(), expected.isnan())  # which NaN it is is not promised
            assert_same_bits(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
def test_threads_and_pieces_pack_alike(product_isa: str, num_threads: int) -> None:
    weight = torch.cat([weights(kind, 64) for kind in KINDS])
    expected = pack(weight, 1).packed
    assert torch.equal(pack(weight, num_threads).packed, expected)
    dtype = DTYPE_NUMBERS["bfloat16"]
    room = torch.empty(NativeProducts(1).packed_bytes(PackedLayout(*weight.shape, BF16)), dtype=torch.uint8)
    n, at, used = weight.shape[0], 0, 0
    for count in (64, 192, n - 256):
        used = lib.pack(packed_format(dtype, "none"), weight[at:].data_ptr(), room.data_ptr(), n, at, count, K, K, dtype, num_threads)
        at += count
    assert torch.equal(room[:used], expected)


def test_sizes(product_isa: str) -> None:
    n, k = 512, 1024
    plain = n * k * 2
    sizes = {kind: pack(weights(kind, n, k), 2).packed.numel() / plain for kind in KINDS}
    if product_isa not in SHORTENS:
        assert set(sizes.values()) == {1.0}
        return
    assert all(size < 0.77 for kind, size in sizes.items() if kind in ("normal", "zeros", "rows of zeros", "one exponent"))
    assert all(size < 1.006 for size in sizes.values()) and sizes["any bits"] > 1  # a head for each block is all that it costs


def test_zeros_that_fill_a_panel_up_cost_nothing(product_isa: str) -> None:
    weight = weights("normal", 10, 1000)
    size = pack(weight, 1).packed.numel()
    assert size < 64 * 1024 * 2 * (0.77 if product_isa in SHORTENS else 1.01)
