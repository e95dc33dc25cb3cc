"""The disk store as it should be: what goes in comes out, after a restart too, the oldest leave, and who may look."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from quire.errors import ConfigError
from quire.tensors import disk_index, disk_tables
from quire.tensors.disk import DiskStore
from quire.tensors.disk_pages import STRIPE_BYTES
from tests.tensors.disk_shelf import Shelf, content_id, data, file_bytes, tokens


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "cache"


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("page_bytes", [1, 4096, 3 * STRIPE_BYTES + 5])
def test_what_goes_in_comes_out_also_after_a_restart(folder: Path, page_bytes: int, num_threads: int) -> None:
    shelf = Shelf(folder, 8, page_bytes, num_threads=num_threads)
    assert not shelf.read(0) and shelf.contains(0) == 0
    assert all(shelf.write(number) for number in range(5))
    assert shelf.there() == list(range(5)) and shelf.contains(*range(8)) == 5 and shelf.contains(7, 0) == 0
    shelf.close()
    again = Shelf(folder, 8, page_bytes, num_threads=num_threads)
    assert again.there() == list(range(5)) and again.contains(*range(8)) == 5
    wanted = {"pages": 5, "bytes": 5 * file_bytes(page_bytes), "reads": 40, "hits": 5, "damaged": 0, "writes": 0, "write_errors": 0, "evictions": 0}
    assert again.store.stats() == wanted


def test_writing_again_changes_nothing(folder: Path) -> None:
    shelf = Shelf(folder)
    assert shelf.write(1)
    before = shelf.file(1).stat()
    assert shelf.write(1) and shelf.file(1).stat().st_ino == before.st_ino
    assert shelf.count("pages") == shelf.count("writes") == 1


def test_any_buffer_of_the_right_size_will_do(folder: Path) -> None:
    store = DiskStore(folder, capacity_bytes=10**6, page_bytes=64, identity=b"")
    source, target = memoryview(bytearray(range(64))).cast("i", (4, 4)), memoryview(bytearray(64)).cast("H")
    assert store.write(content_id(1), b"", source) and store.read(content_id(1), b"", target)
    assert target.tobytes() == source.tobytes()


def test_a_long_header(folder: Path) -> None:
    """Tokens and checksums that do not fit in 4096 bytes."""
    store = DiskStore(folder, capacity_bytes=10**6, page_bytes=10, identity=b"x" * 1000)
    into = memoryview(bytearray(10))
    assert store.write(content_id(1), b"t" * 9000, memoryview(b"0123456789")) and store.read(content_id(1), b"t" * 9000, into)
    assert into == b"0123456789" and store.stats()["bytes"] == 3 * 4096 + 10
    assert not store.read(content_id(1), b"t" * 9000 + b"\0", into)


def test_the_oldest_leave(folder: Path) -> None:
    shelf = Shelf(folder, 4)
    for number in range(4):
        shelf.write(number)
    assert shelf.read(0)  # now 1 is the oldest
    shelf.write(4)
    assert [shelf.contains(number) for number in range(5)] == [1, 0, 1, 1, 1]  # and asking is using: 0, 2, 3, 4
    shelf.write(5)
    assert shelf.there() == [2, 3, 4, 5]
    shelf.close()
    again = Shelf(folder, 4)
    again.write(6)
    assert again.there() == [3, 4, 5, 6] and again.count("evictions") == 1


@pytest.mark.parametrize("how", ["contains", "touch"])
def test_the_end_of_a_sequence_leaves_before_its_beginning(folder: Path, how: str) -> None:
    shelf = Shelf(folder, 4)
    for number in (10, 0, 1, 2):
        shelf.write(number)
    shelf.read(10)
    getattr(shelf.store, how)([content_id(number) for number in (0, 1, 2)])
    shelf.write(11)
    shelf.write(12)
    assert shelf.there() == [0, 1, 11, 12]


def test_capacity_holds_for_all_identities_and_shrinks_when_opened_with_less(folder: Path) -> None:
    first, second = Shelf(folder, 6), Shelf(folder, 6, identity=b"model b")
    for number in range(12):
        assert (first if number % 2 else second).write(number)
        assert first.bytes_on_disk() <= 6 * file_bytes(64) + 100
    assert first.there() == [7, 9, 11] and second.there() == [6, 8, 10]
    first.close()
    second.close()
    assert Shelf(folder, 2).bytes_on_disk() == 2 * file_bytes(64)


def test_a_page_larger_than_the_capacity(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = Shelf(folder, 4)
    small.write(1)
    store = DiskStore(folder, capacity_bytes=4 * file_bytes(64) + 100, page_bytes=20_000, identity=b"model a")
    assert not store.write(content_id(1), tokens(1), memoryview(data(1, 20_000)))
    assert store.stats()["write_errors"] == 1 and "capacity" in caplog.text and small.read(1)


def test_other_identities_and_sizes_never_meet(folder: Path) -> None:
    shelf = Shelf(folder)
    shelf.write(1)
    for other in (Shelf(folder, identity=b"model b"), Shelf(folder, page_bytes=65), Shelf(folder, identity=b"")):
        assert other.contains(1) == 0 and not other.read(1) and other.count("damaged") == 0
    assert shelf.read(1)


def test_other_tokens_are_a_miss(folder: Path) -> None:
    for other in (tokens(2), tokens(1)[:-4], tokens(1) + tokens(1), b""):
        shelf = Shelf(folder)
        shelf.write(1)
        into = memoryview(bytearray(64))
        assert not shelf.store.read(content_id(1), other, into) and shelf.count("damaged") == 1 and shelf.contains(1) == 0


def test_a_file_that_another_process_removed_is_no_damage(folder: Path) -> None:
    shelf = Shelf(folder)
    shelf.write(1)
    shelf.file(1).unlink()
    assert not shelf.read(1) and shelf.count("damaged") == 0 and shelf.contains(1) == 0
    assert shelf.write(2) and shelf.count("pages") == 1
    assert shelf.write(1) and shelf.read(1)


def test_only_the_owner_may_look(folder: Path) -> None:
    before = os.umask(0)
    try:
        shelf = Shelf(folder, 2)
        for number in range(4):
            shelf.write(number)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert "index.sqlite" in modes and set(modes.values()) == {0o600}, modes


def test_temporary_files_are_removed_when_old(folder: Path) -> None:
    Shelf(folder).close()
    old, young = folder / "1-aa.tmp", folder / "2-bb.tmp"
    for path in (old, young):
        path.write_bytes(b"half a page")
    os.utime(old, (time.time() - 3600,) * 2)
    Shelf(folder)
    assert not old.exists() and young.exists()


def test_closed(folder: Path) -> None:
    shelf = Shelf(folder)
    shelf.write(1)
    shelf.close()
    shelf.close()
    assert not shelf.read(1) and not shelf.write(2) and shelf.contains(1) == 0 and not shelf.store.usable
    assert [path.suffix for path in folder.iterdir()].count(".page") == 1


@pytest.mark.parametrize("where", ["file", "file/below", "nul\0", "x" * 300])
def test_what_cannot_be_a_folder(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="cache_dir='.*must be a folder"):
        Shelf(Path(f"{tmp_path}/{where}"))
    assert (tmp_path / "file").read_text() == "mine"


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize(
    ("change", "why"),
    [(_link, "symbolic link"), (lambda path: path.chmod(0o777), "may be written by everybody (mode 0777)")],
)
def test_a_folder_that_is_refused(folder: Path, change: Callable[[Path], None], why: str) -> None:
    shelf = Shelf(folder)
    shelf.write(1)
    change(folder)
    with pytest.raises(ConfigError, match="cache_dir='.*must be a folder that may be used") as caught:
        Shelf(folder)
    assert why in str(caught.value)
    assert shelf.write(2) and shelf.read(1), "a store that had it open goes on"


def test_a_folder_of_another_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Shelf(folder).write(1)
    someone = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: someone)
    with pytest.raises(ConfigError, match=f"belongs to user {someone - 1}"):
        Shelf(folder)


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_made(folder: Path, error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ConfigError, match=f"cache_dir=.*{os.strerror(error)}"):
        Shelf(folder / "below")


def test_a_sticky_folder_is_used(folder: Path) -> None:
    Shelf(folder).write(1)
    folder.chmod(0o1777)
    assert Shelf(folder).read(1)


def full_disk(*_: object, **__: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_index(*_: object) -> None:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    raise error


def fill_the_disk(patch: pytest.MonkeyPatch, call: str) -> None:
    """From this call of a write on."""
    pwrite, close, totals = os.pwrite, os.close, disk_tables.totals
    calls = iter([True, False])
    if call == "index":
        patch.setattr(disk_tables, "put", full_index)
    elif call == "index after":  # the file has its name by then; the sum before the page enters goes well
        patch.setattr(disk_tables, "totals", lambda db: totals(db) if next(calls) else full_index())
    elif call == "pwrite 2":
        patch.setattr(os, "pwrite", lambda *args: pwrite(*args) if next(calls) else full_disk())
    elif call == "close":
        patch.setattr(os, "close", lambda fd: [close(fd), full_disk()])
    else:
        patch.setattr(os, call.split()[0], full_disk)


@pytest.mark.parametrize("call", ["open", "fchmod", "fstat", "pwrite 1", "pwrite 2", "close", "rename", "index", "index after"])
def test_a_full_disk(folder: Path, call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(disk_index, "RETRY_S", 0.0)
    shelf = Shelf(folder, 2)
    assert shelf.write(1) and shelf.write(2)
    for repeat in range(2):
        with pytest.MonkeyPatch.context() as patch:
            fill_the_disk(patch, call)
            assert not shelf.write(3)
        assert shelf.count("write_errors") == repeat + 1 and not list(folder.glob("*.tmp"))
        assert shelf.contains(3) == 0 and not shelf.read(3)
    assert len(caplog.records) == 1 and "not written" in caplog.text  # once a minute at most
    assert not (folder / "index.damaged").exists()
    assert shelf.write(3) and shelf.write(4) and shelf.there() == [3, 4] and shelf.count("pages") == 2


def test_uses_that_a_full_disk_never_writes_down_are_not_kept_for_ever(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_index, "MAX_USED_NOTED", 10)
    shelf = Shelf(folder, 4)
    shelf.write(0)
    with pytest.MonkeyPatch.context() as patch:
        fill_the_disk(patch, "pwrite 1")
        for number in range(1, 20):
            assert not shelf.write(number)
            shelf.store.touch([content_id(number)])
    assert shelf.store._index is not None and len(shelf.store._index._used) == 10
    assert shelf.write(20) and shelf.there() == [0, 20]


def test_short_writes_and_reads_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(folder, page_bytes=1000)
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: pwrite(fd, view[:300], at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:300]], at))
    assert shelf.write(1) and shelf.read(1)


def test_no_more_descriptors(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Our own trouble says nothing of the file, so the file stays."""
    shelf = Shelf(folder)
    shelf.write(1)

    def too_many(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", too_many)
        assert not shelf.read(1) and not shelf.read(1)
    assert shelf.read(1) and shelf.count("damaged") == 0 and len(caplog.records) == 1


def test_one_thread_reads_while_another_writes(folder: Path) -> None:
    shelf = Shelf(folder, 6, 3 * STRIPE_BYTES, num_threads=2)
    done = threading.Event()

    def write() -> None:
        for number in range(60):
            assert shelf.write(number % 12)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set() and writer.is_alive():
        shelf.there(range(12))
    writer.join()
    assert done.is_set() and shelf.count("damaged") == 0 and shelf.count("hits") > 0 and len(shelf.there(range(12))) == 6
