"""What callers ask of the cache itself, between two steps: look a prompt up, pin it, share it, make the pool smaller or larger, forget all."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from collections.abc import Set
from typing import Any

from quire.errors import InvalidRequestError
from quire.outputs import Explanation
from quire.policy.lookup import find, find_miss
from quire.policy.pins import Pin, Pins
from quire.policy.scheduler import Scheduler
from quire.policy.sequence import Sequence
from quire.tensors.memory import available_bytes
from quire.tensors.store import PageStore
from quire.text.tokenizer import TextTokenizer

LOOK_EVERY_S = 1.0
IDLE_LOOK_S = 5.0


class CacheKeeper:
    """One scheduler's cache and the store under it. Used on the engine's thread."""

    def __init__(self, scheduler: Scheduler, store: PageStore, tokenizer: TextTokenizer | None, reserve_bytes: int = 0) -> None:
        """`reserve_bytes`: bytes of memory that `tend` leaves to others."""
        self._scheduler, self._cache, self._store, self._tokenizer = scheduler, scheduler.cache, store, tokenizer
        self._pins = Pins(scheduler.cache)
        self._reserve_bytes, self._next_look_s = reserve_bytes, 0.0
        self._most_pages = scheduler.cache.pool.num_pages

    @property
    def num_pages_for_requests(self) -> int:
        """Pages that one request may have, at most: neither given back to the system nor pinned."""
        return self._cache.pool.num_usable - self._pins.num_pages

    @property
    def _least_pages(self) -> int:
        """Pages that the pool must keep: with fewer an open request might never end."""
        return max(len(self._cache.groups), self._scheduler.pages_at_most + self._pins.num_pages)

    @property
    def idle_s(self) -> float:
        """Seconds that an idle engine may sleep: then a pin has had its time, whose pages others may want."""
        return max(0.0, min(IDLE_LOOK_S, self._pins.left_s))

    def sequence(
        self, prompt: Seq[int], namespace: str, *, arrival: int = -1, own_root: str = "", scores: bool = False, pooling: str | None = None
    ) -> Sequence:
        """A sequence of a namespace, or under a root of its own with that name; see `Sequence`.

        What needs all of its prompt computed, `scores` and pooling of the mean, needs such a root.
        """
        assert own_root or not (scores or pooling == "mean"), "a hit would leave tokens out"
        names = self._cache.namespaces
        root, shared = (names.own_root(own_root), None) if own_root else (names.root(namespace), names.shared_part(prompt))
        return Sequence(arrival, prompt, root, namespace=namespace, own_root=bool(own_root), shared=shared, scores=scores, pooling=pooling)

    def explain(self, prompt: Seq[int], namespace: str) -> Explanation:
        """See `LLM.explain`."""
        seq = self.sequence(prompt, namespace)
        found = find(self._cache, seq)
        num_tokens = max(found.num_tokens, self._scheduler.tier.foresee(seq))
        miss = find_miss(self._cache, seq, num_tokens)
        return Explanation(
            cached_tokens=num_tokens,
            pages_needed=found.pages_needed,
            fits=found.fits,
            miss_index=miss.index if miss else None,
            miss_text=self.text_of(prompt[miss.index]) if miss else None,
            reason=miss.reason if miss else None,
        )

    def text_of(self, token_id: int) -> str | None:
        """One token's text, "" of an id that the tokenizer does not know, None without a tokenizer or where it raises."""
        try:
            return self._tokenizer.decode([token_id], False) if self._tokenizer else None
        except Exception:  # anybody's code: a receipt without this text is better than an engine that ends
            return None

    def pin(self, prompt: Seq[int], namespace: str, ttl_s: float | None) -> Pin | None:
        """See `Pins.pin`."""
        self._check_sharing("pin")
        return self._pins.pin(self.sequence(prompt, namespace), ttl_s, self._scheduler.pages_at_most)

    def unpin(self, pin_id: int) -> None:
        """See `Pins.unpin`."""
        self._pins.unpin(pin_id)

    def pins(self) -> list[Pin]:
        """The pins there are."""
        return self._pins.all()

    def pinned_pages(self) -> Set[int]:
        """The pages of all pins."""
        return self._pins.pages

    def share(self, prompt: Seq[int]) -> int:
        """See `LLM.share`."""
        self._check_sharing("share")
        return self._cache.namespaces.share(prompt)

    def _check_sharing(self, call: str) -> None:
        if not self._cache.sharing:
            raise InvalidRequestError(call, "a prompt", "left out with prefix_sharing=False: nobody could hit it")

    def resize(self, cache_bytes: int) -> int:
        """See `LLM.resize_cache`. Returns the bytes the pool has now.

        Raises:
            InvalidRequestError: more than the pool was made for, or less than what is open or pinned may need; a device that takes no page back.
        """
        if not self._store.device.takes_back:
            raise InvalidRequestError("cache_bytes", cache_bytes, f"as the pool was made: {self._store.device.where} takes no memory back from it")
        pool, page_bytes = self._cache.pool, self._store.page_bytes
        wanted = cache_bytes // page_bytes
        least = self._least_pages
        if not least <= wanted <= pool.num_pages:
            limits = f"from {least * page_bytes}, what open requests and pins may need, to {pool.num_pages * page_bytes}, what the pool was made for"
            raise InvalidRequestError("cache_bytes", cache_bytes, limits)
        self._most_pages = wanted
        if wanted > pool.num_usable:
            pool.restore(wanted - pool.num_usable)
        else:
            while pool.num_usable > wanted:
                retired = pool.retire(pool.num_usable - wanted)
                self._store.give_back(retired)
                if not retired and self._scheduler.num_running:  # all that is left is held: those of the worst rank wait
                    self._scheduler.preempt_worst()
                elif not retired:  # or on its way to the disk or from it, and comes back by itself
                    self._scheduler.tier.wait()
                    self._scheduler.tier.poll()
        return pool.num_usable * page_bytes

    def tend(self) -> None:
        """Between steps: unpin what has had its time, and now and then fit the pool to the memory that others leave.

        Under pressure pages that nobody holds go back to the system; when twice the reserve is there, some of them come into use again.
        """
        self._pins.expire()
        now = time.monotonic()
        if not self._reserve_bytes or now < self._next_look_s:
            return
        self._next_look_s = now + LOOK_EVERY_S
        pool, spare = self._cache.pool, available_bytes() - self._reserve_bytes
        if spare < 0:
            wanted = min(-(spare // self._store.page_bytes), pool.num_usable - self._least_pages)
            if wanted > 0:
                self._store.give_back(pool.retire(wanted))
        elif spare > self._reserve_bytes and pool.num_usable < self._most_pages:
            pool.restore(min(self._most_pages - pool.num_usable, (spare - self._reserve_bytes) // 2 // self._store.page_bytes))

    def reset(self) -> None:
        """Forget all cached pages and pins; what runs is computed again. For when the weights have changed."""
        self._scheduler.preempt_all()
        self._scheduler.tier.drain()
        self._pins.clear()
        self._cache.reset()

    def check_integrity(self) -> None:
        """Raise IntegrityError if an invariant of scheduler or cache does not hold."""
        self._scheduler.check_integrity()

    def stats(self) -> dict[str, Any]:
        """The state of the pool and the queue now."""
        pool, scheduler = self._cache.pool, self._scheduler
        aside = pool.num_cached_aside(self._pins.pages)  # the tier's for a moment: nobody's, or an idle engine would seem to hold them
        return {
            "num_pages": pool.num_usable,
            "num_free_pages": pool.num_free,
            "num_cached_pages": pool.num_cached + aside,
            "num_held_pages": pool.num_held - aside,
            "num_pinned_pages": self._pins.num_pages,
            "num_retired_pages": pool.num_pages - pool.num_usable,
            "num_waiting": scheduler.num_waiting,
            "num_running": scheduler.num_running,
            "num_preemptions": scheduler.num_preemptions,
            "num_cached_tokens": scheduler.num_cached_tokens,
            **scheduler.tier.stats(),
        }
