"""Numbered pages in a disk store, whose right contents anybody can tell, and the programs that worker processes run on them.

Run as `python -m tests.tensors.disk_shelf PROGRAM FOLDER SEED`; imports nothing that is slow to start.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from quire.tensors.disk import DiskStore
from quire.tensors.disk_pages import PageFormat

NUM_NUMBERS = 40
WORKER_BYTES, WORKER_PAGES = 20_000, 12


def content_id(number: int) -> bytes:
    return hashlib.sha256(struct.pack("<q", number)).digest()


def tokens(number: int) -> bytes:
    return struct.pack("<16i", *range(number, number + 16))


def data(number: int, page_bytes: int) -> bytes:
    return hashlib.shake_128(struct.pack("<q", number)).digest(page_bytes)


def file_bytes(page_bytes: int) -> int:
    return PageFormat.of(b"", page_bytes).file_bytes(tokens(0))


class Shelf:
    """A store with room for `num_pages`, and its counters as attributes of `stats()`."""

    def __init__(self, folder: Path, num_pages: int = 8, page_bytes: int = 64, identity: bytes = b"model a", num_threads: int | None = None) -> None:
        self.folder, self.page_bytes = folder, page_bytes
        capacity_bytes = num_pages * file_bytes(page_bytes) + 100
        self.store = DiskStore(folder, capacity_bytes=capacity_bytes, page_bytes=page_bytes, identity=identity, num_threads=num_threads)

    def write(self, number: int) -> bool:
        return self.store.write(content_id(number), tokens(number), memoryview(data(number, self.page_bytes)))

    def read(self, number: int) -> bool:
        """Whether the page is there; if it says so, it is the right one."""
        into = bytearray(self.page_bytes)
        found = self.store.read(content_id(number), tokens(number), memoryview(into))
        assert not found or into == data(number, self.page_bytes), f"page {number} came back wrong"
        return found

    def contains(self, *numbers: int) -> int:
        return self.store.contains([content_id(number) for number in numbers])

    def there(self, numbers: Iterable[int] = range(NUM_NUMBERS)) -> list[int]:
        """The numbers of all pages that can be read."""
        return [number for number in numbers if self.read(number)]

    def file(self, number: int) -> Path:
        (path,) = self.folder.glob(f"{content_id(number).hex()}*.page")
        return path

    def bytes_on_disk(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob("*.page"))

    def count(self, what: str) -> int:
        return self.store.stats()[what]

    def close(self) -> None:
        self.store.close()


def overwrite(path: Path, at: int, change: Callable[[bytes], bytes], size: int = 1) -> None:
    """Change a part of the file."""
    raw = path.read_bytes()
    path.write_bytes(raw[:at] + change(raw[at : at + size]) + raw[at + size :])


def halve(path: Path) -> None:
    """Cut the file off in the middle."""
    os.truncate(path, path.stat().st_size // 2)


def replaced(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Another thing is made in the file's place."""

    def change(path: Path) -> object:
        path.rename(path.with_name("elsewhere"))
        return make(path)

    return change


def hammer(shelf: Shelf, rng: random.Random) -> None:
    """For a while: write, read and ask, in any order."""
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        number = rng.randrange(NUM_NUMBERS)
        what = rng.random()
        if what < 0.45:
            shelf.write(number)
        elif what < 0.9:
            shelf.read(number)
        else:
            shelf.contains(*range(number, number + 4))


def write_for_ever(shelf: Shelf, rng: random.Random) -> None:
    """Until killed."""
    while True:
        shelf.write(rng.randrange(NUM_NUMBERS))


if __name__ == "__main__":
    worker = Shelf(Path(sys.argv[2]), WORKER_PAGES, WORKER_BYTES)
    print("ready", flush=True)
    {"hammer": hammer, "write_for_ever": write_for_ever}[sys.argv[1]](worker, random.Random(int(sys.argv[3])))
    worker.close()
    print(json.dumps(worker.store.stats()), flush=True)
