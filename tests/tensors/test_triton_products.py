"""The Triton products in Triton's interpreter, against fp64 and against themselves: a row's bits must not depend on the batch."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from quire.tensors import triton_products
from quire.tensors.packed import PackedLayout, PackedWeight
from quire.tensors.products import ReferenceProducts
from quire.tensors.triton_cut import Cut
from quire.tensors.triton_interpreted import multiply
from quire.tensors.triton_products import TritonProducts
from tests.tensors import quick_interpreter
from tests.tensors.product_cases import DTYPES, NAN, assert_close_to_fp64, assert_same_bits, random

quick_interpreter.install()
QUANTIZATIONS = ["int8", "int4"]
COUNTS = [1, 2, 15, 17, 64, 65, 130]


@pytest.fixture(params=["interpreter", "device"])
def shape(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a program: the interpreter's own, and those that devices are to have."""
    if request.param == "device":
        monkeypatch.setattr(triton_products, "_shape", triton_products._SHAPES.get)


def pack(weight: torch.Tensor, quantization: str, transposed: bool = False) -> PackedWeight:
    products, layout = TritonProducts(), PackedLayout(*weight.shape, weight.dtype, quantization)
    out = torch.empty(products.packed_bytes(layout), dtype=torch.uint8)
    products.pack(weight, layout, out)
    return PackedWeight(out, layout, products.rows, "weight", transposed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_near_fp64_and_the_reference(shape: None, dtype: torch.dtype) -> None:
    for m, n, k in [(1, 1, 1), (3, 33, 31), (65, 600, 64), (9, 17, 129), (2, 130, 700)]:
        x, weight, bias = random(0, m, k, dtype=dtype), random(1, n, k, dtype=dtype), random(2, n, dtype=dtype)
        for given in (None, bias):
            got, expected = TritonProducts().linear(x, weight, given), ReferenceProducts().linear(x, weight, given)
            assert got.dtype == dtype and got.shape == expected.shape
            assert_close_to_fp64(got, x, weight, given, k + 2)
            torch.testing.assert_close(got, expected, atol=1e-4 + 4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantization", ["none", *QUANTIZATIONS])
def test_rows_do_not_see_the_batch_or_the_cut(shape: None, dtype: torch.dtype, quantization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of two parts, the second of which is not whole, of one program or of two."""
    monkeypatch.setattr(triton_products, "_PART", 256)
    x, weight, bias = random(0, 130, 276, dtype=dtype), random(1, 72, 276, dtype=dtype), random(2, 72, dtype=dtype)
    laid = weight if quantization == "none" else pack(weight, quantization)
    one, cut = TritonProducts(), TritonProducts(Cut(1000))
    whole = one.linear(x, laid, bias)
    for m, products in zip(COUNTS, itertools.cycle((one, cut)), strict=False):
        assert_same_bits(products.linear(x[:m], laid, bias), whole[:m])
        assert_same_bits(cut.linear(x[-m:], laid, bias), whole[-m:])
    order = torch.randperm(130, generator=torch.Generator().manual_seed(3))
    assert_same_bits(cut.linear(x[order], laid, bias), whole[order])
    for row in (0, 14, 66, 129):
        assert_same_bits(one.linear(x[row : row + 1], laid, bias), whole[row : row + 1])
    assert_same_bits(cut.linear(x[:3], laid), one.linear(x[:3], laid))


@pytest.mark.parametrize("k", [1023, 1024, 1025, 2048])
def test_parts_as_long_as_they_are(k: int) -> None:
    x, weight, bias = random(0, 2, k), random(1, 30, k), random(2, 30)
    whole = TritonProducts().linear(x, weight, bias)
    assert_close_to_fp64(whole, x, weight, bias, k + 2)
    assert_same_bits(TritonProducts(Cut(1000)).linear(x, weight, bias), whole)


def test_few_programs_are_cut_and_many_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[int] = []
    add = triton_products._add_parts
    monkeypatch.setattr(triton_products, "_add_parts", Launches(add, added))
    monkeypatch.setattr(triton_products, "_CUT_BYTES", 4 * 2 * 70 * 30)
    products, weight = TritonProducts(Cut(2)), random(1, 30, 1100)
    for m, k, calls in ((64, 1100, 1), (65, 1100, 1), (1, 1024, 1), (1, 1025, 2)):
        products.linear(random(0, m, k), weight[:, :k].contiguous())
        assert len(added) == calls, (m, k)
    TritonProducts(Cut(1000)).linear(random(0, 71, 1100), weight)  # its sums would take too much
    assert len(added) == 2


class Launches:
    """A kernel that notes how many times it was launched."""

    def __init__(self, kernel: Any, launched: list[int]) -> None:
        self._kernel, self._launched = kernel, launched

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self._launched.append(grid[0])
        return self._kernel[grid]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_and_strides_agree(dtype: torch.dtype) -> None:
    products = TritonProducts()
    for m in (1, 3, 70):
        x, weight, bias = random(0, m, 100, dtype=dtype), random(1, 72, 100, dtype=dtype), random(2, 72, dtype=dtype)
        expected = products.linear(x, weight, bias)
        roomy_x, roomy_weight = torch.full((m, 133), NAN, dtype=dtype), torch.full((72, 131), NAN, dtype=dtype)
        roomy_x[:, 5:105], roomy_weight[:, 7:107] = x, weight  # whatever reads beside its rows meets NaN
        for given_x in (x, roomy_x[:, 5:105], x.t().contiguous().t(), x.repeat_interleave(2, 0)[::2]):
            for given_weight in (weight, roomy_weight[:, 7:107], weight.t().contiguous().t(), weight.repeat_interleave(2, 1)[:, ::2]):
                assert_same_bits(products.linear(given_x, given_weight, bias), expected)
                assert_same_bits(products.matmul(given_x, given_weight.t(), bias.repeat_interleave(2)[::2]), expected)
        for leading in (roomy_x[None, :, 5:105], x[None], x[:, None], x.expand(2, m, 100)):
            got = products.linear(leading, weight, bias)
            assert got.shape == (*leading.shape[:-1], 72) and got.is_contiguous()
            assert_same_bits(got.reshape(-1, 72)[-m:], expected)
    one = torch.cat([torch.full((1,), NAN, dtype=dtype), random(3, 100, dtype=dtype)])[1:]  # begins between two multiples of 16 bytes
    assert_same_bits(products.linear(one, weight, bias), products.linear(one[None], weight, bias)[0])


def test_a_weight_is_never_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = random(0, 3, 40), random(1, 40, 72)
    given: list[int] = []
    product = triton_products._product
    monkeypatch.setattr(triton_products, "_product", lambda x, weight, *rest: given.append(weight.data_ptr()) or product(x, weight, *rest))
    TritonProducts().matmul(x, weight)
    TritonProducts().linear(x, weight.t())
    assert given == [weight.data_ptr()] * 2


@pytest.mark.filterwarnings("ignore:invalid value")
def test_not_a_number_stays_in_its_row_or_column(shape: None) -> None:
    products = TritonProducts()
    for dtype, m in itertools.product(DTYPES, (1, 5, 70)):
        x, weight = random(0, m, 150, dtype=dtype), random(1, 50, 150, dtype=dtype)
        clean = products.linear(x, weight)
        sick = x.clone()
        sick[m // 2, [0, 149]] = NAN  # the first would follow the end of the row before it
        got = products.linear(sick, weight)
        assert got[m // 2].isnan().all()
        assert_same_bits(torch.cat([got[: m // 2], got[m // 2 + 1 :]]), torch.cat([clean[: m // 2], clean[m // 2 + 1 :]]))
        sick_weight = weight.clone()
        sick_weight[49, 0] = NAN
        got = products.linear(x, sick_weight)
        assert got[:, 49].isnan().all()
        assert_same_bits(got[:, :49], clean[:, :49])
        infinite = x.abs()
        infinite[0, 3] = torch.inf
        got = products.linear(infinite, weight.abs() + 1)
        assert (got[0] == torch.inf).all() and got[1:].isfinite().all()


def test_empty_sides() -> None:
    products = TritonProducts()
    for dtype in DTYPES:
        bias = random(0, 20, dtype=dtype)
        assert products.linear(torch.empty(0, 8, dtype=dtype), torch.zeros(20, 8, dtype=dtype)).shape == (0, 20)
        assert products.linear(torch.empty(2, 0, 8, dtype=dtype), torch.zeros(20, 8, dtype=dtype), bias).shape == (2, 0, 20)
        assert products.linear(torch.zeros(3, 8, dtype=dtype), torch.empty(0, 8, dtype=dtype)).shape == (3, 0)
        assert torch.equal(products.linear(torch.empty(3, 0, dtype=dtype), torch.empty(20, 0, dtype=dtype), bias), bias.expand(3, -1))
        assert not products.matmul(torch.empty(3, 0, dtype=dtype), torch.empty(0, 20, dtype=dtype)).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_codes_are_multiplied_as_the_weight_they_stand_for(shape: None, dtype: torch.dtype, quantization: str) -> None:
    """More than one span, and a last one that is not whole; scales differ by a lot, so another span's shows."""
    products, n, k = TritonProducts(), 70, 600
    spread = 2.0 ** (torch.arange(k) // 32 % 8)
    x, weight, bias = random(0, 5, k, dtype=dtype), (random(1, n, k) * spread).to(dtype), random(2, n, dtype=dtype)
    packed = pack(weight, quantization)
    assert packed.packed.shape == (ReferenceProducts().packed_bytes(packed.form),)
    assert_close_to_fp64(products.linear(x, packed, bias), x, packed.rows(torch.arange(n), torch.float32), bias, k + 2)
    assert_same_bits(products.matmul(x, pack(weight, quantization, transposed=True), bias), products.linear(x, packed, bias))
    wide = products.linear(x.float(), packed)  # of another dtype than the weight was
    assert wide.dtype == torch.float32
    assert_close_to_fp64(wide, x.float(), packed.rows(torch.arange(n), torch.float32), None, k + 2)
    with pytest.raises(ValueError, match="weight is packed"):
        products.matmul(x, packed)


def test_what_is_not_quantized_stays_as_it_is() -> None:
    layout = PackedLayout(20, 30, torch.bfloat16)
    assert TritonProducts().packed_bytes(layout) == 0 and TritonProducts().packed_format(layout) is None


def test_refusals() -> None:
    products = TritonProducts()
    x, weight = torch.zeros(2, 8), torch.zeros(4, 8)
    for bad in ((x.double(), weight.double()), (x.bfloat16(), weight), (x, weight.half()), (x.int(), weight.int()), (x, weight.to("meta"))):
        with pytest.raises(TypeError, match=r"x torch\..* weight torch\..*Triton products take one dtype of torch.float32, torch.bfloat16"):
            products.linear(*bad)
    with pytest.raises(TypeError, match="on meta.*on cpu, in Triton's interpreter"):
        products.linear(x.to("meta"), weight.to("meta"))
    with pytest.raises(TypeError, match="bias torch.float64"):
        products.linear(x, weight, torch.zeros(4).double())
    with pytest.raises(TypeError, match="x torch.float64"):
        products.linear(x.double(), pack(weight, "int8"))
    with pytest.raises(ValueError, match=r"x \(2, 8\) and weight \(8, 4\) disagree about K"):
        products.linear(x, weight.t())
    with pytest.raises(ValueError, match=r"x \(2, 8\) and weight \(4, 8\) disagree about K"):
        products.matmul(x, weight)
    with pytest.raises(ValueError, match=r"bias \(8,\): must be \(4,\)"):
        products.linear(x, weight, torch.zeros(8))
    for product in (products.linear, products.matmul):
        with pytest.raises(ValueError, match="the weight two"):
            product(x, torch.zeros(8))
    with pytest.raises(ValueError, match="x needs a last dimension"):
        products.linear(torch.zeros(()), weight)


@pytest.mark.parametrize("shape", [(16, 64, 64), (64, 64, 16), (5, 24, 40), (16, 512, 64)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_interpreter_multiplies_a_row_alike_wherever_it_is(shape: tuple[int, int, int], dtype: type) -> None:
    """By numpy's matmul it did not on CPUs with AVX2 alone, and the engine on this backend refused every model there."""
    m, k, n = shape
    random = np.random.default_rng(0)
    a, b = random.standard_normal((m, k)).astype(dtype), random.standard_normal((k, n)).astype(dtype)
    for right in (b, np.ascontiguousarray(b.T).T):
        whole = multiply(a, right)
        assert whole.dtype == np.float32 and np.allclose(whole, a.astype(np.float64) @ b.astype(np.float64), atol=1e-3)
        for row in range(m):
            for place in range(m):
                moved = a.copy()
                moved[place] = a[row]
                assert np.array_equal(multiply(moved, right)[place], whole[row]), (row, place)
