"""The C++ matrix products against their law, against fp64, and against themselves: a row's bits must not depend on the batch."""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

native = pytest.importorskip("quire.tensors.native", reason="the native kernels are not built")

from quire.tensors.native_products import NativeProducts  # noqa: E402
from tests.tensors.product_cases import DTYPES, NAN, assert_close_to_fp64, assert_same_bits, random  # noqa: E402

Product = Callable[..., torch.Tensor]


def by_layout(matmul: bool, weight: torch.Tensor, num_threads: int = 2) -> tuple[Product, torch.Tensor]:
    """The product of one layout, and a weight [N, K] laid out for it."""
    products = NativeProducts(num_threads)
    return (products.matmul, weight.t().contiguous()) if matmul else (products.linear, weight)


@functools.cache
def law(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight [N, K], and what csrc/linear.h promises for them before bias and rounding, term by term.

    Exact, since the elements have so few bits that no product of two rounds.
    """
    x, weight = (random(seed, rows, k, dtype=torch.bfloat16).to(dtype) for seed, rows in enumerate((m, n)))
    wide_x, wide_w, total = x.float(), weight.float(), torch.zeros(m, n)
    for start in range(0, k, 128):
        block = torch.zeros(m, n)
        for i in range(start, min(start + 128, k)):
            block += wide_x[:, i : i + 1] * wide_w[:, i]
        total = total + block if start else block
    return x, weight, total


@functools.cache
def law_of_tiles(m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same for bf16 on AMX, as csrc/linear_amx.h has it: even and odd k of each 32 apart."""
    x, weight = random(0, m, k, dtype=torch.bfloat16), random(1, n, k, dtype=torch.bfloat16)
    wide_x, wide_w, total = x.float(), weight.float(), torch.zeros(m, n)
    for start in range(0, k, 32):
        sums = [torch.zeros(m, n), torch.zeros(m, n)]
        for i in range(start, min(start + 32, k)):
            sums[i % 2] += wide_x[:, i : i + 1] * wide_w[:, i]
        total += sums[0] + sums[1]
    return x, weight, total


@functools.cache
def law_of_pairs(m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same for bf16 on AVX512-BF16, as csrc/linear.h has it: of each pair of k the odd one first."""
    x, weight = random(0, m, k, dtype=torch.bfloat16), random(1, n, k, dtype=torch.bfloat16)
    wide_x, wide_w, total = x.float(), weight.float(), torch.zeros(m, n)
    for start in range(0, k, 128):
        block = torch.zeros(m, n)
        for pair in range(start, min(start + 128, k), 2):
            for i in (pair + 1, pair):
                if i < k:
                    block += wide_x[:, i : i + 1] * wide_w[:, i]
        total = total + block if start else block
    return x, weight, total


def num_roundings(k: int) -> int:
    """In fp32, at most: a block's and a row of blocks' worth of them, and some at the end."""
    return min(128, k) + math.ceil(k / 128) + 2


SHAPES = [(1, 1, 1), (1, 33, 31), (2, 96, 64), (4, 130, 129), (5, 17, 128), (8, 48, 300), (9, 33, 257), (14, 65, 96), (15, 40, 127), (40, 70, 140)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("matmul", [False, True], ids=["linear", "matmul"])
def test_keeps_its_law(isa: str, dtype: torch.dtype, matmul: bool) -> None:
    laws = {"amx": law_of_tiles, "avx512bf16": law_of_pairs} if dtype == torch.bfloat16 else {}
    for m, n, k in SHAPES:
        x, weight, total = laws[isa](m, n, k) if isa in laws else law(m, n, k, dtype)
        bias = random(2, n, dtype=dtype)
        product, laid = by_layout(matmul, weight)
        assert_same_bits(product(x, laid), total.to(dtype))
        assert_same_bits(product(x, laid, bias), (total + bias.float()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("matmul", [False, True], ids=["linear", "matmul"])
def test_is_near_fp64(isa: str, dtype: torch.dtype, matmul: bool) -> None:
    for m, n, k in [(1, 200, 3000), (3, 300, 1024), (20, 130, 1500), (300, 64, 700)]:
        x, weight, bias = random(0, m, k, dtype=dtype), random(1, n, k, dtype=dtype), random(2, n, dtype=dtype)
        product, laid = by_layout(matmul, weight)
        assert_close_to_fp64(product(x, laid, bias), x, weight, bias, num_roundings(x.shape[1]))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 130), st.integers(1, 130)),
    dtype=st.sampled_from(DTYPES),
    matmul=st.booleans(),
    with_bias=st.booleans(),
    num_threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_any_shape(isa: str, shape: tuple[int, int, int], dtype: torch.dtype, matmul: bool, with_bias: bool, num_threads: int, seed: int) -> None:
    m, n, k = shape
    x, weight = random(seed, m, k, dtype=dtype), random(seed + 1, n, k, dtype=dtype)
    bias = random(seed + 2, n, dtype=dtype) if with_bias else None
    product, laid = by_layout(matmul, weight, num_threads)
    got = product(x, laid, bias)
    assert_close_to_fp64(got, x, weight, bias, num_roundings(x.shape[1]))
    row = seed % m
    assert_same_bits(product(x[row : row + 1], laid, bias), got[row : row + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("matmul", [False, True], ids=["linear", "matmul"])
@pytest.mark.parametrize(("n", "k"), [(208, 328), (40, 1100)], ids=["by_columns", "by_rows"])
def test_rows_do_not_see_the_batch(isa: str, dtype: torch.dtype, matmul: bool, n: int, k: int) -> None:
    x, weight, bias = random(0, 512, k, dtype=dtype), random(1, n, k, dtype=dtype), random(2, n, dtype=dtype)
    product, laid = by_layout(matmul, weight, num_threads=1)
    whole = product(x, laid, bias)
    both = by_layout(matmul, weight, num_threads=2)[0]
    for m in [*range(1, 71), 127, 128, 129, 511, 512]:
        assert_same_bits((both if m % 2 else product)(x[:m], laid, bias), whole[:m])
    for start, stop in [(511, 512), (100, 101), (37, 90), (253, 512), (1, 300)]:
        assert_same_bits(both(x[start:stop], laid, bias), whole[start:stop])
    order = torch.randperm(512, generator=torch.Generator().manual_seed(3))
    assert_same_bits(both(x[order], laid, bias), whole[order])


def test_threads_change_nothing(isa: str) -> None:
    for dtype, m in itertools.product(DTYPES, (1, 6, 33, 300)):
        x, weight = random(0, m, 512, dtype=dtype), random(1, 390, 512, dtype=dtype)
        expected = NativeProducts(1).linear(x, weight)
        for num_threads in (2, 3, 5):
            assert_same_bits(NativeProducts(num_threads).linear(x, weight), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_and_strides_agree(isa: str, dtype: torch.dtype) -> None:
    products = NativeProducts(2)
    for m in (1, 3, 7, 20, 80):
        x, weight, bias = random(0, m, 200, dtype=dtype), random(1, 72, 200, dtype=dtype), random(2, 72, dtype=dtype)
        expected = products.linear(x, weight, bias)
        roomy_x, roomy_weight = torch.full((m, 333), NAN, dtype=dtype), torch.full((72, 301), NAN, dtype=dtype)
        roomy_x[:, 5:205], roomy_weight[:, 7:207] = x, weight  # whatever reads beside its rows meets NaN
        for given_x in (x, roomy_x[:, 5:205], x.t().contiguous().t(), x.repeat_interleave(2, 0)[::2]):
            for given_weight in (weight, roomy_weight[:, 7:207], weight.t().contiguous().t(), weight.repeat_interleave(2, 1)[:, ::2]):
                assert_same_bits(products.linear(given_x, given_weight, bias), expected)
                assert_same_bits(products.matmul(given_x, given_weight.t(), bias.repeat(2)[72:]), expected)
        for packed in (roomy_x[None, :, 5:205], x[None], x[:, None], x.expand(2, m, 200)):
            got = products.linear(packed, weight, bias)
            assert got.shape == (*packed.shape[:-1], 72)
            assert_same_bits(got.reshape(-1, 72)[-m:], expected)
    one = random(3, 200, dtype=dtype)
    assert_same_bits(products.linear(one, weight, bias), products.linear(one[None], weight, bias)[0])


def test_not_a_number_stays_in_its_row_or_column(isa: str) -> None:
    for dtype, matmul, m in itertools.product(DTYPES, (False, True), (1, 5, 12, 40)):
        x, weight = random(0, m, 150, dtype=dtype), random(1, 50, 150, dtype=dtype)
        product, laid = by_layout(matmul, weight)
        clean = product(x, laid)
        sick = x.clone()
        sick[m // 2, 149] = NAN
        got = product(sick, laid)
        assert got[m // 2].isnan().all()
        assert_same_bits(torch.cat([got[: m // 2], got[m // 2 + 1 :]]), torch.cat([clean[: m // 2], clean[m // 2 + 1 :]]))
        sick_weight = weight.clone()
        sick_weight[49, 0] = NAN
        got = product(x, by_layout(matmul, sick_weight)[1])
        assert got[:, 49].isnan().all()
        assert_same_bits(got[:, :49], clean[:, :49])
        infinite = x.abs()
        infinite[0, 3] = torch.inf
        got = product(infinite, by_layout(matmul, weight.abs() + 1)[1])
        assert (got[0] == torch.inf).all() and got[1:].isfinite().all()


def test_negative_zero_does_not_depend_on_the_path(isa: str) -> None:
    products = NativeProducts(2)
    for k in (1, 20, 33, 128, 130):
        x, weight = torch.full((30, k), -1e-30), torch.full((40, k), 1e-30)  # the products vanish, their sign remains
        expected = products.linear(x[:1], weight)
        for m in (1, 2, 9, 30):
            assert_same_bits(products.linear(x[:m], weight), expected.expand(m, -1))
            assert_same_bits(products.matmul(x[:m], weight.t().contiguous()), expected.expand(m, -1))


def test_empty_sides(isa: str) -> None:
    products = NativeProducts(2)
    for dtype in DTYPES:
        bias = random(0, 20, dtype=dtype)
        assert products.linear(torch.empty(0, 8, dtype=dtype), torch.zeros(20, 8, dtype=dtype)).shape == (0, 20)
        assert products.linear(torch.empty(2, 0, 8, dtype=dtype), torch.zeros(20, 8, dtype=dtype), bias).shape == (2, 0, 20)
        assert products.linear(torch.zeros(3, 8, dtype=dtype), torch.empty(0, 8, dtype=dtype)).shape == (3, 0)
        for m in (3, 30):
            assert torch.equal(products.linear(torch.empty(m, 0, dtype=dtype), torch.empty(20, 0, dtype=dtype), bias), bias.expand(m, -1))
            assert not products.matmul(torch.empty(m, 0, dtype=dtype), torch.empty(0, 20, dtype=dtype)).any()


def test_long_rows_share_a_bounded_scratch() -> None:
    products = NativeProducts(2)
    x, weight = random(0, 260, 20_000, dtype=torch.bfloat16), random(1, 33, 20_000, dtype=torch.bfloat16)
    got = products.linear(x, weight)
    assert_close_to_fp64(got, x, weight, None, num_roundings(x.shape[1]))
    assert_same_bits(products.linear(x[250:], weight), got[250:])


def test_python_threads_do_not_share_scratch() -> None:
    products = NativeProducts(2)
    weight = random(0, 500, 600, dtype=torch.bfloat16)
    inputs = [random(i, m, 600, dtype=torch.bfloat16) for i, m in enumerate((1, 3, 30, 300))]
    expected = [products.linear(x, weight) for x in inputs]
    differing: list[int] = []

    def run(i: int) -> None:
        if not all(torch.equal(products.linear(inputs[i], weight), expected[i]) for _ in range(30)):
            differing.append(i)

    threads = [threading.Thread(target=run, args=(i % 4,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not differing


def test_refusals() -> None:
    products = NativeProducts(1)
    x, weight = torch.zeros(2, 8), torch.zeros(4, 8)
    for bad in ((x.double(), weight.double()), (x.bfloat16(), weight), (x, weight.half()), (x.int(), weight.int()), (x, weight.to("meta"))):
        with pytest.raises(TypeError, match=r"x torch\..* weight torch\..*native products take one dtype of torch.float32, torch.bfloat16"):
            products.linear(*bad)
    with pytest.raises(TypeError, match="bias torch.float64"):
        products.linear(x, weight, torch.zeros(4).double())
    with pytest.raises(ValueError, match=r"x \(2, 8\) and weight \(8, 4\) disagree about K"):
        products.linear(x, weight.t())
    with pytest.raises(ValueError, match="disagree about K"):
        products.matmul(x, weight)
    with pytest.raises(ValueError, match=r"bias \(8,\): must be \(4,\)"):
        products.linear(x, weight, torch.zeros(8))
    with pytest.raises(ValueError, match="the weight two"):
        products.linear(x, torch.zeros(8))
    with pytest.raises(ValueError, match="num_threads=0"):
        NativeProducts(0)
