"""API keys: kept as hashes, compared in constant time, and what a caller is known by once one has matched."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from typing import NamedTuple

from quire.errors import ConfigError
from quire.server.limits import MAX_KEY_CHARS


class Caller(NamedTuple):
    """Who asks: `namespace` says whose cached pages may be used, `key_id` is short and may be shown and logged. Both "" without keys."""

    namespace: str
    key_id: str


class KeyRing:
    """The keys of a server. The keys themselves are forgotten at once.

    Raises:
        ConfigError: an empty key, or one that is too long.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        given = list(keys)
        for key in given:
            if not 0 < len(key.strip()) <= MAX_KEY_CHARS:
                raise ConfigError(f"api_key: must have from 1 to {MAX_KEY_CHARS} characters")
        self._digests = [_digest(key.strip().encode()) for key in given]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def caller(self, authorization: bytes | None) -> Caller | None:
        """Whose `Authorization` header this is, None if nobody's. Without keys everybody is the same caller."""
        if not self._digests:
            return Caller("", "")
        scheme, _, key = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or len(key) > 4 * MAX_KEY_CHARS:
            return None
        digest = _digest(key.strip())
        # All are compared, each in constant time: how long it takes says nothing about which, or how nearly.
        matches = [hmac.compare_digest(digest, own) for own in self._digests]
        return Caller(_derived(digest, b"namespace", 16), _derived(digest, b"key id", 4)) if any(matches) else None


def salted(namespace: str, cache_salt: str | None) -> str:
    """The part of a caller's own namespace that a request's `cache_salt` names: it can never lead into another's."""
    if cache_salt is None:
        return namespace
    return f"{namespace}/{hashlib.blake2b(cache_salt.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()}"


def _digest(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=32, person=b"quire api key").digest()


def _derived(digest: bytes, person: bytes, size: int) -> str:
    return hashlib.blake2b(digest, digest_size=size, person=person).hexdigest()
