"""What the machine gives, and what it is given back."""

from __future__ import annotations

import ctypes
import mmap

import psutil
import pytest
import torch

from quire.tensors import host
from quire.tensors.device import CPU
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


def taken(memory: torch.Tensor) -> list[bool]:
    """Whether the system has given each page of this memory, which begins with one."""
    told = (ctypes.c_ubyte * -(-memory.nbytes // mmap.PAGESIZE))()
    assert not ctypes.CDLL(None).mincore(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.nbytes), told)
    return [bool(page & 1) for page in told]


@pytest.mark.parametrize("by_the_system", [True, False])
def test_memory_is_taken_at_once_and_what_is_there_stays(by_the_system: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the system's call, and by writing where it has none."""
    if not by_the_system:
        monkeypatch.setattr(host, "POPULATE_WRITE", 10_000)
    size = 40 * 2**20 + 12_345
    memory = CPU.room_for_pages(size)
    memory[7::100_000] = 3
    memory[-1] = 5
    wanted = memory[7::100_000].clone()
    assert not all(taken(memory))
    CPU.preallocate(memory, num_threads=2)
    assert all(taken(memory))
    assert torch.equal(memory[7::100_000], wanted) and memory[-1] == 5
