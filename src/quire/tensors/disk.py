"""The disk store: pages of bytes in a folder, found again by their content id after a restart and by every process that shares the folder.

Its one promise is that it never gives back anything but the bytes that were written for exactly this id, these tokens and this identity. Whatever
else it meets is a miss. It knows nothing of tensors, and nothing it meets in the folder makes it raise.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path

from quire.tensors.disk_folder import TEMP_SUFFIX, Folder, distrust, open_folder
from quire.tensors.disk_index import DiskIndex
from quire.tensors.disk_pages import PageFormat

log = logging.getLogger("quire")

ID_BYTES = 32
COMPLAINT_S = 60.0  # at most one line in this time about a disk that is full or failing
OUR_OWN_TROUBLE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR}  # says nothing of the file


class DiskStore:
    """A content-addressed store of pages of one size. Thread-safe; several stores, in several processes, may share one folder.

    Pages of another identity or another size share the folder and its capacity and are never found. What leaves first is what was used longest
    ago, and of pages used together the last: without the first pages of a prefix the others are of no use.
    """

    def __init__(self, folder: str | Path, *, capacity_bytes: int, page_bytes: int, identity: bytes, num_threads: int | None = None) -> None:
        """
        Args:
            folder: made (0700) if missing.
            capacity_bytes: of all files in the folder together; headers take 4096 bytes and up of each. A page being written comes on top.
            page_bytes: of one page, >= 1.
            identity: all that changes the values of a page beside its tokens, any length.
            num_threads: that may share the reading of one page; `None` takes 4, or as many as there are.

        Raises:
            ConfigError: there is, and can be, no folder under that path, or it is a link, another user's, or writable by everybody.
        """
        assert page_bytes >= 1 and capacity_bytes >= 0
        opened = open_folder(folder)
        self._folder: Folder | None = opened
        self._format = PageFormat.of(identity, page_bytes)
        self._name_end = self._format.name_end
        self._num_threads = num_threads if num_threads is not None else min(4, os.cpu_count() or 1)
        self._helpers = ThreadPoolExecutor(max(1, self._num_threads - 1), thread_name_prefix="quire-disk")
        self._writing = threading.Lock()
        self._counting = threading.Lock()
        self._counts = dict.fromkeys(("reads", "hits", "damaged", "writes", "write_errors"), 0)
        self._quiet_until = 0.0
        opened.sweep()
        self._index: DiskIndex | None = DiskIndex(opened, capacity_bytes)

    @property
    def usable(self) -> bool:
        """Whether it is open: a folder is there to read and write."""
        return self._index is not None

    def contains(self, ids: Sequence[bytes]) -> int:
        """How many of the leading pages are there, by their names; `read` may still find one damaged or gone. They count as used.

        Never raises and waits for nothing but the folder's metadata.
        """
        folder, index = self._folder, self._index
        if folder is None or index is None:
            return 0
        present = list(takewhile(folder.has, map(self._name, ids)))
        index.note_used(present)
        return len(present)

    def listed(self) -> set[str]:
        """The ids, in hexadecimal, of all pages of this identity in the folder, by their names. Takes a while where there are many; never raises."""
        folder = self._folder
        if folder is None:
            return set()
        try:
            return {name[: 2 * ID_BYTES] for name in folder.names() if name.endswith(self._name_end)}
        except OSError:
            return set()

    def touch(self, ids: Sequence[bytes]) -> None:
        """These pages, consecutive ones of a sequence, count as used now, the last of them least."""
        if self._index is not None:
            self._index.note_used(map(self._name, ids))

    def read(self, content_id: bytes, tokens: bytes, into: memoryview) -> bool:
        """Fill `into`, writable and of `page_bytes`, with the page that was written for exactly this id and these tokens.

        False if it is not there, and then `into` may hold anything. A file that is not what it should be is removed, with one log line.
        """
        assert not into.readonly
        folder, index, view = self._folder, self._index, self._bytes_of(into)
        if folder is None or index is None:
            return False
        self._count("reads")
        name = self._name(content_id)
        try:
            fd = folder.open(name, os.O_RDONLY | os.O_NONBLOCK)  # not to wait for the other end if it is a pipe
            try:
                fault = self._format.read(fd, content_id, tokens, view, self._helpers, self._num_threads)
            finally:
                os.close(fd)
        except FileNotFoundError:
            index.note_gone(name)
            return False
        except OSError as error:
            if error.errno in OUR_OWN_TROUBLE:
                self._complain("a page could not be read", error)
                return False
            fault = f"it cannot be read: {error.strerror}"
        if fault is None:
            self._count("hits")
            index.note_used([name])
            return True
        self._count("damaged")
        folder.remove(name)
        index.note_gone(name)
        log.warning("disk cache: page %s is removed: %s", name[:12], fault)
        return False

    def write(self, content_id: bytes, tokens: bytes, data: memoryview) -> bool:
        """Keep a page of `page_bytes`; whether it is there now. Pages used longest ago leave. False, with a log line now and then, if it fails."""
        view = self._bytes_of(data)
        name = self._name(content_id)
        with self._writing:
            folder, index = self._folder, self._index
            if folder is None or index is None:
                return False
            if folder.has(name):
                index.note_used([name])
                return True
            temp = f"{os.getpid()}-{secrets.token_hex(8)}{TEMP_SUFFIX}"
            try:
                self._fill(folder, temp, content_id, tokens, view)
                index.admit(name, self._format.file_bytes(tokens), lambda: folder.rename(temp, name))
            except (OSError, sqlite3.Error) as error:
                folder.remove(temp)
                self._count("write_errors")
                self._complain("a page was not written", error)
                return False
            except BaseException:
                folder.remove(temp)
                raise
            self._count("writes")
            return True

    def stats(self) -> dict[str, int]:
        """`pages` and `bytes` in the folder, of all identities, as of this store's last write; the rest counts what this store has done."""
        with self._counting:
            counts = dict(self._counts)
        index = self._index
        totals = {"pages": index.totals.num_pages, "bytes": index.totals.num_bytes} if index is not None else {"pages": 0, "bytes": 0}
        return {**totals, **counts, "evictions": index.num_evicted if index is not None else 0}

    def close(self) -> None:
        """Write down the last uses. Afterwards nothing is found and nothing is kept. May be called twice."""
        with self._writing:
            index, self._index, self._folder = self._index, None, None
        if index is not None:
            index.close()
        self._helpers.shutdown()

    def _name(self, content_id: bytes) -> str:
        assert len(content_id) == ID_BYTES
        return content_id.hex() + self._name_end

    def _bytes_of(self, buffer: memoryview) -> memoryview:
        assert buffer.nbytes == self._format.page_bytes, f"{buffer.nbytes} bytes for a page of {self._format.page_bytes}"
        return buffer.cast("B")

    def _fill(self, folder: Folder, temp: str, content_id: bytes, tokens: bytes, data: memoryview) -> None:
        """Not synced: after a crash of the machine the checksums tell. After one of this process, what is written is written."""
        fd = folder.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            os.fchmod(fd, 0o600)  # whatever the umask
            fault = distrust(os.fstat(fd))
            if fault is not None:  # a file system that keeps no permissions: it would be refused when read
                raise PermissionError(errno.EPERM, f"of a new file, {fault}")
            self._format.write(fd, content_id, tokens, data)
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(fd)
            raise
        os.close(fd)  # may be where a network file system says that it is full

    def _count(self, what: str) -> None:
        with self._counting:
            self._counts[what] += 1

    def _complain(self, what: str, error: Exception) -> None:
        now = time.monotonic()
        if now >= self._quiet_until:
            self._quiet_until = now + COMPLAINT_S
            log.warning("disk cache: %s: %s", what, error)
