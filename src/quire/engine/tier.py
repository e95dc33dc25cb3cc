"""The tier below the pool: complete pages go to the disk store behind the engine's back and come back before a sequence starts.

    held ──a sequence lets go──> cached ──set aside, copied by the writer──> cached and stored
                                    ^                                            │ evicted, or the process ends
                                    └── indexed <── filled by the reader <── taken aside, when a waiting sequence could hit it

What comes back is indexed like any page, so that hits, hybrid groups and copies need not know of the disk. A page that cannot be read is a page
that is not there. Nothing waits for the disk but the sequence whose prefix it brings, and that only if computing it would take longer.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from quire.policy.cache import PageCache
from quire.policy.costs import Costs
from quire.policy.prefix import PrefixKey
from quire.policy.sequence import Sequence
from quire.tensors.disk import DiskStore
from quire.tensors.store import PageStore

T = TypeVar("T")
log = logging.getLogger("quire")

MAX_ASIDE_SHARE = 0.25  # of the pool may be on its way to the disk at once
MAX_OFFERED = 65_536  # pages that wait to be written; the oldest of more are not
MAX_ENDED = 256  # sequences whose pages are put in order once all is written; a disk that is never done would keep all there were
WAIT_S = 0.05
FIRST_GUESS_BYTES_PER_S = 500e6  # of reading, until it has been measured


class _Page(NamedTuple):
    """One page of one group, by what it holds."""

    key: PrefixKey
    group_id: int

    @property
    def content_id(self) -> bytes:
        return page_content_id(self.key, self.group_id)


class _Needed(NamedTuple):
    """The pages of a hit that stored ones would lengthen by `num_tokens`, heads first, each with its place in the pool or -1."""

    pages: list[tuple[_Page, int]]
    num_tokens: int

    @property
    def missing(self) -> list[_Page]:
        return [page for page, place in self.pages if place < 0]

    @property
    def there(self) -> list[int]:
        return [place for _, place in self.pages if place >= 0]


@dataclass(slots=True)
class _Fetch:
    """Pages on their way up. `places[i]` is the page of the pool that `pages[i]` is read into; which of them were, and the seconds it took, come.

    `whole`: all pages of the hit that is to come, heads first. Those that the pool has are held meanwhile, or what comes could take their place.
    """

    pages: list[_Page]
    places: list[int]
    whole: list[int]
    future: Future[tuple[list[bool], float]]


def content_id(key: PrefixKey) -> bytes:
    """32 bytes that stand for a key's tokens, all before them and its root, whatever hash the index uses; computed once."""
    path = []
    at: PrefixKey | None = key
    while at is not None and at.content is None:
        path.append(at)
        at = at.parent
    for step in reversed(path):
        before = step.parent.content if step.parent is not None else b""
        assert before is not None
        step.content = hashlib.blake2b(before + step.tokens, digest_size=32).digest()
    assert key.content is not None
    return key.content


