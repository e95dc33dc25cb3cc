"""What the machine gives, and what it is given back."""

from __future__ import annotations

import ctypes

import psutil
import pytest

from quire.tensors.host import give_back_freed


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="malloc here gives nothing back when asked")
def test_memory_that_was_freed_is_given_back() -> None:
    """Pieces below what malloc maps by itself; every tenth stays, so that it can give none of it back unasked."""
    pieces: list[bytes | None] = [bytes([n % 256]) * 65_536 for n in range(2_000)]
    for n, _ in enumerate(pieces):
        if n % 10:
            pieces[n] = None
    process = psutil.Process()
    before = process.memory_info().rss
    give_back_freed()
    assert process.memory_info().rss < before - 64 * 2**20
    assert pieces[10] == bytes([10]) * 65_536
