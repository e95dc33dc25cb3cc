"""The index of a disk store, damaged, lying, lost, locked: the pages do not suffer and the capacity holds."""

from __future__ import annotations

import logging
import os
import resource
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from quire.tensors import disk_index
from tests.tensors.disk_shelf import Shelf, file_bytes, halve, overwrite, replaced


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def filled(folder: Path) -> Shelf:
    """A closed store with an index of several SQLite pages and room for no more."""
    shelf = Shelf(folder, 40, 1)
    for number in range(40):
        shelf.write(number)
    shelf.close()
    return shelf


def works(folder: Path) -> Shelf:
    """All pages are still there, and the capacity still holds."""
    shelf = Shelf(folder, 40, 1)
    assert shelf.there() == list(range(40)) and shelf.count("pages") == 40
    for number in range(100, 110):
        assert shelf.write(number)
    assert shelf.bytes_on_disk() == 40 * file_bytes(1) and shelf.there(range(100, 110)) == list(range(100, 110))
    assert shelf.count("damaged") == 0 and shelf.count("write_errors") == 0 and shelf.count("pages") == 40
    return shelf


def test_a_damaged_index(folder: Path) -> None:
    """The pages do not suffer, wherever it is hit."""
    filled(folder)
    path, aside = folder / "index.sqlite", folder / "index.damaged"
    size = path.stat().st_size
    assert size > 4 * 4096
    noticed = 0
    for at in [*range(0, 100, 12), *range(100, size, 1999)]:
        overwrite(path, at, lambda old: bytes(byte ^ 0x5A for byte in old), 40)
        works(folder).close()
        noticed += aside.exists()
        aside.unlink(missing_ok=True)
        for file in folder.iterdir():
            file.unlink()
        filled(folder)
    assert noticed >= 5, "the damage was hardly ever seen"


@pytest.mark.parametrize(
    ("said", "now"),
    [
        (b"pages = pages + 1", b"pages = pages + 3"),
        (b"new.size; END", b"old.size; END"),
        (b"(used)", b"(size)"),
        (b"TRIGGER enter", b"T\xd2IGGER enter"),
    ],
)
def test_a_definition_that_is_damaged(folder: Path, said: bytes, now: bytes) -> None:
    """It is good SQL still, or becomes bad only when the next page is written, or SQLite tells of it in bytes that are no text: seen when the index
    is opened."""
    filled(folder)
    raw = (folder / "index.sqlite").read_bytes()
    assert said in raw
    (folder / "index.sqlite").write_bytes(raw.replace(said, now))
    works(folder).close()
    assert (folder / "index.damaged").exists()