def page_content_id(key: PrefixKey, group_id: int) -> bytes:
    """32 bytes that stand for what one group's page of a key holds."""
    return hashlib.blake2b(content_id(key) + bytes([group_id % 256, group_id // 256]), digest_size=32).digest()


def _submit(thread: ThreadPoolExecutor, function: Callable[..., T], *args: Any) -> Future[T]:
    """Have a thread do it. An interpreter that ends sends executors home before it closes us, so from then on it is done here."""
    try:
        return thread.submit(function, *args)
    except RuntimeError:
        future: Future[T] = Future()
        future.set_result(function(*args))
        return future


class DiskTier:
    """See `policy.tier.Tier`. All methods are called on the engine's thread; two threads of its own read and write."""

    def __init__(self, cache: PageCache, store: PageStore, disk: DiskStore) -> None:
        self._cache, self._store, self._disk = cache, store, disk
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="quire-fetch")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="quire-store")
        for thread in (self._reader, self._writer):
            thread.submit(int)  # starts it now: where the system has no thread left later on, it would be the engine's loop that fails
        self._offered: OrderedDict[_Page, None] = OrderedDict()
        self._together: deque[list[_Page]] = deque(maxlen=MAX_ENDED)  # of each sequence since the last pause, what it held to the end, heads first
        self._writes: dict[Future[bool], int] = {}
        self._fetches: dict[int, _Fetch] = {}
        self._news = threading.Event()
        self.costs = Costs(store.page_bytes / FIRST_GUESS_BYTES_PER_S)
        self.num_fetched_pages = 0

    @property
    def busy(self) -> bool:
        """Whether pages of the pool are on their way."""
        return bool(self._writes or self._fetches)

    def note_step(self, num_tokens: int, seconds: float) -> None:
        self.costs.note_step(num_tokens, seconds)

    # -- up -------------------------------------------------------------------------------------------------------------------------------

    def fetch(self, seq: Sequence) -> bool:
        if seq.arrival in self._fetches:
            return True
        if not self._disk.usable or seq.own_root:
            return False
        _, have = self._cache.finder.longest(seq, seq.num_known - 1)
        if have >= seq.asked_below:
            return False
        needed = self._needed(seq, have)
        if not self._has_room(needed):
            return False
        seq.asked_below = have
        if not self._pays(needed):
            return False
        missing, pool = needed.missing, self._cache.pool
        pool.set_aside(needed.there)
        places = pool.take_aside(len(missing))
        future = _submit(self._reader, self._read, missing, places)
        coming = iter(places)
        self._fetches[seq.arrival] = _Fetch(missing, places, [place if place >= 0 else next(coming) for _, place in needed.pages], future)
        future.add_done_callback(lambda _: self._news.set())
        return True

    def foresee(self, seq: Sequence) -> int:
        if not self._disk.usable or seq.own_root:
            return 0
        _, have = self._cache.finder.longest(seq, seq.num_known - 1)
        needed = self._needed(seq, have)
        return have + needed.num_tokens if self._has_room(needed) and self._pays(needed) else 0

    def _has_room(self, needed: _Needed) -> bool:
        pool = self._cache.pool
        return len(needed.missing) <= pool.num_available - sum(pool.references(page_id) == 0 for page_id in needed.there)

    def _pays(self, needed: _Needed) -> bool:
        num_missing = len(needed.missing)
        return num_missing > 0 and self.costs.reading_pays(num_missing, needed.num_tokens)

    def _needed(self, seq: Sequence, have: int) -> _Needed:
        """What a hit longer than `have` tokens takes."""
        cache, limit = self._cache, seq.num_known - 1
        length = limit - limit % cache.unit
        for size, group_ids in cache.ids_by_size.items():
            full_ids = [g for g in group_ids if cache.groups[g].kind == "full"] or group_ids[:1]
            chain = seq.chain(size, length // size, cache.hash_bytes)
            for g in full_ids:
                first = have // size
                ids = [_Page(chain[i + 1], g).content_id for i in range(first, length // size)]
                end = (first + self._disk.contains(ids)) * size
                length = min(length, end - end % cache.unit)
        if length <= have:
            return _Needed([], 0)
        pages = []
        for group in cache.groups:
            chain = seq.chain(group.page_size, length // group.page_size, cache.hash_bytes)
            first = min(group.first_kept(length, cache.unit), (length - cache.finder.least) // group.page_size)
            for i in range(first, length // group.page_size):
                found = cache.index.find(chain[i + 1])
                place = found.pages[group.group_id] if found is not None else -1
                pages.append((i * group.page_size, _Page(chain[i + 1], group.group_id), place))
        pages.sort(key=lambda page: page[0])
        return _Needed([(page, place) for _, page, place in pages], length - have)

    def _read(self, pages: Seq[_Page], places: Seq[int]) -> tuple[list[bool], float]:
        began = time.perf_counter()
        fine = [self._survived(self._disk.read, page, place) for page, place in zip(pages, places, strict=True)]
        return fine, time.perf_counter() - began  # the disk's time: others' steps, for whose end the pages wait, are not its cost

    def _survived(self, move: Callable[[bytes, bytes, memoryview], bool], page: _Page, place: int) -> bool:
        """Whether a page was moved. Whatever goes wrong out there, memory that runs out included, is a page that is not there."""
        try:
            return move(page.content_id, page.key.tokens, self._store.bytes_of(place))
        except Exception:
            log.warning("disk cache: a page was not moved", exc_info=True)
            return False

    def _arrived(self, arrival: int) -> None:
        """Index what was read; the whole hit is let go, tails first, so that what is indexed is cached and the rest free."""
        fetch, cache = self._fetches.pop(arrival), self._cache
        fine, seconds = fetch.future.result()
        self.costs.note_read(len(fetch.pages), seconds)
        for page, place, arrived in zip(fetch.pages, fetch.places, fine, strict=True):
            if not arrived:
                continue
            self.num_fetched_pages += 1
            found = cache.index.find(page.key)
            if found is None:
                pages = [-1] * len(cache.groups)
                pages[page.group_id] = place
                cache.index.insert(page.key, pages)
            elif found.pages[page.group_id] < 0:
                cache.index.complete(found, page.group_id, place)
        cache.pool.put_back(fetch.whole[::-1])

    # -- down -----------------------------------------------------------------------------------------------------------------------------

    def offer(self, seq: Sequence) -> None:
        if not self._disk.usable:
            return
        cache, held = self._cache, []
        for size, group_ids in cache.ids_by_size.items():
            chain = seq.chain(size, seq.num_committed // size, cache.hash_bytes)
            for i in range(seq.num_committed // size):
                pages = [_Page(chain[i + 1], g) for g in group_ids if chain[i + 1].pages and chain[i + 1].pages[g] >= 0]
                self._offered.update(dict.fromkeys(pages))
                held += [page for page in pages if seq.tables[page.group_id][i] >= 0]  # those that its windows have left may leave first
        self._together.append(held)
        while len(self._offered) > MAX_OFFERED:
            self._offered.popitem(last=False)
        self._write_some()

    def _write_some(self) -> None:
        pool = self._cache.pool
        room = max(1, int(pool.num_usable * MAX_ASIDE_SHARE)) - len(self._writes)
        while self._offered and room > 0:
            page, _ = self._offered.popitem(last=False)
            place = page.key.pages[page.group_id] if page.key.pages else -1
            if place < 0:  # evicted since
                continue
            pool.set_aside([place])
            future = _submit(self._writer, self._survived, self._disk.write, page, place)
            self._writes[future] = place
            future.add_done_callback(lambda _: self._news.set())
            room -= 1
        if not self._offered and not self._writes:
            for pages in self._together:  # written heads first, they would leave heads first, the disk and the pool
                self._disk.touch([page.content_id for page in pages])
                pool.touch(page.key.pages[page.group_id] for page in reversed(pages) if page.key.pages)
            self._together.clear()

    # -- between steps --------------------------------------------------------------------------------------------------------------------

    def poll(self) -> None:
        if not self._news.is_set():
            return
        self._news.clear()
        for arrival in [arrival for arrival, fetch in self._fetches.items() if fetch.future.done()]:
            self._arrived(arrival)
        done = [future for future in self._writes if future.done()]
        self._cache.pool.put_back([self._writes[future] for future in done])
        for future in done:
            del self._writes[future]
        self._write_some()

    def wait(self) -> None:
        if self.busy:
            self._news.wait(WAIT_S)

    def drain(self) -> None:
        self._offered.clear()
        while self.busy:
            self.wait()
            self.poll()

    def close(self) -> None:
        """Store what has been offered, then end the threads."""
        while self.busy or self._offered:
            self._write_some()
            self.wait()
            self.poll()
        self._reader.shutdown()
        self._writer.shutdown()
        self._disk.close()

    def stats(self) -> dict[str, int]:
        disk = self._disk.stats()
        moved = {"num_fetched_pages": self.num_fetched_pages, "num_stored_pages": disk.pop("writes")}
        return {**moved, **{f"num_disk_{name}": count for name, count in disk.items()}}
