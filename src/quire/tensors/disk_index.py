"""The index of a disk store: how large its pages are together and which was used longest ago, for all processes that share the folder.

The files are the truth and the index is a summary of them, compared with them whenever it is opened. So it may be lost or damaged at any moment:
it is set aside and made again. A page enters in one transaction: older pages leave, its file gets its name, its row is written. If the process is
killed in between, the next one to open the folder finds a file without a row or a row without a file, and mends it.

SQLite runs without write-ahead log and without syncing. A log would need a memory-mapped file beside the index, and a mapped file that somebody
truncates kills the process (SIGBUS). Syncing would guard against a crash of the whole machine only, after which a damaged index is made again.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

from quire.tensors import disk_tables as tables
from quire.tensors.disk_folder import Folder, distrust

log = logging.getLogger("quire")

INDEX, ASIDE, JOURNAL = "index.sqlite", "index.damaged", "index.sqlite-journal"
OPEN_PATIENCE_S, PATIENCE_S = 3.0, 1.0  # for a lock: when opening, and afterwards (never on the engine's thread)
LOCKED_PATIENCE_S = 10.0  # locked for so long, the index is set aside: its holder is stopped, or not one of us
RETRY_S = 5.0
MAX_USED_NOTED = 65_536  # uses that are not written yet; the oldest of more never are
PASSING = {sqlite3.SQLITE_PERM, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN}  # no fault of the index
LOCKED = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


class DiskIndex:
    """Sizes and last uses of the pages in one folder. Thread-safe; `note_used` and `note_gone` never wait for the disk."""

    def __init__(self, folder: Folder, capacity_bytes: int) -> None:
        """Opens the index, or makes it. If neither can be done, that is logged, and tried again when a page is to be admitted."""
        self._folder, self._capacity_bytes = folder, capacity_bytes
        self._lock = threading.Lock()  # of the connection
        self._notes = threading.Lock()  # of the three below
        self._used: OrderedDict[str, int] = OrderedDict()
        self._gone: set[str] = set()
        self._stamp = 0
        self.num_evicted = 0
        self.totals = tables.Totals()  # as of the last transaction
        self._db: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._locked_since: float | None = None
        self._retry_at = 0.0
        with self._lock:
            try:
                self._open()
            except (sqlite3.Error, OSError) as error:
                log.warning("disk cache: there is no index, so pages can be read but not written: %s", error)

    def note_used(self, names: Iterable[str]) -> None:
        """These pages, consecutive ones of a sequence, are used now; the last of them will leave first. Written with the next page or `close`."""
        names = list(names)
        with self._notes:
            stamp = self._next_stamp(len(names))
            for back, name in enumerate(names):
                self._used[name] = stamp - back
                self._used.move_to_end(name)
            while len(self._used) > MAX_USED_NOTED:  # a disk that is full takes no page, and with it no note
                self._used.popitem(last=False)

    def note_gone(self, name: str) -> None:
        """The file is there no more. Written with the next page or `close`."""
        with self._notes:
            self._gone.add(name)

    def admit(self, name: str, size_bytes: int, publish: Callable[[], None]) -> None:
        """Make room for a page, let `publish` give its file the name, and record it; the pages used longest ago leave.

        Raises:
            OSError: from `publish`, or the page is larger than the capacity. Nothing has the name.
            sqlite3.Error: the index cannot be written now. Nothing has the name. A damaged index has been made again, for the next call.
        """
        if size_bytes > self._capacity_bytes:
            raise OSError(errno.EFBIG, f"a page takes {size_bytes} bytes and the capacity is {self._capacity_bytes}")

        published = False

        def work(db: sqlite3.Connection) -> None:
            nonlocal published
            self._write_notes(db)
            self.num_evicted += tables.evict(db, self._folder, self._capacity_bytes - size_bytes, spare=name)
            with self._notes:
                used = self._next_stamp(1)
            tables.put(db, name, size_bytes, used)
            publish()
            published = True

        with self._lock:
            try:
                self._transact(work)
            except BaseException:
                if published:  # a file without a row would count for nothing until the folder is opened again
                    self._folder.remove(name)
                raise

    def close(self) -> None:
        """Write what was noted, if that can be done."""
        with self._lock:
            if self._db is not None:
                with contextlib.suppress(sqlite3.Error, OSError):
                    self._transact(self._write_notes)
            self._drop()
            self._retry_at = float("inf")

    def _next_stamp(self, num: int) -> int:
        """The last of `num` stamps, all later than any before."""
        self._stamp = max(self._stamp + num, time.time_ns())
        return self._stamp

    def _transact(self, work: Callable[[sqlite3.Connection], None]) -> None:
        try:
            with tables.in_utf8():
                db = self._connection()
                db.execute("BEGIN IMMEDIATE")
                work(db)
                totals = tables.totals(db)
                db.execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back()
            self._mend(error)
            raise
        except BaseException:
            self._roll_back()
            raise
        self.totals, self._locked_since = totals, None

    def _roll_back(self) -> None:
        if self._db is not None and self._db.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")

    def _mend(self, error: sqlite3.Error) -> None:
        """What an error calls for: patience, another connection, or another index."""
        code = _code(error)
        if self._db is None:  # it could not even be opened
            return
        if code in LOCKED:
            now = time.monotonic()
            self._locked_since = self._locked_since if self._locked_since is not None else now
            if now - self._locked_since < LOCKED_PATIENCE_S:
                return
        elif code in PASSING:
            self._drop()
            return
        with contextlib.suppress(sqlite3.Error, OSError):
            self._open(damage=str(error))

    def _connection(self) -> sqlite3.Connection:
        """The open index; another connection if the file is not the one it was, because another process has made it again."""
        if self._db is not None and self._file == self._on_disk():
            return self._db
        if time.monotonic() < self._retry_at:
            raise sqlite3.OperationalError("the index could not be opened")
        self._open()
        assert self._db is not None
        return self._db

    def _on_disk(self) -> tuple[int, int] | None:
        # Never by opening it: closing any descriptor of a file drops this process's POSIX locks on it, those of SQLite too.
        try:
            info = self._folder.stat(INDEX)
        except OSError:
            return None
        return info.st_dev, info.st_ino

    def _open(self, damage: str | None = None) -> None:
        """Open the index; first set aside the one that was open if it is damaged, or the one that is there if it proves to be."""
        file = self._file
        self._drop()
        self._retry_at = time.monotonic() + RETRY_S
        with self._folder.lock():
            if damage is not None and file == self._on_disk():
                self._set_aside(damage)
            try:
                self._db = self._open_and_compare(known=damage is not None)
            except sqlite3.Error as error:
                if _code(error) in PASSING:
                    raise
                self._set_aside(str(error))
                self._db = self._open_and_compare(known=True)
        self._retry_at, self._locked_since = 0.0, None

    @tables.in_utf8()
    def _open_and_compare(self, known: bool) -> sqlite3.Connection:
        """`known`: what befell the index has been logged."""
        self._make_file()
        self._file = self._on_disk()
        self._check_place()
        db = sqlite3.connect(self._folder.path / INDEX, timeout=OPEN_PATIENCE_S, isolation_level=None, check_same_thread=False)
        try:
            for pragma in ("mmap_size = 0", "journal_mode = TRUNCATE", "synchronous = OFF"):
                db.execute(f"PRAGMA {pragma}")
            empty = tables.check(db)
            db.execute("BEGIN IMMEDIATE")
            tables.compare(db, self._folder)
            self.num_evicted += tables.evict(db, self._folder, self._capacity_bytes)
            self.totals = tables.totals(db)
            db.execute("COMMIT")
            db.execute(f"PRAGMA busy_timeout = {int(PATIENCE_S * 1000)}")
        except BaseException:
            db.close()
            raise
        if empty and self.totals.num_pages and not known:
            log.warning("disk cache: the index was missing and has been made again from %d pages", self.totals.num_pages)
        return db

    def _check_place(self) -> None:
        """SQLite goes by the path: a folder that was moved would be given the index of another, which has come in its place."""
        info = os.stat(self._folder.path / INDEX)
        if (info.st_dev, info.st_ino) != self._file:
            raise OSError(errno.ESTALE, f"{self._folder.path} is another folder by now")

    def _make_file(self) -> None:
        """Make an empty index file if there is none, readable by us alone; SQLite gives its journal the same permissions."""
        for name in (INDEX, JOURNAL):
            with contextlib.suppress(FileNotFoundError):
                fault = distrust(self._folder.stat(name))
                if fault is not None:
                    raise sqlite3.DatabaseError(f"{name} is not used: {fault}")
        with contextlib.suppress(FileExistsError):
            os.close(self._folder.open(INDEX, os.O_CREAT | os.O_EXCL | os.O_RDWR))

    def _set_aside(self, reason: str) -> None:
        try:
            self._folder.rename(INDEX, ASIDE)
        except OSError:
            self._folder.remove(INDEX)
            if self._folder.has(INDEX):  # a folder that is read-only
                raise
        log.warning("disk cache: the index is set aside and made again: %s", reason)
        for name in (JOURNAL, INDEX + "-wal", INDEX + "-shm"):
            self._folder.remove(name)

    def _drop(self) -> None:
        db, self._db, self._file = self._db, None, None
        if db is not None:
            with contextlib.suppress(sqlite3.Error):
                db.close()

    def _write_notes(self, db: sqlite3.Connection) -> None:
        with self._notes:
            used, gone = self._used, self._gone
            self._used, self._gone = OrderedDict(), set()
        db.executemany("UPDATE pages SET used = ? WHERE name = ?", [(stamp, name) for name, stamp in used.items()])
        missing = [(name,) for name in gone if not self._folder.has(name)]  # it may have been written again since
        db.executemany("DELETE FROM pages WHERE name = ?", missing)


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary error code; 0 for errors of our own making."""
    code: int = getattr(error, "sqlite_errorcode", None) or 0
    return sqlite3.SQLITE_FULL if code == sqlite3.SQLITE_IOERR_WRITE else code & 0xFF  # a quota, or a limit of files, is a full disk of another name
