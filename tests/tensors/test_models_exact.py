"""Torch functions made exact: the values torch gives, with bits that depend on one row alone. And the products that are the oracle of others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from quire.tensors.models.exact import ExactMode, in_whole_vectors
from quire.tensors.products import ReferenceProducts
from tests.tensors.checkpoints import one_thread

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16]
Function = Callable[[torch.Tensor], torch.Tensor]


def rows(count: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count * 1000 + width)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "out"), [(64, 100), (100, 64), (7, 5), (300, 1), (1000, 300)])
def test_reference_products(width: int, out: int, dtype: torch.dtype) -> None:
    products = ReferenceProducts()
    x, weight, bias = rows(70, width, dtype), rows(out, width, dtype) / width**0.5, rows(1, out, dtype)[0]
    expected = functional.linear(x.double(), weight.double(), bias.double())
    full = products.linear(x, weight, bias)
    assert full.dtype == dtype and torch.allclose(full.double(), expected, atol=0.03 if dtype == torch.bfloat16 else 1e-5, rtol=0.01)
    assert torch.allclose(products.matmul(x, weight.t(), bias).double(), full.double(), atol=0.03 if dtype == torch.bfloat16 else 1e-5, rtol=0.01)
    for start, end in ((0, 1), (3, 5), (17, 18), (69, 70), (10, 43)):
        assert torch.equal(products.linear(x[start:end], weight, bias), full[start:end])
        assert torch.equal(products.matmul(x[start:end], weight.t()), products.matmul(x, weight.t())[start:end])
    assert products.linear(x[:0], weight).shape == (0, out)
    assert torch.equal(products.linear(x.view(7, 10, width), weight, bias), full.view(7, 10, out))


def gated(name: str) -> Function:
    function: Function = getattr(functional, name)
    return function


ELEMENTWISE: dict[str, Function] = {
    **{name: gated(name) for name in ("silu", "gelu", "softplus", "mish", "elu", "logsigmoid")},
    "gelu tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu in place": lambda x: functional.silu(x.clone(), inplace=True),
    "sigmoid": torch.sigmoid,
    "method": lambda x: x.sigmoid(),
    "tanh_": lambda x: x.clone().tanh_(),
    "exp": torch.exp,
    "power": lambda x: x.abs() ** 0.3,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise(name: str, dtype: torch.dtype) -> None:
    function = ELEMENTWISE[name]
    mode = ExactMode(ReferenceProducts())
    for width in (16, 100, 600):
        x = rows(20, width, dtype)
        with mode:
            full = function(x)
            for start, end in ((0, 1), (3, 5), (0, 19)):
                assert torch.equal(function(x[start:end]), full[start:end])
            strided = torch.cat([x, x], dim=1)[:, :width]
            assert torch.equal(function(strided), full)
        assert torch.allclose(full, function(x), atol=1e-6, rtol=0.01)


def test_in_place_functions_change_their_argument() -> None:
    mode = ExactMode(ReferenceProducts())
    for change in (lambda x: x.sigmoid_(), lambda x: functional.silu(x, inplace=True), lambda x: torch.exp_(x)):
        for shape in ((3, 5), (4, 64)):
            x = torch.ones(shape)
            with mode:
                result = change(x)
            assert result is x and not torch.equal(x, torch.ones(shape))
    x = torch.full((3, 5), 2.0)
    with mode:
        assert torch.equal(x**1, x) and torch.equal(torch.pow(x, 2), x * 2) and torch.equal(2**x, x * 2)
    assert torch.equal(x, torch.full((3, 5), 2.0))


W = rows(300, 40) / 17
B = rows(1, 40)[0]
W3 = torch.stack([W, -2 * W])
PRODUCTS: dict[str, Function] = {
    "linear": lambda x: functional.linear(x, W.t()),
    "linear bias": lambda x: functional.linear(x, W.t(), bias=B),
    "matmul": lambda x: torch.matmul(x, W),
    "@": lambda x: x @ W,
    "@ transposed": lambda x: x @ W.t().contiguous().t(),
    "mm": lambda x: x.mm(W),
    "mv": lambda x: x @ W[:, 0],
    "addmm": lambda x: torch.addmm(B, x, W),
    "addmm scaled": lambda x: torch.addmm(B, x, W, beta=0.5, alpha=2.0),
    "bmm": lambda x: torch.bmm(torch.stack([x, 2 * x]), W3).transpose(0, 1),
    "baddbmm": lambda x: torch.baddbmm(torch.zeros(2, 1, 1), torch.stack([x, 2 * x]), W3, beta=0).transpose(0, 1),
    "broadcast": lambda x: (x @ W3).transpose(0, 1),
    "weight on the left": lambda x: (torch.nn.Parameter(W.t()) @ x.t()).t(),
    "einsum": lambda x: torch.einsum("tk,kn->tn", x, W),
    "einsum turned": lambda x: torch.einsum("nk,...k->n...", torch.nn.Parameter(W.t()), x).t(),
    "einsum batches": lambda x: torch.einsum("htk,hkn->thn", torch.stack([x, 2 * x]), W3),
    "einsum two shared": lambda x: torch.einsum("tab,nba->tn", x.view(-1, 30, 10), W.t().reshape(40, 10, 30)),
    "einsum of a list": lambda x: torch.einsum("tk, kn -> tn", [x, W]),
    "inner": lambda x: torch.inner(x, W.t()),
    "linalg": lambda x: torch.linalg.matmul(x, W),
    "einsum linear": lambda x: torch.einsum("btk,nk->btn", x[None], W.t())[0],
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    function = PRODUCTS[name]
    x = rows(40, 300)
    with torch.no_grad(), ExactMode(ReferenceProducts()):
        full = function(x)
        for start, end in ((0, 1), (3, 5), (7, 10), (0, 39)):
            assert torch.equal(function(x[start:end]), full[start:end])
    with torch.no_grad():
        assert torch.allclose(full, function(x), atol=1e-4)


def test_what_is_not_a_float_product_stays_with_torch() -> None:
    with ExactMode(ReferenceProducts()):
        a, b = torch.arange(6).view(2, 3), torch.arange(6).view(3, 2)
        assert torch.equal(a @ b, torch.tensor([[10, 13], [28, 40]]))
        assert torch.equal(torch.ones(3) @ torch.ones(3), torch.tensor(3.0))
        assert torch.einsum("ii->i", torch.eye(3)).sum() == 3
        out = torch.empty(2, 2)
        torch.matmul(a.float(), b.float(), out=out)
        assert out[1, 1] == 40
        assert torch.sigmoid(torch.tensor(0.0)) == 0.5 and torch.sigmoid(torch.empty(0, 3)).shape == (0, 3)


def test_a_paused_mode_leaves_torch_alone() -> None:
    class Refusing(ReferenceProducts):
        def linear(self, *_: object) -> torch.Tensor:
            raise AssertionError

    mode = ExactMode(Refusing())
    with mode:
        with mode.paused():
            functional.linear(torch.ones(2, 3), torch.ones(4, 3))
        with pytest.raises(AssertionError):
            functional.linear(torch.ones(2, 3), torch.ones(4, 3))


def test_whole_vectors_are_not_copied() -> None:
    seen: list[torch.Tensor] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x

    for x in (torch.zeros(3, 64), torch.zeros(8, 600), torch.zeros(5, 256)[:, :128]):
        in_whole_vectors(function, x)
        assert seen.pop() is x
    in_whole_vectors(function, torch.zeros(3, 60))
    assert seen.pop().shape == (192,)
