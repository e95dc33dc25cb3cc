"""Memory made ahead: packing uses that very memory, what is not used is gone, and nothing that fails there fails the command."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quire.tensors import ahead
from quire.tensors.ahead import foreseen, made_ahead
from quire.tensors.models.packing import room

MIB = 2**20


def checkpoint(folder: Path, dtype: str = "bfloat16", name: str = "layer.weight") -> Path:
    weights = {f"{number}.{name}": torch.zeros(1024, 512, dtype=torch.bfloat16) for number in range(6)}
    save_file(weights | {"norm": torch.zeros(8, dtype=torch.bfloat16)}, folder / "model.safetensors")
    (folder / "config.json").write_text(f'{{"dtype": "{dtype}"}}')
    return folder


def resident(address: int) -> int:
    """Bytes in memory of the mapping that holds an address, 0 where there is none."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            first, last = (int(end, 16) for end in head.split("-"))
            inside = first <= address < last
        elif inside and head == "Rss:":
            return int(line.split()[1]) * 1024
    return 0


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "LEAST", 1)


def make(folder: Path, spare: int = 2**40) -> AbstractContextManager[None]:
    return made_ahead(str(folder), dtype="auto", quantization="none", spare_bytes=lambda: spare)


def test_packing_uses_what_was_made_and_the_rest_is_gone(tmp_path: Path) -> None:
    with make(checkpoint(tmp_path)):
        made = ahead._now
        assert made is not None
        made._thread.join()
        first = ahead.ctypes.addressof(ahead.ctypes.c_char.from_buffer(made.memory))
        assert resident(first) >= 5 * MIB
        space = room(2 * MIB)
        assert space.data_ptr() == first and space.numel() == 2 * MIB
        assert resident(first) <= 2 * MIB + 4096
        assert room(2 * MIB).data_ptr() != first  # once
    space.fill_(1)  # it outlives the command's loading


def test_what_nobody_takes_is_gone(tmp_path: Path) -> None:
    with pytest.raises(OSError), make(checkpoint(tmp_path)):
        made = ahead._now
        assert made is not None
        made._thread.join()
        first = ahead.ctypes.addressof(ahead.ctypes.c_char.from_buffer(made.memory))
        raise OSError
    assert resident(first) < 5 * MIB and ahead._now is None
    assert not [thread for thread in threading.enumerate() if thread.name == "quire-ahead"]


def test_too_little_is_not_taken(tmp_path: Path) -> None:
    with make(checkpoint(tmp_path)):
        assert room(64 * MIB).numel() == 64 * MIB
        assert ahead._now is None


def test_a_failure_in_the_thread_is_none_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead.ctypes, "CDLL", lambda _: (_ for _ in ()).throw(OSError("no libc")))
    with make(checkpoint(tmp_path)):
        assert int(room(4 * MIB).fill_(3)[-1]) == 3


@pytest.mark.parametrize("case", ["no folder", "hub id", "no memory", "converted", "experts", "broken"])
def test_nothing_is_made(case: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, *{"converted": ("float32",), "experts": ("bfloat16", "experts.0.weight")}.get(case, ()))
    if case == "broken":
        (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0nonsense")
    source = {"no folder": folder / "none", "hub id": Path("owner/name")}.get(case, folder)
    with make(source, spare=MIB if case == "no memory" else 2**40):
        assert ahead._now is None


@pytest.mark.parametrize(
    ("quantization", "expected"), [("none", (6 * MIB, 5 * MIB)), ("int8", (3 * MIB, 2 * MIB)), ("int4", (3 * MIB // 2, MIB // 2))]
)
def test_what_is_foreseen(quantization: str, expected: tuple[int, int], tmp_path: Path) -> None:
    assert foreseen(checkpoint(tmp_path), "auto", quantization) == expected
