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
        self._listed: set[bytes] = set()
        self._listed_until_s = 0.0
        self._changes: list[int] = []
        self._ids: dict[int, tuple[PrefixKey, bytes]] = {}  # of the pages seen last time: hashing all of them anew would take longest

    def look(self, seen: CacheMap, indexed: Mapping[int, PrefixKey]) -> CacheMap:
        """The picture with what lies on disk. `indexed` are the keys of its pages, as they were when it was taken."""
        with self._lock:
            changes = [seen.stats[name] for name in CHANGES]
            self._list(changes)
            states, ids, num_also = bytearray(seen.states), {}, 0
            for page_id, key in indexed.items():
                known = self._ids.get(page_id)
                if known is None or known[0] is not key:
                    known = key, self._content_id(page_id, key)
                ids[page_id] = known
                if known[1] in self._listed:
                    states[page_id] |= DISK_MARK
                    num_also += 1
            self._ids = ids
            disk = OnDisk(num_also, max(0, len(self._listed) - num_also), self._changes == changes)
            return replace(seen, states=bytes(states), disk=disk)

    def _list(self, changes: list[int]) -> None:
        began = time.monotonic()
        if began < self._listed_until_s:
            return
        self._listed, self._changes = self._disk.listed(), changes
        ended = time.monotonic()
        self._listed_until_s = ended + max(LISTED_S, (ended - began) / SHARE)

    @staticmethod
    def _content_id(page_id: int, key: PrefixKey) -> bytes:
        try:
            return page_content_id(key, key.pages.index(page_id))
        except ValueError:  # evicted since the picture was taken
            return b""
