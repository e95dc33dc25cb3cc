"""Memory: how much is really available, areas of it in huge pages, and which files lie in it. Nothing here imports torch."""

from __future__ import annotations

import contextlib
import mmap
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path


def available_bytes() -> int:
    """Memory that can be taken now without swapping: the system's figure or what the control group leaves, whichever is less."""
    free = _meminfo("MemAvailable")
    group = Path("/sys/fs/cgroup")
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            left = int((group / limit).read_text()) - int((group / used).read_text())
        except (OSError, ValueError):  # no such file, or "max": no limit
            continue
        free = min(free, left)
    return max(0, free)


def _meminfo(key: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == key:
                return int(value.split()[0]) * 1024
    except OSError:
        pass
    return 4 * 2**30  # no /proc: a guess that any machine able to run a model has


def mapped(num_bytes: int) -> mmap.mmap:
    """`num_bytes` > 0 of memory not yet touched, in huge pages where the system gives them. Raises OSError where it gives no such memory."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared, as by default, few systems give them
    with contextlib.suppress(OSError):  # a system without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


@dataclass(frozen=True, slots=True)
class FileMapping:
    """Addresses `first` up to `last` hold `file` (its device and inode, which no other has while it is mapped) from byte `offset` on."""

    first: int
    last: int
    offset: int
    file: str


class FileMappings:
    """The files that are mapped now, none where the system does not tell."""

    def __init__(self) -> None:
        try:
            lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
        except OSError:
            lines = []
        self._all: list[FileMapping] = []  # by address, as the system tells them
        for addresses, _, offset, device, inode, *_ in lines:
            if inode != "0":
                first, last = (int(end, 16) for end in addresses.split("-"))
                self._all.append(FileMapping(first, last, int(offset, 16), f"{device} {inode}"))
        self._firsts = [mapping.first for mapping in self._all]

    def holding(self, first: int, num_bytes: int) -> FileMapping | None:
        """The one in which all of these bytes lie."""
        place = bisect_right(self._firsts, first) - 1
        return self._all[place] if place >= 0 and first + num_bytes <= self._all[place].last else None
