"""Pinned prefixes: pages that stay until they are unpinned or their time is up, within a bound that leaves room for everybody else."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Set
from dataclasses import dataclass
from time import monotonic

from quire.errors import InvalidRequestError
from quire.policy.cache import PageCache
from quire.policy.sequence import Sequence

MAX_PINNED_SHARE = 0.5  # of the pool


@dataclass(frozen=True, slots=True)
class Pin:
    """One pinned prefix of `num_tokens` tokens. `expires_s` is on the clock of `time.monotonic`, None for never."""

    pin_id: int
    namespace: str
    num_tokens: int
    num_pages: int
    expires_s: float | None


class Pins:
    """All pins over one cache."""

    def __init__(self, cache: PageCache, *, clock: Callable[[], float] = monotonic) -> None:
        self._cache, self._clock = cache, clock
        self._names = itertools.count(1)
        self._pins: dict[int, tuple[Pin, list[int]]] = {}
        self._holders: Counter[int] = Counter()

    @property
    def num_pages(self) -> int:
        """Distinct pages that are pinned. May be read on any thread."""
        return len(self._holders)

    @property
    def pages(self) -> Set[int]:
        """The pages that are pinned."""
        return self._holders.keys()

    @property
    def left_s(self) -> float:
        """Seconds until the first of them has had its time, infinity where none will."""
        return min((pin.expires_s for pin, _ in self._pins.values() if pin.expires_s is not None), default=math.inf) - self._clock()

    def pin(self, seq: Sequence, ttl_s: float | None, num_pages_kept_free: int) -> Pin | None:
        """Pin all whole pages of a sequence's prompt, and the last part of one; None if the cache does not hold them now.

        Raises:
            InvalidRequestError: nothing of so short a prompt is ever cached, more would be pinned than may be, or fewer pages left than
                `num_pages_kept_free`.
        """
        self.expire()
        pages, num_tokens = self._find(seq)
        unit = self._cache.unit
        kept = seq.num_prompt if self._cache.keeps_parts else seq.num_prompt - seq.num_prompt % unit
        if not kept:
            raise InvalidRequestError("prompt", f"{seq.num_prompt} tokens", f"at least {unit}, a page: this model's cache keeps no part of one")
        if num_tokens < kept:
            return None
        pool = self._cache.pool
        num_pinned = len(self._holders.keys() | set(pages))
        limit = min(int(pool.num_usable * MAX_PINNED_SHARE), pool.num_usable - num_pages_kept_free)
        if num_pinned > limit:
            raise InvalidRequestError("prompt", f"{len(pages)} pages", f"such that at most {max(0, limit)} pages are pinned in all, not {num_pinned}")
        expires_s = None if ttl_s is None else self._clock() + ttl_s
        pin = Pin(next(self._names), seq.namespace, num_tokens, len(pages), expires_s)
        pool.set_aside(pages)
        self._holders.update(pages)
        self._pins[pin.pin_id] = (pin, pages)
        return pin

    def unpin(self, pin_id: int) -> None:
        """Let a pin's pages go; they stay cached.

        Raises:
            InvalidRequestError: there is no such pin, or no more.
        """
        self.expire()
        if isinstance(pin_id, bool) or not isinstance(pin_id, int) or pin_id not in self._pins:
            raise InvalidRequestError("pin", pin_id, "a pin that has been neither unpinned nor expired")
        self._drop(pin_id)

    def expire(self) -> None:
        """Unpin what has had its time."""
        now = self._clock()
        for pin in [pin for pin, _ in self._pins.values() if pin.expires_s is not None and pin.expires_s <= now]:
            self._drop(pin.pin_id)

    def clear(self) -> None:
        """Unpin everything."""
        for pin_id in list(self._pins):
            self._drop(pin_id)

    def all(self) -> list[Pin]:
        """The pins there are, oldest first."""
        self.expire()
        return [pin for pin, _ in self._pins.values()]

    def _drop(self, pin_id: int) -> None:
        _, pages = self._pins.pop(pin_id)
        self._holders -= Counter(pages)
        self._cache.pool.put_back(pages)

    def _find(self, seq: Sequence) -> tuple[list[int], int]:
        """(pages, tails first; number of tokens): what the cache holds of the prompt and a sequence that continues it would hit."""
        cache = self._cache
        found, length = cache.finder.longest(seq, seq.num_prompt)
        pages, num_tokens = cache.part(seq, length, seq.num_prompt)
        places = []
        repeat = min(length, seq.num_prompt - 1)  # where the very same prompt hits; another that continues it hits at its end
        for group, table in zip(cache.groups, found, strict=True):
            first, end = group.first_kept(repeat, cache.unit), length // group.page_size
            places += [(i * group.page_size, table[i]) for i in range(first, end)]
        if any(page_id < 0 for _, page_id in places):
            return [], -1
        return pages + [page_id for _, page_id in sorted(places, reverse=True)], length + num_tokens
