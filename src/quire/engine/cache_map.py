"""A picture of the cache between two steps: the state of every page, and which sequences go through which pages.

It is taken on the engine's thread and must be cheap there, so states are made by passes over bytes; what has changed since the last picture, and
what of it somebody may see, is worked out elsewhere.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quire.errors import InvalidRequestError
from quire.policy.cache import PageCache
from quire.policy.namespaces import lies_in
from quire.policy.pages import PIN_MARK, STATE_BITS, STATES
from quire.policy.prefix import PrefixKey, unpack

if TYPE_CHECKING:
    from quire.engine.engine import Engine  # brings torch, which a server listens without

UNMARKED = bytes(state & STATE_BITS for state in range(256))
MAX_WAITING = 64  # are shown: the queue may be long


@dataclass(frozen=True, slots=True)
class MappedSequence:
    """A sequence that runs or waits. `tables[g]` are its pages in group g, -1 where there is none; all are empty while it waits."""

    arrival: int
    request_id: str
    namespace: str
    index: int
    num_prompt: int
    num_known: int
    num_committed: int
    waits_for: str
    tables: tuple[array[int], ...]


@dataclass(frozen=True, slots=True)
class OnDisk:
    """Pages of this model and configuration in the `cache_dir`: how many lie in the pool too, and how many there alone.

    Unless `settled` the folder has changed since it was looked at.
    """

    num_also: int
    num_only: int
    settled: bool


@dataclass(frozen=True, slots=True)
class CacheMap:
    """One picture. `states[p]` is page p's place in `STATES`, with PIN_MARK where it is pinned and DISK_MARK where its content lies on disk too.

    A page is `held` by one sequence or `shared` by several; else `pinned`, or `moving` to or from the tier below; else `cached`, `free`, or
    `retired`: given back to the system. `stats` are those of `LLM.stats` at the same moment; `step_seconds` is where the time of steps went.
    `disk` is None without a `cache_dir`.
    """

    states: bytes
    sequences: tuple[MappedSequence, ...]
    stats: dict[str, Any]
    step_seconds: dict[str, float]
    disk: OnDisk | None = None

    def counts(self) -> dict[str, int]:
        """Pages of the pool in each state; every page is in one."""
        plain = self.states.translate(UNMARKED)
        return {name: plain.count(state) for state, name in enumerate(STATES)}


@dataclass(frozen=True, slots=True)
class PageContent:
    """What one page holds, as far as a namespace may know: `token_ids` are None where its content belongs to others or is not known.

    `num_holders` counts sequences, `request_ids` are those of this namespace and its parts; the tokens begin at `position` of the prompt, and
    belong to the layers of group `group_id`.
    """

    page_id: int
    state: str
    pinned: bool
    num_holders: int
    request_ids: tuple[str, ...]
    group_id: int | None = None
    position: int | None = None
    token_ids: tuple[int, ...] | None = None


def take_map(engine: Engine) -> CacheMap:
    """The picture now. On the engine's thread, between two steps."""
    return CacheMap(_states(engine), tuple(_sequences(engine)), engine.stats(), dict(engine.runner.log.seconds))


def _states(engine: Engine) -> bytes:
    return engine.scheduler.cache.pool.states(engine.keeper.pinned_pages())


def _sequences(engine: Engine) -> Iterator[MappedSequence]:
    """All that run, and the first of those that wait."""
    num_running, num_waiting = engine.scheduler.num_running, MAX_WAITING
    for state, branch in engine.branches():
        seq = branch.sequence
        if seq.num_pages:
            num_running -= 1
        else:
            num_waiting -= 1
            if num_waiting < 0:
                if not num_running:
                    return
                continue
        yield MappedSequence(
            seq.arrival,
            state.request.request_id,
            seq.namespace,
            branch.index,
            seq.num_prompt,
            seq.num_known,
            seq.num_committed,
            seq.waits_for,
            tuple(table[:] for table in seq.tables) if seq.num_pages else (),
        )


def page_content(engine: Engine, page_id: int, namespace: str) -> PageContent:
    """What a namespace may know of a page: of its own content, that of its parts and what all share the tokens, of others' only the state.

    On the engine's thread.

    Raises:
        InvalidRequestError: there is no such page.
    """
    cache = engine.scheduler.cache
    if isinstance(page_id, bool) or not isinstance(page_id, int) or not 0 <= page_id < cache.pool.num_pages:
        raise InvalidRequestError("page_id", page_id, f"an integer from 0 to {cache.pool.num_pages - 1}")
    state = _states(engine)[page_id]
    request_ids: list[str] = []
    place: tuple[int, int, tuple[int, ...]] | None = None
    for request, branch in engine.branches():
        seq = branch.sequence
        for g, table in enumerate(seq.tables):
            if lies_in(seq.namespace, namespace) and page_id in table:
                request_ids.append(request.request.request_id)
                first = table.index(page_id) * cache.groups[g].page_size
                place = g, first, tuple(seq.tokens[first : min(first + cache.groups[g].page_size, seq.num_committed)])
    key = cache.index.key_of(page_id)
    num_before = _pages_before(cache, key, namespace) if key is not None else None
    if place is None and key is not None and num_before is not None:
        group_id = key.pages.index(page_id)
        place = group_id, num_before * cache.groups[group_id].page_size, unpack(key.tokens)
    num_holders = cache.pool.references(page_id) - cache.pool.references_aside(page_id)
    return PageContent(page_id, STATES[state & STATE_BITS], bool(state & PIN_MARK), num_holders, tuple(dict.fromkeys(request_ids)), *(place or ()))


def _pages_before(cache: PageCache, key: PrefixKey, namespace: str) -> int | None:
    """How many pages come before this one, if its chain starts at a root of the namespace, leaves the shared region by a bridge of it, or ends there.

    None if it does not: then the content is others'. What lies in the shared region itself the operator has declared to be no secret.
    """
    names = cache.namespaces
    own = names.root(namespace).tokens
    part = own + b"/"
    num_pages, bridged, before = 0, False, key.tokens
    at = key.parent
    assert at is not None, "a root stands for no page"
    while at.parent is not None:
        if at.tokens == own or at.tokens.startswith(part):
            bridged = True
        else:
            num_pages += 1
        before = at.tokens + before
        at = at.parent
    if at is names.shared_root:
        return num_pages if bridged or len(before) % 4 == 0 and names.is_shared(unpack(before)) else None
    return num_pages if at.tokens == own or at.tokens.startswith(part) else None
