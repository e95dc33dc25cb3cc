"""Whose pages may be hit: every namespace has a root of its own, so that equal tokens in two of them are different keys.

The operator may declare prefixes that all namespaces share; their pages lie under one more root. Where the shared part of a sequence ends, a
bridge key leads to its own namespace, so that what follows is private again:

    shared root <- page 0 <- page 1 <- bridge of "a" <- page 2 <- ...
                                    <- bridge of "b" <- page 2 <- ...
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Tokens

from quire.policy.prefix import Hash, PrefixKey

MAX_ROOTS = 64  # kept to be compared with; a namespace that comes back gets an equal root
MAX_OTHERS = 8  # looked at to explain a miss
MAX_SHARED = 256


def lies_in(namespace: str, whole: str) -> bool:
    """Whether a namespace is `whole`, or a part of it: one whose name begins with that of `whole` and a slash."""
    return namespace == whole or namespace.startswith(f"{whole}/")


class Namespaces:
    """Roots of the prefix index. `identity` stands for all that changes values; a shared prefix ends at a multiple of `unit` tokens."""

    def __init__(self, identity: bytes, unit: int, hash_bytes: Hash) -> None:
        self._identity, self._unit, self._hash_bytes = identity, unit, hash_bytes
        self._roots: OrderedDict[str, PrefixKey] = OrderedDict()
        self._shared: list[tuple[int, ...]] = []
        self.shared_root = self._make(b"shared")

    def root(self, namespace: str) -> PrefixKey:
        """The root of a namespace."""
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = self._make(b"namespace " + namespace.encode())
            if len(self._roots) > MAX_ROOTS:
                self._roots.popitem(last=False)
        else:
            self._roots.move_to_end(namespace)
        return root

    def own_root(self, name: str) -> PrefixKey:
        """A root for one request alone, whose name no other has had."""
        return self._make(name.encode())

    def share(self, tokens: Tokens[int]) -> int:
        """Declare a prefix that all namespaces share; returns how many of its tokens, a multiple of `unit`. The oldest of too many is dropped."""
        prefix = tuple(tokens[: len(tokens) - len(tokens) % self._unit])
        if prefix and prefix not in self._shared:
            self._shared = [*self._shared, prefix][-MAX_SHARED:]
        return len(prefix)

    def shared_part(self, tokens: Tokens[int]) -> tuple[PrefixKey, int] | None:
        """(root, n): the first n tokens, a multiple of `unit`, lie in the region under the shared root; None if none do."""
        num_shared = max((self._common(prefix, tokens) for prefix in self._shared), default=0)
        return (self.shared_root, num_shared) if num_shared else None

    def is_shared(self, tokens: Tokens[int]) -> bool:
        """Whether all of these tokens lie in the region that all namespaces share."""
        part = self.shared_part(tokens)
        return part is not None and part[1] == len(tokens)

    def _common(self, prefix: tuple[int, ...], tokens: Tokens[int]) -> int:
        unit, end = self._unit, min(len(prefix), len(tokens))
        length = 0
        while length + unit <= end and prefix[length : length + unit] == tuple(tokens[length : length + unit]):
            length += unit
        return length

    def others(self, root: PrefixKey) -> list[PrefixKey]:
        """Roots of the namespaces seen last, without the given one."""
        return [other for other in reversed(self._roots.values()) if other is not root][:MAX_OTHERS]

    def _make(self, name: bytes) -> PrefixKey:
        return PrefixKey(None, self._identity + b"/" + name, self._hash_bytes)
