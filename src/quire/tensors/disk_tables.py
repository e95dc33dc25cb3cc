"""The tables of a disk store's index: one row a page file, and the sums over them, kept by triggers. Rows may be damaged in any way."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from quire.tensors.disk_folder import Folder, is_page_name

VERSION = 1
FUTURE_NS = 60 * 10**9
SCHEMA = (
    "CREATE TABLE IF NOT EXISTS pages (name TEXT PRIMARY KEY, size INTEGER NOT NULL, used INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS by_use ON pages (used)",
    "CREATE TABLE IF NOT EXISTS totals (pages INTEGER NOT NULL, bytes INTEGER NOT NULL)",
    "CREATE TRIGGER IF NOT EXISTS enter AFTER INSERT ON pages BEGIN UPDATE totals SET pages = pages + 1, bytes = bytes + new.size; END",
    "CREATE TRIGGER IF NOT EXISTS leave AFTER DELETE ON pages BEGIN UPDATE totals SET pages = pages - 1, bytes = bytes - old.size; END",
    "CREATE TRIGGER IF NOT EXISTS resize AFTER UPDATE OF size ON pages BEGIN UPDATE totals SET bytes = bytes - old.size + new.size; END",
    f"PRAGMA user_version = {VERSION}",
)


@dataclass(frozen=True, slots=True)
class Totals:
    """What all pages of the folder come to, of whatever identity."""

    num_pages: int = 0
    num_bytes: int = 0


@contextlib.contextmanager
def in_utf8() -> Iterator[None]:
    """Inside, text that is not UTF-8, as a damaged index has it, is an error of the index: Python fails to decode even what SQLite says of it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise sqlite3.DatabaseError(f"it holds text that is not UTF-8: {error}") from error


def check(db: sqlite3.Connection) -> bool:
    """Raise sqlite3.Error unless the file is empty, or an index of this version without visible damage; whether it is empty."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version not in (0, VERSION):
        raise sqlite3.DatabaseError(f"its version is {version}, not {VERSION}")
    if version and _definitions(db) != _own_definitions():  # a trigger with a flipped bit would fail at the next page, or count wrong for ever
        raise sqlite3.DatabaseError("its tables or triggers are defined otherwise")
    (fault,) = db.execute("PRAGMA integrity_check(1)").fetchone()
    if fault != "ok":
        raise sqlite3.DatabaseError(str(fault).replace("\n", " "))
    return bool(version == 0)


def _definitions(db: sqlite3.Connection) -> list[tuple[str, ...]]:
    return db.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name").fetchall()


@cache
def _own_definitions() -> list[tuple[str, ...]]:
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        for statement in SCHEMA:
            db.execute(statement)
        return _definitions(db)


def compare(db: sqlite3.Connection, folder: Folder) -> None:
    """Make the tables say what the files say. The last use is theirs alone; without a believable one it is when the file was written."""
    for statement in SCHEMA:
        db.execute(statement)
    rows = {name: (size, used) for name, size, used in db.execute("SELECT name, size, used FROM pages")}
    files = folder.pages()
    latest = time.time_ns() + FUTURE_NS
    db.executemany("DELETE FROM pages WHERE name = ?", [(name,) for name in rows if name not in files])
    for name, file in files.items():
        size, used = rows.get(name, (None, None))
        believable = isinstance(used, int) and 0 < used < latest
        if size != file.size_bytes or not believable:
            put(db, name, file.size_bytes, used if believable else file.written_ns)
    db.execute("DELETE FROM totals")
    db.execute("INSERT INTO totals SELECT COUNT(*), COALESCE(SUM(size), 0) FROM pages")


def put(db: sqlite3.Connection, name: str, size_bytes: int, used: int) -> None:
    """Enter a page, or change its row."""
    db.execute(
        "INSERT INTO pages VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE SET size = excluded.size, used = excluded.used", (name, size_bytes, used)
    )


def totals(db: sqlite3.Connection) -> Totals:
    """The sums as they stand in this transaction."""
    row = db.execute("SELECT pages, bytes FROM totals").fetchone()
    if row is None or not all(isinstance(value, int) and value >= 0 for value in row):
        raise sqlite3.DatabaseError("its totals are lost")
    return Totals(*row)


def evict(db: sqlite3.Connection, folder: Folder, limit_bytes: int, spare: str = "") -> int:
    """Remove the pages used longest ago, files first, until the others take at most `limit_bytes`; how many went. `spare` stays."""
    excess = totals(db).num_bytes - limit_bytes
    num_evicted = 0
    while excess > 0:
        rows = db.execute("SELECT name, size FROM pages WHERE name != ? ORDER BY used LIMIT 32", (spare,)).fetchall()
        if not rows:
            break
        for name, size in rows:
            if excess <= 0:
                break
            if is_page_name(name):
                folder.remove(name)
            if not isinstance(size, int) or db.execute("DELETE FROM pages WHERE name = ?", (name,)).rowcount != 1:
                raise sqlite3.DatabaseError("it holds a row that cannot be")
            excess -= size
            num_evicted += 1
    return num_evicted
