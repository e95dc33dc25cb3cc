"""One growing list of tokens and the pages that hold what has been computed of it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Tokens

from quire.policy.prefix import Hash, PrefixKey, pack


class Sequence:
    """What the policy knows of a sequence: `tokens` in hand, the first `num_committed` of them in the cache.

    `arrival` orders sequences; a lower one is older. `chain(B)[j + 1]` is the prefix key of its page j of B tokens, `chain(B)[0]` the root.
    `tables[g][j]` is the page of group g for positions [j * B, (j + 1) * B), -1 where there is none. `capacity` is how many tokens the tables
    have room for. Complete pages of the first `num_indexed` tokens are indexed; below `next_tidy` a commit only counts. `num_hit` tokens were
    found in whole cached pages when it last started.
    """

    __slots__ = (
        "arrival",
        "capacity",
        "chains",
        "first_page",
        "next_tidy",
        "num_committed",
        "num_hit",
        "num_indexed",
        "num_pages",
        "num_preemptions",
        "num_prompt",
        "peak_pages",
        "root",
        "tables",
        "tokens",
    )

    def __init__(self, arrival: int, tokens: Tokens[int], root: PrefixKey) -> None:
        self.arrival = arrival
        self.tokens = list(tokens)
        self.num_prompt = len(self.tokens)
        self.root = root
        self.num_committed = 0
        self.num_preemptions = 0
        self.peak_pages = 0
        self.chains: dict[int, list[PrefixKey]] = {}
        self.clear_tables(0)

    def clear_tables(self, num_groups: int) -> None:
        """Hold nothing; the caller has released every page."""
        self.tables = [array("i") for _ in range(num_groups)]
        self.first_page = [0] * num_groups
        self.num_committed = self.num_hit = self.num_indexed = self.num_pages = self.capacity = self.next_tidy = 0

    @property
    def num_known(self) -> int:
        """Tokens in hand, computed or not."""
        return len(self.tokens)

    @property
    def num_remaining(self) -> int:
        """Tokens in hand that are not in the cache; 1 while decoding."""
        return len(self.tokens) - self.num_committed

    def chain(self, page_size: int, num_pages: int, hash_bytes: Hash) -> list[PrefixKey]:
        """The keys of its first `num_pages` complete pages, behind the root; made once."""
        chain = self.chains.get(page_size)
        if chain is None:
            chain = self.chains[page_size] = [self.root]
        if len(chain) <= num_pages:
            for start in range((len(chain) - 1) * page_size, num_pages * page_size, page_size):
                chain.append(PrefixKey(chain[-1], pack(self.tokens[start : start + page_size]), hash_bytes))
        return chain

    def intern(self, page_size: int, page_index: int, key: PrefixKey) -> None:
        """Use the index's own key for a page, so that later comparisons stop at it."""
        chain = self.chains[page_size]
        if chain[page_index + 1] is not key:
            chain[page_index + 1] = key
            if page_index + 2 < len(chain):
                chain[page_index + 2].parent = key
