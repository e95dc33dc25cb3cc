"""The folder of a disk store: checked once, then held by a descriptor, so that nobody can put another in its place.

A folder that others may write into, or that is a link to somewhere else, is refused: what lies in it would be read into answers. All work in it
goes through the descriptor and follows no links; a file is trusted only if it is a regular one of our own that nobody else may open.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quire.errors import ConfigError

TEMP_SUFFIX = ".tmp"
TEMP_STALE_S = 600.0  # a temporary file this old has no writer any more
LOCK_PATIENCE_S = 3.0
_PAGE_NAME = re.compile(r"[0-9a-f]{64}-[0-9a-f]{32}\.page")


def is_page_name(name: object) -> bool:
    """Whether this is the name of a page file: what an index says may be damaged, and is never removed on its word alone."""
    return isinstance(name, str) and _PAGE_NAME.fullmatch(name) is not None


def distrust(info: os.stat_result) -> str | None:
    """Why a file may not be used, or None if it may."""
    if not stat.S_ISREG(info.st_mode):
        return "it is not a regular file"
    if info.st_uid != os.geteuid():
        return f"it belongs to user {info.st_uid}"
    if stat.S_IMODE(info.st_mode) != 0o600:
        return f"its permissions are {stat.S_IMODE(info.st_mode):04o}, not 0600"
    return None


@dataclass(frozen=True, slots=True)
class PageFile:
    """What the folder says of one page file."""

    size_bytes: int
    written_ns: int


class Folder:
    """An open folder. The descriptor lives as long as the object, so no call in flight can meet another's."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self._fd = path, fd

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._fd)

    def open(self, name: str, flags: int) -> int:
        """A descriptor of the file; new files are 0600. Raises OSError (ELOOP for a link)."""
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._fd)

    def stat(self, name: str) -> os.stat_result:
        """Of the name itself, links not followed. Raises OSError."""
        return os.stat(name, dir_fd=self._fd, follow_symlinks=False)

    def has(self, name: str) -> bool:
        """Whether there is something under that name, as far as can be seen. Less than half the price of `stat`, and never raises."""
        return os.access(name, os.F_OK, dir_fd=self._fd)

    def rename(self, name: str, to: str) -> None:
        """Atomic, in the place of whatever has that name. Raises OSError."""
        os.rename(name, to, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def remove(self, name: str) -> None:
        """Remove the file, if it is there and can be removed."""
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._fd)

    def pages(self) -> dict[str, PageFile]:
        """All page files that may be trusted, by name. Raises OSError."""
        found = {}
        with os.scandir(self._fd) as entries:
            for entry in entries:
                if is_page_name(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        info = entry.stat(follow_symlinks=False)
                        if distrust(info) is None:
                            found[entry.name] = PageFile(info.st_size, info.st_mtime_ns)
        return found

    def names(self) -> list[str]:
        """The names of all that is there. Raises OSError."""
        return os.listdir(self._fd)

    def sweep(self) -> None:
        """Remove temporary files whose writers are gone."""
        with contextlib.suppress(OSError), os.scandir(self._fd) as entries:
            for name in [entry.name for entry in entries if entry.name.endswith(TEMP_SUFFIX)]:
                if time.time() - self.stat(name).st_mtime > TEMP_STALE_S:
                    self.remove(name)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other stores from opening or replacing the index meanwhile. Waits LOCK_PATIENCE_S at most: a holder may be stopped."""
        deadline = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.01)
            except OSError:  # a file system without locks
                break
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_UN)


def open_folder(folder: str | Path) -> Folder:
    """The folder, made (0700) if missing.

    Raises:
        ConfigError: there is, and can be, no folder under that path, or none that may be used.
    """
    path = Path(os.path.abspath(folder))
    try:
        return Folder(path, _open_checked(path))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"cache_dir={str(folder)!r}: must be a folder that may be used, or a path at which one can be made ({reason})") from error


def _open_checked(path: Path) -> int:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        path.mkdir(mode=0o700, parents=True)
        mode = os.lstat(path).st_mode
    if stat.S_ISLNK(mode):
        raise PermissionError(errno.EPERM, "it is a symbolic link; name the folder itself")
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    info = os.fstat(fd)
    reason = None
    if info.st_uid != os.geteuid():
        reason = f"it belongs to user {info.st_uid}, not to user {os.geteuid()} who runs this"
    elif info.st_mode & stat.S_IWOTH and not info.st_mode & stat.S_ISVTX:
        reason = f"it may be written by everybody (mode {stat.S_IMODE(info.st_mode):04o}); chmod o-w makes it usable"
    if reason is not None:
        os.close(fd)
        raise PermissionError(errno.EPERM, reason)
    return fd
