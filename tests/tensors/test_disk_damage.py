"""The pages of a disk store among damage: every changed byte and every foreign file is a clean miss, with one line in the log."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from quire.tensors.disk_pages import STRIPE_BYTES
from tests.tensors.disk_shelf import Shelf, content_id, file_bytes, halve, overwrite, replaced

SIZE = file_bytes(5000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def lose(shelf: Shelf, number: int, caplog: pytest.LogCaptureFixture, why: str = "") -> None:
    """Reading the page is a miss that is counted and logged once; then it is gone and can be written again."""
    caplog.clear()
    before = shelf.count("damaged")
    assert shelf.contains(number) == 1, "nothing there to be refused"
    assert not shelf.read(number) and shelf.count("damaged") == before + 1
    assert len(caplog.records) == 1 and why in caplog.text
    assert shelf.contains(number) == 0 and not shelf.read(number) and shelf.count("damaged") == before + 1
    assert shelf.write(number) and shelf.read(number)


POSITIONS = [*range(0, 260), *range(260, SIZE, 173), 4095, 4096, SIZE - 1]


def test_a_flipped_bit(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    shelf = Shelf(folder, page_bytes=5000)
    shelf.write(1)
    for at in POSITIONS:
        overwrite(shelf.file(1), at, lambda old, bit=at % 8: bytes([old[0] ^ 1 << bit]))
        lose(shelf, 1, caplog, "its header is damaged" if at < 160 else "checksum" if at >= 4096 else "")
    assert shelf.count("damaged") == len(POSITIONS)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_flipped_bit_in_any_stripe(folder: Path, num_threads: int, caplog: pytest.LogCaptureFixture) -> None:
    shelf = Shelf(folder, 2, 5 * STRIPE_BYTES + 9, num_threads=num_threads)
    shelf.write(1)
    for stripe in range(6):
        overwrite(shelf.file(1), 4096 + stripe * STRIPE_BYTES + 8, lambda old: bytes([old[0] ^ 16]))
        lose(shelf, 1, caplog, "checksum")


def test_stripes_that_changed_places(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    shelf = Shelf(folder, 2, 2 * STRIPE_BYTES)
    shelf.write(1)
    overwrite(shelf.file(1), 4096, lambda old: old[STRIPE_BYTES:] + old[:STRIPE_BYTES], 2 * STRIPE_BYTES)
    lose(shelf, 1, caplog, "checksum")


@pytest.mark.parametrize("size", [0, 1, 95, 4095, 4096, SIZE // 2, SIZE - 1, SIZE + 1, 2 * SIZE])
def test_another_size(folder: Path, size: int, caplog: pytest.LogCaptureFixture) -> None:
    shelf = Shelf(folder, page_bytes=5000)
    shelf.write(1)
    os.truncate(shelf.file(1), size)
    lose(shelf, 1, caplog, f"{size} bytes, not {SIZE}")


def test_cut_off_while_it_is_read(folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(folder, page_bytes=5000)
    shelf.write(1)
    path, fstat = shelf.file(1), os.fstat

    def cut(fd: int) -> os.stat_result:
        info = fstat(fd)
        os.truncate(path, 6000)
        return info

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", cut)
        assert not shelf.read(1)
    assert shelf.count("damaged") == 1 and len(caplog.records) == 1


def test_another_page_under_this_name(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    shelf, other = Shelf(folder), Shelf(folder, identity=b"model b")
    for number in (1, 2):
        shelf.write(number)
        other.write(number)
    mine = folder / f"{content_id(1).hex()}{shelf.store._name_end}"
    for theirs in (content_id(2).hex() + shelf.store._name_end, content_id(1).hex() + other.store._name_end):
        mine.write_bytes((folder / theirs).read_bytes())
        lose(shelf, 1, caplog, "another page's")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (replaced(lambda path: path.symlink_to("elsewhere")), "cannot be read"),
        (replaced(os.mkfifo), "not a regular file"),
        (lambda path: path.chmod(0o644), "permissions are 0644"),
        (lambda path: path.chmod(0o602), "permissions are 0602"),
        (lambda path: path.chmod(0o000), ""),
    ],
    ids=["link", "pipe", "0644", "0602", "0000"],
)
def test_a_file_that_is_not_trusted(folder: Path, change: Callable[[Path], object], why: str, caplog: pytest.LogCaptureFixture) -> None:
    shelf = Shelf(folder)
    shelf.write(1)
    change(shelf.file(1))
    lose(shelf, 1, caplog, why)


def test_a_folder_under_the_name_of_a_page(folder: Path) -> None:
    """It cannot be removed, and is a miss for ever."""
    shelf = Shelf(folder)
    shelf.write(1)
    path = shelf.file(1)
    path.unlink()
    path.mkdir()
    assert not shelf.read(1) and not shelf.read(1) and shelf.count("damaged") == 2 and shelf.write(2) and shelf.read(2)


def test_a_file_of_another_user(folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(folder)
    shelf.write(1)
    someone = os.geteuid() + 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: someone)
        assert not shelf.read(1)
    assert f"belongs to user {someone - 1}" in caplog.text and shelf.count("damaged") == 1 and len(caplog.records) == 1


def invert_two_thirds(path: Path) -> None:
    size = path.stat().st_size
    if size > 4096:
        overwrite(path, size // 3, lambda old: bytes(byte ^ 0xFF for byte in old), size)


@pytest.mark.parametrize("running", [False, True], ids=["closed", "running"])
@pytest.mark.parametrize("damage", [invert_two_thirds, halve])
def test_every_file_at_once(folder: Path, damage: Callable[[Path], None], running: bool, caplog: pytest.LogCaptureFixture) -> None:
    """While the store is closed, and under its hands."""
    shelf = Shelf(folder, 50, page_bytes=5000)
    for number in range(40):
        shelf.write(number)
    if not running:
        shelf.close()
    files = list(folder.iterdir())
    for path in files:
        damage(path)
    if not running:
        shelf = Shelf(folder, 50, page_bytes=5000)
        assert (folder / "index.damaged").exists()
        assert len([record for record in caplog.records if "index" in record.message]) == 1
    assert shelf.contains(*range(40)) == 40 and shelf.there() == [] and shelf.count("damaged") == 40
    assert len([record for record in caplog.records if "page" in record.message and "index" not in record.message]) == 40
    written = [shelf.write(number) for number in range(40)]  # if running, the first finds the index damaged, and makes it again
    assert sum(written) >= 39 and shelf.there() == [number for number in range(40) if written[number]]
    shelf.close()
    assert Shelf(folder, 50, page_bytes=5000).count("pages") == sum(written)
