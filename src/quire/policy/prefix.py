"""The prefix index: which pages hold the keys and values of which tokens after which prefix.

A page's identity is a chained hash of (parent, token ids), as in vLLM and ExLlama; unlike theirs, tokens are compared on every hit, all the way
up, so a collision is a miss and never a wrong answer. Comparing the whole chain costs one page a lookup, because a chain that has matched once
is replaced by the indexed one and the walk up stops at the first identical parent. Groups with one page size share keys: one lookup finds the
pages of all of them.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from quire.errors import IntegrityError

Hash = Callable[[bytes], bytes]
MAX_CHILDREN_SCANNED = 8  # bounds admission: never linear in the cache
MAX_EVICTED_REMEMBERED = 65_536  # keys, 16 bytes of hash each, so that a miss can say why


def blake2b_128(data: bytes) -> bytes:
    """The default hash."""
    return hashlib.blake2b(data, digest_size=16).digest()


class PrefixKey:
    """The contents of one page: its token ids (packed int32) after everything in `parent`.

    `pages[g]` is the page of group g that holds them, -1 for none; empty while the key is not indexed. `content` is for the tier below.
    """

    __slots__ = ("content", "digest", "pages", "parent", "tokens")

    def __init__(self, parent: PrefixKey | None, tokens: bytes, hash_bytes: Hash) -> None:
        self.parent, self.tokens = parent, tokens
        self.digest: bytes = hash_bytes(parent.digest + tokens if parent is not None else tokens)
        self.pages: list[int] = []
        self.content: bytes | None = None

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
    return struct.pack(f"{len(tokens)}i", *tokens)


def unpack(tokens: bytes) -> tuple[int, ...]:
    """The token ids that a key is made of."""
    return struct.unpack(f"{len(tokens) // 4}i", tokens)


class PrefixIndex:
    """Maps a key to its pages and a page to its key, and a key to the keys that continue it. One key a page, one page a key and group."""

    def __init__(self) -> None:
        self._keys: dict[bytes, PrefixKey] = {}
        self._pages: dict[int, PrefixKey] = {}
        self._children: dict[bytes, dict[bytes, PrefixKey]] = {}
        self._evicted: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, page_id: int) -> bool:
        return page_id in self._pages

    def find(self, key: PrefixKey) -> PrefixKey | None:
        """The indexed key that stands for exactly what `key` does, or None."""
        found = self._keys.get(key.digest)
        return found if found is not None and found.same(key) else None

    def insert(self, key: PrefixKey, pages: list[int]) -> None:
        """Index a key that is not, with a page for each group or -1. On a hash collision with other tokens it stays unindexed.

        Pages that were indexed under a part of these tokens are so no more.
        """
        digest, parent = key.digest, key.parent
        assert parent is not None, "a root stands for no page"
        if digest in self._keys:
            return
        self.forget(pages)
        self._keys[digest] = key
        key.pages = pages
        for page_id in pages:
            if page_id >= 0:
                self._pages[page_id] = key
        siblings = self._children.get(parent.digest)
        if siblings is None:
            self._children[parent.digest] = {digest: key}
        else:
            siblings[digest] = key

    def complete(self, key: PrefixKey, group_id: int, page_id: int) -> None:
        """Give an indexed key the page it lacks in a group."""
        self.forget([page_id])
        key.pages[group_id] = page_id
        self._pages[page_id] = key

    def forget(self, page_ids: Iterable[int]) -> None:
        """The pages stand for nothing any more; a key with no page left is gone too."""
        for page_id in page_ids:
            key = self._pages.pop(page_id, None)
            if key is None:
                continue
            pages = key.pages
            pages[pages.index(page_id)] = -1
            if max(pages) < 0:
                assert key.parent is not None
                key.pages = []
                del self._keys[key.digest]
                siblings = self._children[key.parent.digest]
                del siblings[key.digest]
                if not siblings:
                    del self._children[key.parent.digest]

    def evict(self, page_ids: Iterable[int]) -> None:
        """Forget pages for want of room, and remember that their keys were known."""
        for page_id in page_ids:
            key = self._pages.get(page_id)
            if key is not None:
                self._evicted[key.digest] = None
                self.forget((page_id,))
        while len(self._evicted) > MAX_EVICTED_REMEMBERED:
            self._evicted.popitem(last=False)

    def was_evicted(self, key: PrefixKey) -> bool:
        """Whether pages of this key left for want of room, as far as is remembered."""
        return key.digest in self._evicted

    def key_of(self, page_id: int) -> PrefixKey | None:
        """The key a page is indexed under."""
        return self._pages.get(page_id)

    def indexed(self) -> dict[int, PrefixKey]:
        """The key of every page that has one, as it is now."""
        return self._pages.copy()

    def below(self, root: PrefixKey) -> list[int]:
        """The pages of every indexed key that continues this one, or a key found so; what continues one that has been evicted is not found."""
        keys = [root]
        for parent in keys:  # which grow meanwhile
            keys += [key for key in self._children.get(parent.digest, {}).values() if key.parent is not None and key.parent.same(parent)]
        return [page_id for key in keys[1:] for page_id in key.pages if page_id >= 0]

    def longest_start(self, parent: PrefixKey, tokens: bytes, *, whole: bool = False) -> tuple[list[int], int]:
        """(pages, n): a continuation of `parent` with a page in every group whose first n tokens, with `whole` all, are the first n of `tokens`.

        n is as large as found, 0 with no pages for none. Looks at the MAX_CHILDREN_SCANNED most recently indexed continuations.
        """
        pages: list[int] = []
        longest = 0
        siblings = self._children.get(parent.digest, {})
        for _, key in zip(range(MAX_CHILDREN_SCANNED), reversed(siblings.values()), strict=False):
            num = _common_tokens(key.tokens, tokens)
            if whole and 4 * num < len(key.tokens):
                continue
            if num > longest and min(key.pages) >= 0 and key.parent is not None and key.parent.same(parent):
                pages, longest = list(key.pages), num
        return pages, longest

    def goes_on(self, parent: PrefixKey, tokens: bytes) -> bool:
        """Whether one of the MAX_CHILDREN_SCANNED most recently indexed continuations of `parent` begins with `tokens`, whatever pages it has."""
        recent = zip(range(MAX_CHILDREN_SCANNED), reversed(self._children.get(parent.digest, {}).values()), strict=False)
        return any(key.tokens.startswith(tokens) and key.parent is not None and key.parent.same(parent) for _, key in recent)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless keys, pages and continuations agree."""
        for digest, key in self._keys.items():
            if key.digest != digest or not any(page_id >= 0 for page_id in key.pages):
                raise IntegrityError("a key is indexed under another digest, or has no page")
            if key.parent is None or self._children.get(key.parent.digest, {}).get(digest) is not key:
                raise IntegrityError("an indexed key is not among its parent's continuations")
            for page_id in key.pages:
                if page_id >= 0 and self._pages.get(page_id) is not key:
                    raise IntegrityError(f"page {page_id} is not where its key leads")
        if sum(page_id >= 0 for key in self._keys.values() for page_id in key.pages) != len(self._pages):
            raise IntegrityError("a page is indexed under a key that does not lead to it")
        if sum(map(len, self._children.values())) != len(self._keys):
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
