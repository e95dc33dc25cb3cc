"""The rows of a batch: what is asked in IN.jsonl, and what OUT.jsonl has answered already.

OUT.jsonl is only ever appended to, one whole line a row, each written at once. A process that is killed leaves at most one torn line, the last,
which is cut off when the batch goes on. A row's `id` is made of its line, so that an answer is known to be this line's and not another's of the
same name.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from quire.errors import InvalidRequestError, RequestFailedError

ROW_ID = "batch_req_"
BEGINNING = f'{{"id":"{ROW_ID}'.encode()  # of every answer


class Row(NamedTuple):
    """One line of IN.jsonl: its name, the `id` that its answer will have, and where it is, for it is read again when its turn comes."""

    custom_id: str
    row_id: str
    start: int
    num_bytes: int

    def read(self, file: BinaryIO) -> dict[str, Any]:
        """Everything it says."""
        file.seek(self.start)
        found: dict[str, Any] = json.loads(file.read(self.num_bytes))
        return found


def read_rows(file: BinaryIO, name: str) -> list[Row]:
    """All rows, in order. Blank lines are passed over.

    Raises:
        InvalidRequestError: a line has no name, or one that another has. Then nothing has been asked.
    """
    rows, lines = list[Row](), dict[str, int]()
    start = 0
    for number, line in enumerate(file, 1):
        if line.strip():
            custom_id = _custom_id(line, name, number)
            if custom_id in lines:
                raise _bad("in", name, number, f"a row with a custom_id of its own: {custom_id!r} is that of line {lines[custom_id]} too")
            lines[custom_id] = number
            rows.append(Row(custom_id, f"{ROW_ID}{hashlib.blake2b(line.strip(), digest_size=16).hexdigest()}", start, len(line)))
        start += len(line)
    return rows


class Ledger:
    """OUT.jsonl, open for this process alone. `answered` says of each row in it whether it succeeded.

    Raises:
        InvalidRequestError: the file cannot be written, is another process's, or is not the answers to these rows.
    """

    def __init__(self, path: Path, rows: list[Row]) -> None:
        self.answered: dict[str, bool] = {}
        self._synced = True
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise InvalidRequestError("out", str(path), f"a file that can be written ({error.strerror})") from error
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise InvalidRequestError("out", str(path), "a plain file, which can be read again and cut")
            self._lock(path)
            end = self._read(path, {row.custom_id: row.row_id for row in rows})
            os.ftruncate(self._fd, end)  # a torn line; not before all else has been found to be a batch's answers
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.sync()
        os.close(self._fd)

    def append(self, row: Row, response: Mapping[str, Any] | None, error: Mapping[str, Any] | None) -> bool:
        """Write one answer down; say whether the row succeeded. It survives the process at once, the machine after `sync`."""
        told = {"id": row.row_id, "custom_id": row.custom_id, "response": response, "error": error}
        left = memoryview(json.dumps(told, separators=(",", ":")).encode() + b"\n")
        begin, self._synced = os.lseek(self._fd, 0, os.SEEK_END), False
        try:
            while left:  # a disk that is almost full takes a part, and refuses the rest
                left = left[os.write(self._fd, left) :]
        except OSError as error:
            os.ftruncate(self._fd, begin)
            raise RequestFailedError(f"the batch cannot go on: its answers cannot be written ({error.strerror})") from error
        self.answered[row.custom_id] = _succeeded(told)
        return self.answered[row.custom_id]

    def sync(self) -> None:
        """Have what was written survive the machine too."""
        if not self._synced:
            self._synced = True
            try:
                os.fsync(self._fd)
            except OSError as error:
                raise RequestFailedError(f"the batch cannot go on: its answers cannot be written ({error.strerror})") from error

    def _lock(self, path: Path) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InvalidRequestError("out", str(path), "a file that no other batch is writing") from error

    def _read(self, path: Path, wanted: Mapping[str, str]) -> int:
        """Note what is answered; the end of the last whole line."""
        end = 0
        for number, line in enumerate(_lines(self._fd), 1):
            if not line.endswith(b"\n") and (line.startswith(BEGINNING) or BEGINNING.startswith(line)):
                break
            end += len(line)
            try:
                told = json.loads(line)
                custom_id, succeeded, own = told["custom_id"], _succeeded(told), wanted.get(told["custom_id"]) == told["id"]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise _bad("out", str(path), number, "the answer to a row; is this the right file?") from None
            if not own:
                what = "a row as the input has it now" if custom_id in wanted else "a row of the input"
                raise _bad("out", str(path), number, f"the answer to {what} (it is one to {custom_id!r})")
            if custom_id in self.answered:
                raise _bad("out", str(path), number, f"the only answer to its row ({custom_id!r} has two)")
            self.answered[custom_id] = succeeded
        return end


def _lines(fd: int) -> Iterator[bytes]:
    with contextlib.closing(os.fdopen(os.dup(fd), "rb")) as file:
        file.seek(0)
        yield from file


def _succeeded(told: Mapping[str, Any]) -> bool:
    return told["error"] is None and told["response"]["status_code"] == 200


def _custom_id(line: bytes, name: str, number: int) -> str:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise _bad("in", name, number, "a JSON object") from None
    except RecursionError:
        raise _bad("in", name, number, "nested less deep") from None
    except ValueError:  # JSON has no bound, and Python's parser this one
        raise _bad("in", name, number, f"without an integer of more than {sys.get_int_max_str_digits()} digits") from None
    custom_id = row.get("custom_id") if isinstance(row, dict) else None
    if not isinstance(custom_id, str) or not custom_id:
        raise _bad("in", name, number, "a JSON object with a custom_id, which is text")
    return custom_id


def _bad(field: str, name: str, number: int, limit: str) -> InvalidRequestError:
    return InvalidRequestError(field, name, f"such that its line {number} is {limit}")
