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


@pytest.fixture(params=native.isas() if native else [pytest.param("", marks=pytest.mark.skip(reason="the native kernels are not built"))])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this CPU can run, in use during the test."""
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)
