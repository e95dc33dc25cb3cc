"""What tests of the native kernels share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

native: Any
try:
    from quire.tensors import native
except ImportError:
    native = None


ISAS = native.isas() if native else []
MISSING = pytest.param("", marks=pytest.mark.skip(reason="the native kernels are not built"))


def in_use(isa: str) -> Iterator[str]:
    before = native.isa()
    native.set_isa(isa)
    yield isa
    native.set_isa(before)


@pytest.fixture(params=[isa for isa in ISAS if not isa.endswith("vnni")] or [MISSING])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this CPU can run, in use during the test."""
    yield from in_use(request.param)


@pytest.fixture(params=ISAS or [MISSING])
def product_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same for tests of products with packed weights, which are all that AVX-VNNI and AVX512-VNNI change by themselves."""
    yield from in_use(request.param)
