"""The prefix index: which page holds the keys and values of which tokens after which prefix.

A page's identity is a chained hash of (parent, token ids), as in vLLM and ExLlama; unlike theirs, tokens are compared on every hit, all the way
up, so a collision is a miss and never a wrong answer. Comparing the whole chain costs one page a lookup, because a chain that has matched once
is replaced by the interned one and the walk up stops at the first identical parent.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence

from quire.errors import IntegrityError

Hash = Callable[[bytes], bytes]
MAX_CHILDREN_SCANNED = 8  # bounds admission: never linear in the cache


def blake2b_128(data: bytes) -> bytes:
    """The default hash."""
    return hashlib.blake2b(data, digest_size=16).digest()


class PrefixKey:
    """The contents of one page: its token ids (packed int32) after everything in `parent`."""

    __slots__ = ("digest", "parent", "tokens")

    def __init__(self, parent: PrefixKey | None, tokens: bytes, hash_bytes: Hash) -> None:
        self.parent, self.tokens = parent, tokens
        self.digest = hash_bytes((parent.digest if parent is not None else b"") + tokens)

    def same(self, other: PrefixKey) -> bool:
        """Whether both stand for the same tokens after the same tokens, whatever their digests say."""
        a: PrefixKey | None = self
        b: PrefixKey | None = other
        while a is not None and b is not None:
            if a is b:
                return True
            if a.tokens != b.tokens:
                return False
            a, b = a.parent, b.parent
        return a is b


def pack(tokens: Sequence[int]) -> bytes:
    """Token ids as the bytes a key is made of."""
    return array("i", tokens).tobytes()


class PrefixIndex:
    """Maps (group, key) to a page and back, and a key to the pages that continue it. One page a key, one key a page."""

    def __init__(self) -> None:
        self._pages: dict[tuple[int, bytes], int] = {}
        self._keys: dict[int, tuple[int, PrefixKey]] = {}
        self._children: dict[tuple[int, bytes], dict[int, None]] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, page_id: int) -> bool:
        return page_id in self._keys

    def find(self, group_id: int, key: PrefixKey) -> int | None:
        """The page that holds exactly `key` in this group, or None."""
        page_id = self._pages.get((group_id, key.digest))
        if page_id is None or not self._keys[page_id][1].same(key):
            return None
        return page_id

    def interned(self, page_id: int) -> PrefixKey:
        """The key under which the page was inserted."""
        return self._keys[page_id][1]

    def insert(self, group_id: int, key: PrefixKey, page_id: int) -> None:
        """Index a page. On a hash collision with other tokens the page stays unindexed: one key, one page."""
        if (group_id, key.digest) in self._pages or page_id in self._keys:
            return
        self._pages[group_id, key.digest] = page_id
        self._keys[page_id] = (group_id, key)
        if key.parent is not None:
            self._children.setdefault((group_id, key.parent.digest), {})[page_id] = None

    def forget(self, page_id: int) -> None:
        """The page's contents are gone."""
        entry = self._keys.pop(page_id, None)
        if entry is None:
            return
        group_id, key = entry
        del self._pages[group_id, key.digest]
        if key.parent is not None:
            siblings = self._children[group_id, key.parent.digest]
            del siblings[page_id]
            if not siblings:
                del self._children[group_id, key.parent.digest]

    def longest_start(self, group_id: int, parent: PrefixKey, tokens: bytes) -> tuple[int, int]:
        """(page, n): a page after `parent` whose first n tokens are the first n of `tokens`, n as large as found; (-1, 0) for none.

        Looks at the MAX_CHILDREN_SCANNED most recently indexed continuations.
        """
        best = (-1, 0)
        siblings = self._children.get((group_id, parent.digest), {})
        for _, page_id in zip(range(MAX_CHILDREN_SCANNED), reversed(siblings), strict=False):
            key = self._keys[page_id][1]
            num = _common_tokens(key.tokens, tokens)
            if num > best[1] and key.parent is not None and key.parent.same(parent):
                best = (page_id, num)
        return best

    def check_integrity(self) -> None:
        """Raise IntegrityError unless both maps and the children agree."""
        if len(self._pages) != len(self._keys):
            raise IntegrityError(f"{len(self._pages)} keys for {len(self._keys)} pages")
        for page_id, (group_id, key) in self._keys.items():
            if self._pages.get((group_id, key.digest)) != page_id:
                raise IntegrityError(f"page {page_id} is not where its key leads")
            if key.parent is not None and page_id not in self._children[group_id, key.parent.digest]:
                raise IntegrityError(f"page {page_id} is not among its parent's continuations")
        if sum(map(len, self._children.values())) > len(self._keys):
            raise IntegrityError("a continuation that is not indexed")


def _common_tokens(a: bytes, b: bytes) -> int:
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size // 4
    low, high = 0, size // 4  # the first `low` tokens agree, the first `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        if a[: 4 * middle] == b[: 4 * middle]:
            low = middle
        else:
            high = middle
    return low