def _sql(*statements: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        db = sqlite3.connect(path)
        for statement in statements:
            db.execute(statement)
        db.commit()
        db.close()

    return change


def _link_index(path: Path) -> None:
    path.rename(path.parent.parent / "index")
    path.symlink_to("../index")


@pytest.mark.parametrize(
    ("change", "set_aside"),
    [
        (lambda path: path.unlink(), False),
        (lambda path: os.truncate(path, 0), False),
        (lambda path: os.truncate(path, 10), True),
        (lambda path: os.truncate(path, 4096), True),
        (lambda path: os.truncate(path, path.stat().st_size - 1000), True),
        (lambda path: path.write_text("not a database" * 1000), True),
        (lambda path: path.chmod(0o666), True),
        (lambda path: overwrite(path, 18, lambda _: b"\x07"), True),  # says that nobody may write it
        (_link_index, True),
        (replaced(lambda path: path.mkdir()), True),
        (_sql("PRAGMA user_version = 7"), True),
        (_sql("DROP TABLE pages", "CREATE TABLE pages (a)"), True),
        (_sql("DROP TABLE pages", "DROP TABLE totals"), True),
        (_sql("DELETE FROM pages"), False),
        (_sql("DELETE FROM totals"), False),
        (_sql("UPDATE totals SET bytes = -5, pages = 'x'"), False),
        (_sql("UPDATE pages SET size = -4000"), False),
        (_sql("UPDATE pages SET size = 'many', used = 'never'"), False),
        (_sql("UPDATE pages SET used = 9223372036854775807"), False),
        (_sql("UPDATE pages SET name = '../../precious' || name"), False),
        (_sql("INSERT INTO pages VALUES ('../precious', 4097, 1)", "INSERT INTO pages VALUES ('index.sqlite', 4097, 2)"), False),
        (_sql("PRAGMA journal_mode = WAL"), False),
    ],
)
def test_an_index_that_says_anything(folder: Path, change: Callable[[Path], object], set_aside: bool, caplog: pytest.LogCaptureFixture) -> None:
    filled(folder)
    precious = folder.parent / "precious"
    precious.write_text("of no concern to the store")
    change(folder / "index.sqlite")
    works(folder)
    assert precious.exists() and (folder / "index.damaged").exists() == set_aside
    assert len(caplog.records) <= 1 and (not set_aside or "set aside" in caplog.text)
    again = Shelf(folder, 40, 1)
    assert again.count("pages") == 40 and len(caplog.records) <= 1


def test_lying_rows_while_running(folder: Path) -> None:
    """What an index says may be removed is not removed unless it is a page."""
    shelf = Shelf(folder, 4)
    shelf.write(1)
    precious = folder.parent / "precious"
    precious.write_text("of no concern to the store")
    _sql("INSERT INTO pages VALUES ('../precious', 1000000, 1)")(folder / "index.sqlite")
    assert shelf.write(2) and precious.exists() and shelf.there() == [1, 2]


@pytest.mark.parametrize("change", [lambda path: path.unlink(), halve, lambda path: path.write_bytes(b"x" * 20_000)])
def test_an_index_lost_while_running(folder: Path, change: Callable[[Path], object], caplog: pytest.LogCaptureFixture) -> None:
    shelf, other = Shelf(folder, 6), Shelf(folder, 6)
    for number in range(6):
        shelf.write(number)
    change(folder / "index.sqlite")
    assert shelf.there() == list(range(6))
    for number in range(10, 14):
        shelf.write(number)
        other.write(number + 10)
    assert shelf.write(30) and other.write(31)  # each may have lost one page over it, no more
    assert shelf.bytes_on_disk() == 6 * file_bytes(64) and {30, 31} <= set(shelf.there()) and shelf.count("write_errors") <= 1
    assert shelf.count("damaged") == other.count("damaged") == 0
    assert len([record for record in caplog.records if "index" in record.message]) <= 1


@pytest.fixture
def locked_by(folder: Path) -> sqlite3.Connection:
    """Another program that sits on the index."""
    folder.mkdir(mode=0o700)
    os.close(os.open(folder / "index.sqlite", os.O_CREAT, 0o600))
    return sqlite3.connect(folder / "index.sqlite", isolation_level=None)


def test_an_index_locked_when_opened(
    folder: Path, locked_by: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(disk_index, "OPEN_PATIENCE_S", 0.05)
    first = Shelf(folder)
    first.write(1)
    locked_by.execute("BEGIN EXCLUSIVE")
    second = Shelf(folder)
    assert second.there() == [1] and second.write(2) and second.count("pages") == 2
    assert len(caplog.records) == 1 and "set aside" in caplog.text and "locked" in caplog.text
    assert first.write(3) and first.count("pages") == 3, "the first did not notice that there is another index"
    locked_by.close()


def test_an_index_locked_while_running(
    folder: Path, locked_by: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For a while that costs the pages that would be written; then it is set aside."""
    monkeypatch.setattr(disk_index, "PATIENCE_S", 0.01)
    shelf = Shelf(folder)
    shelf.write(1)
    locked_by.execute("BEGIN EXCLUSIVE")
    assert not shelf.write(2) and not shelf.write(2) and shelf.there() == [1] and shelf.count("write_errors") == 2
    locked_by.execute("ROLLBACK")
    assert shelf.write(2) and not (folder / "index.damaged").exists()
    locked_by.execute("BEGIN EXCLUSIVE")
    assert not shelf.write(3)
    monkeypatch.setattr(disk_index, "LOCKED_PATIENCE_S", 0.0)
    assert not shelf.write(3) and shelf.write(3) and shelf.there() == [1, 2, 3] and (folder / "index.damaged").exists()
    assert {record.levelno for record in caplog.records} == {logging.WARNING} and len(caplog.records) == 2
    locked_by.close()


def test_no_index_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Pages are read; they are written again when there is one."""
    first = Shelf(folder)
    first.write(1)
    first.close()

    def cannot(*_: object, **__: object) -> None:
        error = sqlite3.OperationalError("unable to open database file")
        error.sqlite_errorcode = sqlite3.SQLITE_CANTOPEN
        raise error

    monkeypatch.setattr(disk_index, "RETRY_S", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", cannot)
        shelf = Shelf(folder)
        assert shelf.read(1) and not shelf.write(2) and not shelf.write(2) and len(caplog.records) == 2
    assert shelf.write(2) and shelf.there() == [1, 2] and shelf.count("pages") == 2 and not (folder / "index.damaged").exists()


def test_a_process_that_may_not_write_the_index_leaves_it_to_others(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A quota, or a limit of files, is no fault of the index: a new one would not know what was used when."""
    filled(folder)
    before, limits = (folder / "index.sqlite").stat().st_ino, resource.getrlimit(resource.RLIMIT_FSIZE)
    running = Shelf(folder, 99, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        for shelf in (running, Shelf(folder, 99, 1)):
            assert not shelf.write(100) and shelf.there() == list(range(40))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (folder / "index.sqlite").stat().st_ino == before and "set aside" not in caplog.text
    works(folder)


def test_a_folder_that_was_moved_leaves_the_one_in_its_place_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_index, "RETRY_S", 0.0)
    first = Shelf(folder)
    first.write(1)
    folder.rename(folder.with_name("moved"))
    second = Shelf(folder, 3)
    for number in range(10, 13):
        assert second.write(number)
    assert not first.write(2) and not first.write(3) and first.there() == [1]
    for number in range(20, 24):
        assert second.write(number)
    assert second.bytes_on_disk() == 3 * file_bytes(64) and second.count("write_errors") == 0
    (folder.rename(folder.with_name("elsewhere"))).with_name("moved").rename(folder)
    assert first.write(2) and first.there() == [1, 2]
