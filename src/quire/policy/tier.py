"""What lies below the pool, as the scheduler sees it, and nothing in its place."""

from __future__ import annotations

from typing import Protocol

from quire.policy.sequence import Sequence


class Tier(Protocol):
    """Where pages may be that are not in the pool."""

    @property
    def busy(self) -> bool:
        """Whether it holds pages of the pool that will come back by themselves."""
        ...

    def fetch(self, seq: Sequence) -> bool:
        """Bring what is known of a waiting sequence's prefix into the cache; True while that is under way."""
        ...

    def foresee(self, seq: Sequence) -> int:
        """How many tokens a sequence would find if `fetch` were asked for it now, 0 where that would bring nothing."""
        ...

    def offer(self, seq: Sequence) -> None:
        """A sequence is about to let its pages go; those that are complete may be stored."""
        ...

    def note_step(self, num_tokens: int, seconds: float) -> None:
        """A step computed so many tokens in so many seconds."""
        ...

    def poll(self) -> None:
        """Take note of what has been fetched and stored. Called between steps."""
        ...

    def wait(self) -> None:
        """Wait a moment for something to be fetched or stored; return at once if nothing is under way."""
        ...

    def drain(self) -> None:
        """Wait until nothing is under way; nothing that was offered is stored later."""
        ...

    def stats(self) -> dict[str, int]:
        """Counters."""
        ...


class NoTier:
    """Nothing below the pool. See `Tier`."""

    busy = False

    def fetch(self, seq: Sequence) -> bool:
        return False

    def foresee(self, seq: Sequence) -> int:
        return 0

    def offer(self, seq: Sequence) -> None:
        pass

    def note_step(self, num_tokens: int, seconds: float) -> None:
        pass

    def poll(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def drain(self) -> None:
        pass

    def stats(self) -> dict[str, int]:
        return {}
