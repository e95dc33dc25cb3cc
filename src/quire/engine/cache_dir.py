"""The option `cache_dir`: what does not go with it, and the store in it."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from quire.config import EngineConfig
from quire.errors import ConfigError
from quire.policy.prefix import pack
from quire.tensors.disk import DiskStore
from quire.tensors.disk_folder import open_folder
from quire.tensors.disk_pages import PageFormat


def check_cache_dir(config: EngineConfig, *, live: bool) -> None:
    """Make the folder if it is missing, and see that it may be used, before a model is loaded for nothing.

    Raises:
        ConfigError: it may not, or another option or a live model leaves nothing to store.
    """
    if config.cache_dir is None:
        return
    if not config.prefix_sharing:
        raise ConfigError(f"cache_dir={config.cache_dir!r}: must be None with prefix_sharing=False, which nothing stored could serve")
    if config.cache_layout == "stacked":
        raise ConfigError(f"cache_dir={config.cache_dir!r}: must be None with cache_layout='stacked', whose pages are never complete")
    if live:
        raise ConfigError(f"cache_dir={config.cache_dir!r}: must be None for a live model, whose weights may change without a trace")
    open_folder(Path(config.cache_dir).expanduser())


def disk_store(config: EngineConfig, page_bytes: int, page_tokens: int, identity: str) -> DiskStore:
    """The store in `cache_dir`, which has been checked, of pages of at most so many tokens.

    Raises:
        ConfigError: `cache_dir_bytes` has no room for one; or the folder is no longer what it was.
    """
    assert config.cache_dir is not None
    folder = Path(config.cache_dir).expanduser()
    least = PageFormat.of(identity.encode(), page_bytes).file_bytes(pack([0] * page_tokens))
    if config.cache_dir_bytes is not None and config.cache_dir_bytes < least:
        raise ConfigError(f"cache_dir_bytes={config.cache_dir_bytes}: must be at least {least}, the file of one page")
    capacity = _half_of_what_is_free(folder) if config.cache_dir_bytes is None else config.cache_dir_bytes
    return DiskStore(folder, capacity_bytes=capacity, page_bytes=page_bytes, identity=identity.encode())


def _half_of_what_is_free(folder: Path) -> int:
    """Or taken by pages that are there already: else each start would leave room for fewer of them."""
    taken = 0
    opened = open_folder(folder)  # makes it again, if it went while the model was loaded
    with contextlib.suppress(OSError):
        taken = sum(file.size_bytes for file in opened.pages().values())
    return (shutil.disk_usage(folder).free + taken) // 2
