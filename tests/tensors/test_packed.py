"""Packed weights have the bits of plain ones; quantised weights keep a law of their own; what reads a packed weight some other way is told so."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

native = pytest.importorskip("quire.tensors.native", reason="the native kernels are not built")

from quire.tensors.native_products import NativeProducts  # noqa: E402
from quire.tensors.packed import PackedLayout, PackedWeight  # noqa: E402
from quire.tensors.products import SPANS, ReferenceProducts, parts  # noqa: E402
from tests.tensors.product_cases import DTYPES, NAN, assert_same_bits, random  # noqa: E402

CODES = ["int8", "int4"]
PARTS = {"int8": 128, "int4": 32}  # k that is summed before it is scaled, where x is taken as it is
SHAPES = [(33, 31), (130, 129), (200, 257), (64, 640), (70, 2250)]  # the last of several blocks, however few the rows
ROWS = [*range(1, 18), 23, 29, 32, 33, 49, 64, 65, 100, 260]  # every number of few rows, whole and broken tiles, more than a scratch holds


def pack(weight: torch.Tensor, quantization: str = "none", products: NativeProducts | ReferenceProducts | None = None) -> PackedWeight:
    products = products or NativeProducts(2)
    layout = PackedLayout(*weight.shape, weight.dtype, quantization)
    most = products.packed_bytes(layout)
    out = torch.full((most + 64,), 0xFF, dtype=torch.uint8)
    used = products.pack(weight, layout, out[:most])
    assert used <= most and (out[most:] == 0xFF).all()
    return PackedWeight(out[:used].clone(), layout, products.rows, "layer.weight")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_packed_has_the_bits_of_plain(product_isa: str, dtype: torch.dtype, n: int, k: int) -> None:
    weight, bias = random(1, n, k, dtype=dtype), random(2, n, dtype=dtype)
    packed = pack(weight)
    whole = random(0, max(ROWS), k, dtype=dtype)
    for m in ROWS:
        products = NativeProducts(1 + m % 2)
        given = bias if m % 3 else None
        assert_same_bits(products.linear(whole[:m], packed, given), products.linear(whole[:m], weight, given))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_keeps_signs_of_zero_and_what_is_not_a_number(product_isa: str, dtype: torch.dtype) -> None:
    products = NativeProducts(2)
    for m, k in itertools.product((1, 5, 20), (16, 20, 33, 130, 144)):
        x, weight = torch.full((m, k), -1e-4, dtype=dtype), torch.full((40, k), 1e-5, dtype=dtype)
        weight[7, k - 1] = torch.inf
        weight[39, 0] = NAN
        expected = products.linear(x, weight)
        assert expected[:, 39].isnan().all() and (expected[:, 7] == -torch.inf).all()
        got = products.linear(x, pack(weight))
        assert torch.equal(got.isnan(), expected.isnan())
        assert_same_bits(got.nan_to_num(), expected.nan_to_num())
        assert_same_bits(products.linear(x * 0, pack(weight.abs().nan_to_num(1, 1))), products.linear(x * 0, weight.abs().nan_to_num(1, 1)))


def test_one_fused_step_at_a_time(product_isa: str) -> None:
    """Products that round, which those of bf16 numbers never do: fused or not shows."""
    x, weight = random(0, 20, 150), random(1, 70, 150)
    assert_same_bits(NativeProducts(2).linear(x, pack(weight)), NativeProducts(1).linear(x, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantization", ["none", *CODES])
def test_rows_are_the_weight(product_isa: str, dtype: torch.dtype, quantization: str) -> None:
    for n, k in SHAPES:
        weight = random(1, n, k, dtype=dtype)
        packed = pack(weight, quantization)
        expected = weight if quantization == "none" else pack(weight, quantization, ReferenceProducts()).rows(torch.arange(n))
        for ids in (torch.arange(n), torch.arange(5, n), torch.arange(n).flip(0), torch.tensor([[n - 1, 0], [3, 3]])):
            assert_same_bits(packed.rows(ids), expected[ids])
        assert_same_bits(packed.rows(torch.arange(n), torch.float32), pack(weight, quantization).rows(torch.arange(n).flip(0), torch.float32).flip(0))
    for bad in (-1, n):
        with pytest.raises(IndexError):
            packed.rows(torch.tensor([0, bad]))


def in_integers_on(isa: str, quantization: str) -> bool:
    """Whether bf16 rows meet codes as integers; on AMX they meet those of int4 made bf16."""
    return (isa, quantization) != ("amx", "int4")


def fused() -> bool:
    """Whether a multiply-add rounds once, which it does but in kernels for any CPU on one that has no such instruction."""
    x, weight = torch.tensor([[-(1 + 2.0**-11), 1 + 2.0**-12]]), torch.tensor([[1, 1 + 2.0**-12]])
    return bool(NativeProducts(1).linear(x, weight))


@functools.cache
def coded(quantization: str, dtype: torch.dtype, m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight and what csrc/linear_packed.h promises for them, term by term. Exact: no product of x's few bits and a code rounds."""
    x, weight = random(3, m, k, dtype=torch.bfloat16).to(dtype), random(4, n, k, dtype=dtype)
    reference = ReferenceProducts()
    layout = PackedLayout(n, k, dtype, quantization)
    out = torch.empty(reference.packed_bytes(layout), dtype=torch.uint8)
    reference.pack(weight, layout, out)
    codes, scales = (part.float() for part in parts(out, layout))
    total, wide = torch.zeros(m, n), x.float()
    for start in range(0, k, PARTS[quantization]):
        part = torch.zeros(m, n)
        for i in range(start, min(start + PARTS[quantization], k)):
            part += wide[:, i : i + 1] * codes[:, i]
        part *= scales[:, start // SPANS[quantization]]
        total = total + part if start else part
    return x, weight, total


def in_integers(x: torch.Tensor, weight: torch.Tensor, quantization: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What csrc/linear_codes.h promises for x and weight of bf16, and by how much that may be off what the same codes give with x as it is."""
    layout = PackedLayout(*weight.shape, weight.dtype, quantization)
    out = torch.empty(ReferenceProducts().packed_bytes(layout), dtype=torch.uint8)
    ReferenceProducts().pack(weight, layout, out)
    codes, scales = (part.double() for part in parts(out, layout))
    step = torch.Tensor.double if fused() else torch.Tensor.float
    total, off, span = torch.zeros(x.shape[0], weight.shape[0]), torch.zeros(x.shape[0], weight.shape[0], dtype=torch.double), SPANS[quantization]
    for start in range(0, x.shape[1], span):
        part, code = x[:, start : start + span].float(), codes[:, start : start + span]
        top = part.abs().amax(1, keepdim=True).clamp(min=2.0**-100)
        limit = torch.full_like(top, 127)  # a tensor: torch divides a number by way of a reciprocal, which rounds twice
        s = (torch.round(part * (limit / top)).double() @ code.T).float()  # integers below 2^24
        unit = (top / limit).double() * scales[:, start // span]
        total = (step(total) + step(s) * step(unit.float())).float()  # rounded once, since fp64 holds such sums, or twice
        off += (top / limit).double() * 0.5001 * scales[:, start // span].abs() * code.abs().sum(1)
    return total, off


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantization", CODES)
def test_codes_keep_their_law(product_isa: str, quantization: str, dtype: torch.dtype) -> None:
    for n, k in ((33, 31), (130, 129), (70, 300), (64, 512), (20, 576), (64, 850)):
        x, weight, total = coded(quantization, dtype, 100, n, k)
        packed, bias = pack(weight, quantization), random(5, n, dtype=dtype)
        plain, biased = total.to(dtype), (total + bias.float()).to(dtype)
        if in_integers_on(product_isa, quantization) and dtype == torch.bfloat16:
            total, _ = in_integers(x, weight, quantization)
            plain, biased = total.to(dtype), (total + bias.float()).to(dtype)
        elif product_isa == "amx" and dtype == torch.bfloat16:  # there it is a bf16 weight that takes less memory
            elements = packed.rows(torch.arange(n))
            plain, biased = NativeProducts(2).linear(x, elements), NativeProducts(2).linear(x, elements, bias)
        for m in (*range(1, 71), 100):
            products = NativeProducts(1 + m % 2)
            assert_same_bits(products.linear(x[:m], packed), plain[:m])
            assert_same_bits(products.linear(x[:m], packed, bias), biased[:m])


@pytest.mark.parametrize("num_threads", [2, 3, 5])
@pytest.mark.parametrize("quantization", ["none", *CODES])
def test_threads_take_from_each_other(product_isa: str, quantization: str, num_threads: int) -> None:
    """Who computes what is left to chance, above all with more threads than cores: every column is there, once, with the bits of one thread."""
    packed, x = pack(random(1, 64 * 13 + 5, 200, dtype=torch.bfloat16), quantization), random(0, 16, 200, dtype=torch.bfloat16)
    for m in (1, 5, 16):
        alone = NativeProducts(1).linear(x[:m], packed)
        for _ in range(20):
            assert_same_bits(NativeProducts(num_threads).linear(x[:m], packed), alone)


@pytest.mark.parametrize("quantization", CODES)
def test_rows_of_any_size_stay_by_themselves(product_isa: str, quantization: str) -> None:
    """Rows of large, tiny, mixed and no magnitudes, and some that are not finite, beside plain ones: each as alone, and near fp64."""
    weight, x = random(1, 70, 300, dtype=torch.bfloat16), random(2, 40, 300, dtype=torch.bfloat16)
    x[3], x[4], x[5] = x[3] * 2.0**100, x[4] * 2.0**-120, 0
    x[6] *= 2.0 ** (torch.arange(300) % 40 - 20)
    x[7, 131], x[8, 299] = NAN, torch.inf
    packed = pack(weight, quantization)
    got = NativeProducts(2).linear(x, packed)
    assert not got[7:9].isfinite().any() and not got[5].any()
    for rows in ([3], [8, 7, 6, 5, 4], list(range(39, 4, -1))):
        assert_same_bits(NativeProducts(1).linear(x[rows], packed).nan_to_num(), got[rows].nan_to_num())
    fine = [row for row in range(40) if row not in (7, 8)]
    exact = x[fine].double() @ packed.rows(torch.arange(70), torch.float32).double().T
    size = x[fine].double().abs() @ packed.rows(torch.arange(70), torch.float32).double().abs().T
    share = 2.0**-8 if product_isa == "amx" and quantization == "int4" else 2.0**-12  # int4 there is made bf16 first
    most = 2.0**-8 * exact.abs() + share * size + 2.0**-112
    if in_integers_on(product_isa, quantization):
        law, off = in_integers(x[fine], weight, quantization)
        assert_same_bits(got[fine], law.to(torch.bfloat16))
        most += off * (1 + 2.0**-8)
    assert ((got[fine].double() - exact).abs() <= most).all()


@pytest.mark.parametrize("quantization", CODES)
def test_one_span_is_as_coarse_as_its_largest(product_isa: str, quantization: str) -> None:
    """Codes in integers: what one row has in one span says nothing about another span, nor another row; no magnitudes and infinite ones included."""
    if not in_integers_on(product_isa, quantization):
        pytest.skip("x is taken as it is")
    span, n = SPANS[quantization], 70
    weight, x = random(1, n, 3 * span + 20, dtype=torch.bfloat16), random(2, 70, 3 * span + 20, dtype=torch.bfloat16)
    expected, _ = in_integers(x, weight, quantization)
    for row, bad in ((0, torch.inf), (17, -torch.inf), (40, NAN), (69, NAN)):
        x[row, row * 11 % x.shape[1]] = bad
    x[5], x[20, span:], x[33, : 3 * span], x[60] = 0, 0, 0, x[60] * 2.0**-110
    packed, touched = pack(weight, quantization), [0, 5, 17, 20, 33, 40, 60, 69]
    rest = [row for row in range(70) if row not in touched]
    law, _ = in_integers(x[[5, 20, 33, 60]], weight, quantization)
    for m in range(1, 71):
        got = NativeProducts(1 + m % 2).linear(x[:m], packed)
        assert got[[row for row in (0, 17, 40, 69) if row < m]].isnan().all()
        here = [row for row in rest if row < m]
        assert_same_bits(got[here], expected[here].to(torch.bfloat16))
        for i, row in enumerate((5, 20, 33, 60)):
            if row < m:
                assert_same_bits(got[row], law[i].to(torch.bfloat16))
    assert not law[0].any() and law[1:3].any(1).all()


@pytest.mark.parametrize("quantization", ["none", *CODES])
def test_weights_may_have_another_dtype_than_x(product_isa: str, quantization: str) -> None:
    weight = random(1, 100, 200, dtype=torch.bfloat16)
    x = random(0, 30, 200)
    expected = pack(weight.float(), quantization)
    for m in (1, 7, 30):
        assert_same_bits(NativeProducts(2).linear(x[:m], pack(weight, quantization)), NativeProducts(2).linear(x[:m], expected))


@pytest.mark.parametrize("quantization", CODES)
def test_codes_are_close_to_their_weights(quantization: str) -> None:
    weight = random(1, 256, 1024, dtype=torch.bfloat16)
    weight[3] = 0
    weight[4, 100] = 1000
    rows = pack(weight, quantization).rows(torch.arange(256), torch.float32)
    steps = weight.float().view(256, -1, SPANS[quantization]).abs().amax(-1) / {"int8": 127, "int4": 8}[quantization]
    error = (rows - weight.float()).abs().view(256, -1, SPANS[quantization]).amax(-1)
    # What lies opposite an int4 extreme may be a whole step beyond the last code.
    assert (error <= {"int8": 0.76, "int4": 1.05}[quantization] * steps + 1e-30).all() and not rows[3].any()


@pytest.mark.parametrize("quantization", CODES)
def test_the_reference_is_near_the_kernels(quantization: str) -> None:
    weight, bias, x = random(1, 70, 300), random(2, 70), random(0, 40, 300)
    reference = ReferenceProducts()
    got = reference.linear(x, pack(weight, quantization, reference), bias)
    assert torch.allclose(got, NativeProducts(2).linear(x, pack(weight, quantization), bias), atol=1e-4)
    assert torch.equal(got[5:6], reference.linear(x[5:6], pack(weight, quantization, reference), bias))


@pytest.mark.parametrize("quantization", ["none", *CODES])
def test_modules_of_torch_still_run(quantization: str) -> None:
    weight, bias = random(1, 70, 40, dtype=torch.bfloat16), random(2, 70, dtype=torch.bfloat16)
    x, ids = random(0, 5, 40, dtype=torch.bfloat16), torch.tensor([[3, 69], [0, 3]])
    packed = pack(weight, quantization)
    elements = packed.rows(torch.arange(70))
    linear, embedding = nn.Linear(40, 70, dtype=torch.bfloat16), nn.Embedding(70, 40)
    linear._parameters["weight"] = embedding._parameters["weight"] = packed
    linear._parameters["bias"] = bias
    with torch.inference_mode():
        assert torch.allclose(linear(x), functional.linear(x, elements, bias), atol=0.1)
        assert torch.equal(embedding(ids), elements[ids])
        assert torch.equal(packed.type(torch.float32), elements.float()) and torch.equal(packed.to(torch.bfloat16), elements)
        assert torch.equal(packed[3], elements[3]) and torch.equal(packed[-1, :], elements[-1])
        turned = PackedWeight(packed.packed, packed.form, NativeProducts(1).rows, "conv.weight", transposed=True)
        assert torch.equal(turned.type(torch.float32), elements.float().t())
        assert torch.allclose(torch.addmm(bias, x, turned), functional.linear(x, elements, bias), atol=0.1)
        assert_same_bits(NativeProducts(2).matmul(x, turned, bias), NativeProducts(2).linear(x, packed, bias))
    assert packed.shape == (70, 40) and turned.shape == (40, 70) and packed.dtype == torch.bfloat16 and packed.is_floating_point()


def test_other_readers_are_told() -> None:
    packed, x = pack(random(1, 70, 40)), random(0, 5, 40)
    for read in (
        lambda: packed + 1,
        lambda: x @ packed.T,
        lambda: packed[:1],
        lambda: packed[0, 0],
        lambda: packed.float().sum(),
        packed.detach,
        packed.sum,
    ):
        with pytest.raises(RuntimeError, match=r"layer\.weight is packed"):
            read()
    with pytest.raises(ValueError, match=r"layer\.weight is packed and cannot be multiplied as its transpose"):
        NativeProducts(1).matmul(x, packed)
    with pytest.raises(ValueError, match=r"x \(5, 39\), weight \(70, 40\)"):
        NativeProducts(1).linear(x[:, :39], packed)
    with pytest.raises(ValueError, match="do not fit"):
        NativeProducts(1).linear(x, packed, random(2, 71))
    with pytest.raises(TypeError, match="native products take one dtype"):
        NativeProducts(1).linear(x.double(), packed)
    with pytest.raises(TypeError, match="bias torch.float16"):
        NativeProducts(1).linear(x, packed, random(2, 70).half())


@pytest.mark.parametrize("k", [1, 16, 31, 64, 255, 256, 257, 512, 576, 850])
def test_packed_bytes_are_codes_and_a_scale_a_span(product_isa: str, k: int) -> None:
    """Columns filled up to 64 and k to 16; two bytes for a column and a span that is begun."""
    for n, (quantization, bits) in itertools.product((1, 64, 130), zip(CODES, (8, 4), strict=True)):
        columns, padded = -(-n // 64) * 64, -(-k // 16) * 16
        expected = columns * (padded * bits // 8 + 2 * -(-k // SPANS[quantization]))
        assert NativeProducts(1).packed_bytes(PackedLayout(n, k, torch.bfloat16, quantization)) == expected
        assert pack(random(1, n, k), quantization).packed.numel() == expected


def test_nothing_to_multiply() -> None:
    products = NativeProducts(2)
    for quantization in ("none", *CODES):
        packed = pack(torch.zeros(20, 8), quantization)
        assert products.linear(torch.empty(0, 8), packed).shape == (0, 20) and products.linear(torch.empty(2, 0, 8), packed).shape == (2, 0, 20)
    with pytest.raises(ValueError, match="out of range"):
        pack(torch.zeros(20, 0))
