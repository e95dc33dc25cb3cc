"""Which pages lie on disk, for the picture of the cache. Looked up on the thread of whoever asks for one, never on the engine's."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import replace

from quire.engine.cache_map import CacheMap, OnDisk
from quire.engine.tier import page_content_id
from quire.policy.pages import DISK_MARK
from quire.policy.prefix import PrefixKey
from quire.tensors.disk import DiskStore

LISTED_S = 1.0  # a list of the folder is good for so long, and for longer where making it takes longer
SHARE = 0.02  # of the time may go into making lists
CHANGES = ("num_stored_pages", "num_disk_evictions", "num_disk_damaged")  # what says that the folder has changed


class DiskEye:
    """Looks at one disk store. Thread-safe."""

    def __init__(self, disk: DiskStore) -> None:
        self._disk = disk
        self._lock = threading.Lock()
        self._listed: set[str] = set()
        self._listed_until_s = 0.0
        self._changes: list[int] = []
        # Of the last picture: its keys, the ids of their content, and the marks of its pages. Only what is new is hashed and looked up.
        self._keys: Mapping[int, PrefixKey] = {}
        self._ids: dict[int, str] = {}
        self._marks = bytearray()

    def look(self, seen: CacheMap, indexed: Mapping[int, PrefixKey]) -> CacheMap:
        """The picture with what lies on disk. `indexed` are the keys of its pages, as they were when it was taken."""
        with self._lock:
            changes = [seen.stats[name] for name in CHANGES]
            self._follow(indexed, len(seen.states))
            self._list(changes)
            num_also = self._marks.count(DISK_MARK)
            states = int.from_bytes(seen.states, "little") | int.from_bytes(self._marks, "little")
            disk = OnDisk(num_also, max(0, len(self._listed) - num_also), self._changes == changes)
            return replace(seen, states=states.to_bytes(len(seen.states), "little"), disk=disk)

    def _follow(self, indexed: Mapping[int, PrefixKey], num_pages: int) -> None:
        """Know the pages as they are now."""
        if not self._marks:
            self._marks = bytearray(num_pages)
        before = self._keys.get
        for page_id in self._keys.keys() - indexed.keys():
            del self._ids[page_id]
            self._marks[page_id] = 0
        for page_id, key in [item for item in indexed.items() if before(item[0]) is not item[1]]:
            self._ids[page_id] = self._content_id(page_id, key)
            self._marks[page_id] = DISK_MARK if self._ids[page_id] in self._listed else 0
        self._keys = indexed

    def _list(self, changes: list[int]) -> None:
        """List the folder, if it is time."""
        began = time.monotonic()
        if began < self._listed_until_s:
            return
        self._listed, self._changes = self._disk.listed(), changes
        for page_id, content in self._ids.items():
            self._marks[page_id] = DISK_MARK if content in self._listed else 0
        ended = time.monotonic()
        self._listed_until_s = ended + max(LISTED_S, (ended - began) / SHARE)

    @staticmethod
    def _content_id(page_id: int, key: PrefixKey) -> str:
        try:
            return page_content_id(key, key.pages.index(page_id)).hex()
        except ValueError:  # evicted since the picture was taken
            return ""
