"""Weights packed on an idle core while torch and transformers are imported, which takes one core seconds.

A command says what it will load (`made_ahead`), packing says what it wants (`take`): bytes of a file, of a shape, in a form. What it does not want
is given back at once, and what was not made it packs itself. Files are read through a mapping of our own, whose pages are dropped slice by slice, so
that nothing is held twice. Nothing that fails here fails a command. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import mmap
import os
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from quire.tensors.memory import FileMappings, mapped

if TYPE_CHECKING:
    from quire.tensors.foreseen import StoredWeight

SLICE = 16 * 2**20  # bytes of a file: what a taker waits for at most, and what is held of a file at once
LEAST = 64 * 2**20  # less is not worth a thread
ALIGNMENT = 4096
# Extension modules that transformers imports before anything else takes long: later they would wait in line behind torch's library.
LIBRARIES = ("unicodedata", "csv", "regex", "numpy", "yaml", "markupsafe")

_now: Ahead | None = None


@dataclass(frozen=True, slots=True)
class Made:
    """Packed weights in one area, and which bytes of it are each one's; each is known by its file (`FileMapping.file`) and by what it is there."""

    memory: mmap.mmap | None = None
    places: dict[tuple[str, StoredWeight], range] = field(default_factory=dict)


class Ahead:
    """A thread that packs what is foreseen of the model in `folder`, one weight after another."""

    def __init__(self, folder: Path, dtype: str, quantization: str, spare_bytes: Callable[[], int]) -> None:
        self._wanted = folder, dtype, quantization
        self._spare_bytes = spare_bytes
        self._memory: mmap.mmap | None = None
        self._made: dict[tuple[str, StoredWeight], range] = {}
        self._sources: list[mmap.mmap] = []  # mapped to the end, so that no other file comes to be known as one of these
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="quire-ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(Exception):
            _open_torch()
        with contextlib.suppress(Exception):  # then packing does it, and a folder that cannot be read is refused by name
            self._pack_all()

    def _pack_all(self) -> None:
        from quire.tensors.foreseen import foreseen
        from quire.tensors.native_library import lib  # which a command's help does not wait for

        files = foreseen(*self._wanted)
        most = sum(_aligned(lib.packed_bytes(weight.format, weight.n, weight.k)) for _, weights in files for weight in weights)
        if not LEAST <= most <= self._spare_bytes():
            return
        self._memory = mapped(most)
        place = 0
        for path, weights in files:
            with path.open("rb") as file:
                source = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # which lets its address be known
            self._sources.append(source)
            held = FileMappings().holding(_address(source), len(source))
            if held is None:
                return
            for weight in weights:
                size = self._pack(weight, source, place)
                if size is None:
                    return
                self._made[held.file, weight] = range(place, place + size)
                place += _aligned(size)

    def _pack(self, weight: StoredWeight, source: mmap.mmap, place: int) -> int | None:
        """Pack a weight to byte `place` of the area and on, how many is returned, or only begin to if somebody waits for the thread's end."""
        from quire.tensors.native_library import lib
        from quire.tensors.native_numbers import PANEL

        assert self._memory is not None
        form, k, row_bytes = weight.format, weight.k, weight.k * (4 if weight.dtype == 0 else 2)
        out, step, size = _address(self._memory) + place, max(1, SLICE // row_bytes // PANEL) * PANEL, 0
        for row in range(0, weight.n, step):
            if self._stop.is_set():
                return None
            count, at = min(step, weight.n - row), weight.offset + row * row_bytes
            size = lib.pack(form, _address(source) + at, out, weight.n, row, count, k, k, weight.dtype, 1)
            first, last = (byte // mmap.PAGESIZE * mmap.PAGESIZE for byte in (at, at + count * row_bytes))
            source.madvise(mmap.MADV_DONTNEED, first, last - first)
        return size

    def end(self, wanted: Collection[tuple[str, StoredWeight]]) -> Made:
        """Pack no more; what was made of `wanted`. All else is given back."""
        self._stop.set()
        self._thread.join()
        memory, self._memory = self._memory, None
        self._sources.clear()
        kept = {key: self._made[key] for key in wanted if key in self._made}
        if memory is None:
            return Made()
        places = sorted(kept.values(), key=lambda place: place.start)
        edges = [0, *(edge for place in places for edge in (place.start, _aligned(place.stop))), len(memory)]
        for first, last in list(pairwise(edges))[::2]:
            if first < last:
                memory.madvise(mmap.MADV_DONTNEED, first, last - first)
        return Made(memory, kept)


@contextlib.contextmanager
def made_ahead(source: str, *, dtype: str, quantization: str, spare_bytes: Callable[[], int]) -> Iterator[None]:
    """Inside, the model in the folder `source` is packed ahead, if `spare_bytes()` allows; what was not taken is gone afterwards."""
    global _now
    if hasattr(mmap, "MADV_HUGEPAGE"):
        for name in LIBRARIES:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        _now = Ahead(Path(source).expanduser(), dtype, quantization, spare_bytes)
    try:
        yield
    finally:
        take(())


def take(wanted: Collection[tuple[str, StoredWeight]]) -> Made:
    """What was packed ahead of `wanted`, once."""
    global _now
    ahead, _now = _now, None
    return Made() if ahead is None else ahead.end(wanted)


def _open_torch() -> None:
    """Load torch's largest library, whose tables the system's loader fills for a seventh of a second; importing torch then finds it there. Called
    so, and not through `ctypes.CDLL(path)`, the loader lets go of the interpreter's lock, and transformers is imported meanwhile."""
    spec = importlib.util.find_spec("torch")  # which imports nothing
    if spec is not None and spec.origin is not None:
        ctypes.CDLL(None).dlopen(os.fsencode(Path(spec.origin).parent / "lib" / "libtorch_cpu.so"), os.RTLD_NOW)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
