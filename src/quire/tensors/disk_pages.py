"""One page in one file: how it lies there, and how it is read so that nothing wrong is ever taken for right.

    0           8 .. 96              96 + tokens             aligned to 4096
    | "QUIREKV1" | sizes, identity, id | token bytes | checksums | zeros | page_bytes of data                             |
                                                                         | stripe 0 | stripe 1 | ...  one checksum each

Whoever reads knows everything in the header but the checksums, so the header is made again from what is expected and compared whole: a flipped bit
in it, padding included, is a difference. A flipped bit in the data or in the checksums is a stripe that does not match. Stripes fit in a core's
cache, so each is hashed while it is warm, and they are independent, so several threads can share a page.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import zlib
from collections import deque
from concurrent.futures import Executor
from dataclasses import dataclass

from quire.tensors.disk_folder import distrust

MAGIC = b"QUIREKV1"
ALIGN_BYTES = 4096
STRIPE_BYTES = 1 << 18
DIGEST_BYTES = 8
_FIXED = struct.Struct("<8sQIIQ32s32s")


def checksum(data: bytes | memoryview) -> bytes:
    """Of one stripe. Against accidents, not forgers: whoever can write our files can write checksums too.

    CRC-32 catches every change within 32 bits; Adler-32 sums in another arithmetic, so what slips past one meets the other: garbage passes once in
    2^64. Both together take less than half the time of the fastest hash in the standard library, and release the GIL.
    """
    return struct.pack("<II", zlib.crc32(data), zlib.adler32(data))


@dataclass(frozen=True, slots=True)
class PageFormat:
    """How pages of one identity and size are named and laid out."""

    identity: bytes  # 32 bytes
    page_bytes: int

    @classmethod
    def of(cls, identity: bytes, page_bytes: int) -> PageFormat:
        """`identity` may have any length."""
        return cls(hashlib.blake2b(identity, digest_size=32).digest(), page_bytes)

    @property
    def num_stripes(self) -> int:
        return -(-self.page_bytes // STRIPE_BYTES)

    @property
    def name_end(self) -> str:
        """What the names of all files of this format end with; no two formats share it."""
        return "-" + hashlib.blake2b(self.identity + struct.pack("<Q", self.page_bytes), digest_size=16).hexdigest() + ".page"

    def header_bytes(self, tokens: bytes) -> int:
        """Where the data begins."""
        used = _FIXED.size + len(tokens) + DIGEST_BYTES * self.num_stripes
        return -(-used // ALIGN_BYTES) * ALIGN_BYTES

    def file_bytes(self, tokens: bytes) -> int:
        """The size of the whole file."""
        return self.header_bytes(tokens) + self.page_bytes

    def header(self, content_id: bytes, tokens: bytes, digests: bytes) -> bytes:
        """The header of a page with these checksums."""
        size = self.header_bytes(tokens)
        fixed = _FIXED.pack(MAGIC, size, STRIPE_BYTES, len(tokens), self.page_bytes, self.identity, content_id)
        return (fixed + tokens + digests).ljust(size, b"\0")

    def stripe(self, data: memoryview, number: int) -> memoryview:
        """One stripe of a page's data."""
        return data[number * STRIPE_BYTES : (number + 1) * STRIPE_BYTES]

    def digests(self, data: memoryview) -> bytes:
        """The checksums of all stripes of a page's data."""
        return b"".join(checksum(self.stripe(data, number)) for number in range(self.num_stripes))

    def write(self, fd: int, content_id: bytes, tokens: bytes, data: memoryview) -> None:
        """Fill a new file. Raises OSError."""
        header = self.header(content_id, tokens, self.digests(data))
        _write_all(fd, memoryview(header), 0)
        _write_all(fd, data, len(header))

    def read(self, fd: int, content_id: bytes, tokens: bytes, into: memoryview, helpers: Executor, num_threads: int) -> str | None:
        """Read the data of exactly this page; None if all agrees, else in words what does not. Raises OSError."""
        info = os.fstat(fd)
        fault = distrust(info)
        if fault is not None:
            return fault
        if info.st_size != self.file_bytes(tokens):
            return f"it has {info.st_size} bytes, not {self.file_bytes(tokens)}"
        header = bytearray(self.header_bytes(tokens))
        at = _FIXED.size + len(tokens)
        end = at + DIGEST_BYTES * self.num_stripes
        if not _read_all(fd, memoryview(header), 0) or header != self.header(content_id, tokens, bytes(header[at:end])):
            return "its header is damaged, or another page's"
        digests = bytes(header[at:end])
        todo = deque(range(self.num_stripes))
        others = []
        with contextlib.suppress(RuntimeError):  # the helpers have been sent home
            for _ in range(min(num_threads, self.num_stripes) - 1):
                others.append(helpers.submit(self._read_stripes, fd, len(header), digests, into, todo))
        num_good = 0
        try:
            num_good = self._read_stripes(fd, len(header), digests, into, todo)
        finally:
            # A helper that has not begun, its core being busy, is not waited for. None may go on: the caller closes the file and uses the buffer.
            num_good += sum(other.result() for other in others if not other.cancel())
        return None if num_good == self.num_stripes else "its checksum differs"

    def _read_stripes(self, fd: int, at: int, digests: bytes, into: memoryview, todo: deque[int]) -> int:
        """Read stripes until none is left to do or one is wrong; how many were right."""
        num_good = 0
        with contextlib.suppress(IndexError, OSError):  # nothing left; or a sector that cannot be read, which is as good as damaged
            while True:
                number = todo.popleft()
                stripe = self.stripe(into, number)
                if not _read_all(fd, stripe, at + number * STRIPE_BYTES):
                    break
                if checksum(stripe) != digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]:
                    break
                num_good += 1
        return num_good


def _read_all(fd: int, into: memoryview, at: int) -> bool:
    done = 0
    while done < len(into):
        num = os.preadv(fd, [into[done:]], at + done)
        if num == 0:
            return False
        done += num
    return True


def _write_all(fd: int, data: memoryview, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], at + done)
