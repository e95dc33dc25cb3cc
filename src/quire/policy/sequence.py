"""One growing list of tokens and the pages that hold what has been computed of it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Tokens
from typing import NamedTuple

from quire.policy.drafts import Drafter
from quire.policy.prefix import Hash, PrefixKey, pack


class Rank(NamedTuple):
    """The order in which sequences start, and in reverse that in which they give way; a lower rank is better.

    `order` is minus the priority, `tag` the fair queue's virtual time (`policy/fairness.py`), `arrival` breaks ties.
    """

    order: int
    tag: int
    arrival: int


class Sequence:
    """What the policy knows of a sequence.

    Attributes:
        arrival: its name. rank: its order among others. waits_for: why it has not started.
        tokens: all in hand; the first `num_prompt` are its prompt, the first `num_committed` are in the cache.
        tables: `tables[g][j]` is the page of group g for positions [j * B, (j + 1) * B), -1 where there is none. `first_page[g]`: those before it
            have left the window. `num_pages` of them are pages, `peak_pages` the most there were, and `capacity` tokens have room in them.
        num_hit: tokens that it found in whole cached pages when it last started.
        num_indexed: tokens whose complete pages others can find. next_tidy: until it has so many tokens in the cache, a commit only counts.
        num_at_most: tokens it may come to have in the cache. pages_at_most: pages it may need to finish, alone.
        root, shared_root, num_shared: where its chain of prefix keys begins; its first `num_shared` tokens, which all namespaces share, lie under
            `shared_root`, what follows under `root`. own_root: nobody but its sisters has its root, so its pages are forgotten with the last of them.
        chains, bridges: of each page size, its keys made so far, and the one that leads from the shared part to its own (see namespaces.py).
        scores: the logprobs of its prompt's tokens are wanted. pooling: so are the final hidden states of its prompt, of all tokens ("mean") or of
            the last one ("last"). drafter: guesses its next tokens.
        asked_below: tokens it hit when the tier below was last asked for more; it is asked again when they have become fewer.
    """

    __slots__ = (
        "arrival",
        "asked_below",
        "bridges",
        "capacity",
        "chains",
        "drafter",
        "first_page",
        "namespace",
        "next_tidy",
        "num_at_most",
        "num_committed",
        "num_hit",
        "num_indexed",
        "num_pages",
        "num_preemptions",
        "num_prompt",
        "num_shared",
        "own_root",
        "pages_at_most",
        "peak_pages",
        "pooling",
        "rank",
        "root",
        "scores",
        "shared_root",
        "tables",
        "tokens",
        "waits_for",
    )

    def __init__(
        self,
        arrival: int,
        tokens: Tokens[int],
        root: PrefixKey,
        *,
        namespace: str = "",
        own_root: bool = False,
        shared: tuple[PrefixKey, int] | None = None,
        scores: bool = False,
        pooling: str | None = None,
    ) -> None:
        self.arrival = arrival
        self.rank = Rank(0, 0, arrival)
        self.tokens = list(tokens)
        self.num_prompt = len(self.tokens)
        self.root, self.namespace, self.own_root = root, namespace, own_root
        self.shared_root, self.num_shared = shared or (root, 0)
        self.num_committed = 0
        self.num_preemptions = 0
        self.peak_pages = self.pages_at_most = self.num_at_most = 0
        self.drafter: Drafter | None = None
        self.scores, self.pooling = scores, pooling
        self.waits_for = ""
        self.asked_below = self.num_prompt
        self.chains: dict[int, list[PrefixKey]] = {}
        self.bridges: dict[int, PrefixKey] = {}
        self.clear_tables(0)

    def fork(self, arrival: int) -> Sequence:
        """A sister that starts from the prompt alone; it finds the prompt's pages by its keys, which it takes over."""
        shared = (self.shared_root, self.num_shared)
        sister = Sequence(arrival, self.tokens[: self.num_prompt], self.root, namespace=self.namespace, own_root=self.own_root, shared=shared)
        sister.rank = self.rank._replace(arrival=arrival)
        sister.pages_at_most, sister.num_at_most = self.pages_at_most, self.num_at_most
        sister.chains = {size: chain[: self.num_prompt // size + 1] for size, chain in self.chains.items()}
        sister.bridges = dict(self.bridges)
        return sister

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
        """The root, and behind it the keys of its complete pages, `num_pages` of them or more: that of page j is at j + 1. Each is made once."""
        chain = self.chains.get(page_size)
        if chain is None:
            chain = self.chains[page_size] = [self.shared_root]
        for i in range(len(chain) - 1, num_pages):
            tokens = pack(self.tokens[i * page_size : (i + 1) * page_size])
            chain.append(PrefixKey(self.parent_of(page_size, i, hash_bytes), tokens, hash_bytes))
        return chain

    def parent_of(self, page_size: int, page_index: int, hash_bytes: Hash) -> PrefixKey:
        """The key that page `page_index` continues: that of the page before, or where the shared region ends, a bridge to its own namespace."""
        key = self.chain(page_size, page_index, hash_bytes)[page_index]
        if not self.num_shared or page_index * page_size != self.num_shared:
            return key
        bridge = self.bridges.get(page_size)
        if bridge is None:
            bridge = self.bridges[page_size] = PrefixKey(key, self.root.tokens, hash_bytes)
        return bridge

    def intern(self, page_size: int, page_index: int, key: PrefixKey) -> None:
        """Use the index's own key for a page, so that later comparisons stop at it."""
        chain = self.chains[page_size]
        if chain[page_index + 1] is key:
            return
        chain[page_index + 1] = key
        if self.num_shared and (page_index + 1) * page_size == self.num_shared:
            if page_size in self.bridges:
                self.bridges[page_size].parent = key
        elif page_index + 2 < len(chain):
            chain[page_index + 2].parent = key
