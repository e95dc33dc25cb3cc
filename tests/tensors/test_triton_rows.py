"""Sums within a row in Triton's interpreter, against torch in fp64; and as exact mode gives them what a model's code calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton", reason="Triton is not installed")

from quire.tensors import triton_rows
from quire.tensors.models.exact import ExactMode
from quire.tensors.products import ReferenceProducts
from quire.tensors.triton_rows import TritonRows
from tests.tensors import quick_interpreter

quick_interpreter.install()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNITS = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
LENGTHS = (1, 7, 64, 129, 700)

pytestmark = pytest.mark.filterwarnings("ignore:invalid value")  # of rows that a program has and the tensor has not
Function = Callable[[torch.Tensor], torch.Tensor]


def of(x: torch.Tensor) -> torch.Tensor:
    """Weights for it."""
    return torch.linspace(-1, 2, x.shape[-1]).to(x.dtype)


CALLS: dict[str, Function] = {
    "sum": lambda x: x.sum(-1),
    "sum of a middle one": lambda x: torch.sum(x, dim=(1,), keepdim=True),
    "sum by axis": lambda x: x.sum(axis=-1),
    "sum in fp32": lambda x: x.sum(-1, dtype=torch.float32),
    "mean": lambda x: x.mean(-1, keepdim=True),
    "mean of the first": lambda x: torch.mean(x, 0),
    "mean of rows apart": lambda x: x.transpose(0, 2).mean(0, True),
    "var": lambda x: x.var(-1, keepdim=True, unbiased=False),
    "var, corrected": lambda x: torch.var(x, dim=-1, correction=0),
    "std": lambda x: torch.std(x, -1, False),
    "norm": lambda x: x.norm(2, dim=-1, keepdim=True),
    "vector norm": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "softmax": lambda x: functional.softmax(x, dim=-1),
    "softmax in fp32": lambda x: torch.softmax(x, -1, dtype=torch.float32),
    "softmax of a middle one": lambda x: x.softmax(1),
    "log softmax": lambda x: functional.log_softmax(x, dim=-1),
    "layer norm": lambda x: functional.layer_norm(x, x.shape[-1:], of(x), of(x), 1e-5),
    "plain layer norm": lambda x: functional.layer_norm(x, x.shape[-1:]),
    "rms norm": lambda x: functional.rms_norm(x, x.shape[-1:], of(x), eps=1e-6),
}


class Counted(TritonRows):
    """Which takes a few elements at a time, so that rows have more than one part, and counts its calls."""

    calls = 0

    def __getattribute__(self, name: str) -> Any:
        if name in ("total", "softmax", "normalized"):
            Counted.calls += 1
        return super().__getattribute__(name)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_rows, "_ELEMENTS", 64)
    monkeypatch.setattr(triton_rows, "_ROWS_INTERPRETED", 16)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3 + 1).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_what_a_model_calls_is_what_torch_gives(name: str, dtype: torch.dtype) -> None:
    call = CALLS[name]
    for n in LENGTHS if dtype == torch.float32 else (129,):
        x = random(3, 5, n, dtype=dtype)
        before = Counted.calls
        with ExactMode(ReferenceProducts(), rows=Counted()):
            got = call(x)
        assert Counted.calls > before
        plain, expected = call(x), call(x.double())
        assert got.dtype == plain.dtype and got.shape == plain.shape
        unit = UNITS[got.dtype]
        torch.testing.assert_close(got.double(), expected.double(), atol=4 * unit, rtol=4 * unit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in CALLS if "first" not in name and "middle" not in name and "apart" not in name])
def test_a_row_has_the_same_bits_alone_and_in_any_company(name: str, dtype: torch.dtype) -> None:
    call, x = CALLS[name], random(1, 37, 150, dtype=dtype)
    with ExactMode(ReferenceProducts(), rows=TritonRows()):
        together, others = call(x), call(torch.cat([random(1, 5, 150, dtype=dtype, seed=1) * torch.inf, x], 1))
        for row in (0, 1, 16, 36):
            roomy = torch.cat([torch.full((1, 1, 3), torch.nan, dtype=dtype), x[:, row : row + 1]], -1)[..., 3:]  # begins at another byte
            for alone in (call(x[:, row : row + 1]), call(roomy)):
                assert torch.equal(alone[0, 0], together[0, row])
        assert torch.equal(others[:, 5:], together)


def test_what_is_no_number_stays_in_its_row() -> None:
    rows, x = TritonRows(), random(6, 100)
    x[1, 70], x[2, 3], x[3, 4], x[4] = torch.nan, torch.inf, -torch.inf, -torch.inf
    for got, expected in (
        (rows.softmax(x), x.softmax(-1)),
        (rows.softmax(x, log=True), x.log_softmax(-1)),
        (rows.total(x), x.sum(-1)),
        (rows.normalized(x, None, None, 1e-5), functional.layer_norm(x, (100,))),
    ):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4, equal_nan=True)


def test_empty_sides() -> None:
    rows = TritonRows()
    assert rows.total(torch.empty(0, 5)).shape == (0,) and torch.equal(rows.total(torch.empty(3, 0)), torch.zeros(3))
    assert rows.softmax(torch.empty(2, 0)).shape == (2, 0) and rows.normalized(torch.empty(0, 4), None, None, 1e-5).shape == (0, 4)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.sum(),
        lambda x: x.mean((0, 1)),
        lambda x: x.double().mean(-1),
        lambda x: x.long().sum(-1),
        lambda x: x.norm(1, dim=-1),
        lambda x: functional.layer_norm(x, x.shape[1:]),
        lambda x: torch.sum(x, -1, out=torch.empty(3, 5)),
        lambda x: x[..., :1].var(-1, keepdim=True),
    ],
)
@pytest.mark.filterwarnings("ignore:var")
def test_what_is_not_served_is_left_to_torch(call: Function) -> None:
    x, before = random(3, 5, 20), Counted.calls
    with ExactMode(ReferenceProducts(), rows=Counted()):
        got = call(x)
    assert Counted.calls == before
    torch.testing.assert_close(got, call(x), rtol=0, atol=0, equal_nan=True)
