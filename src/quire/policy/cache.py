"""What the scheduler asks of the cache: hits, room to grow, commits, releases. Pages of all groups come from one pool.

    sequence of 11 tokens, B = 4, window 4          full group     [ 17 |  3 | 40 ]
                                                    sliding group  [ -1 |  9 | 12 ]     page 0 left the window: back in the pool
    num_committed = 11                                                    ^ partial

Nothing here is computed or copied; a hit that ends inside a page is returned as a copy for the engine to make before the step's forward.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

from quire.errors import IntegrityError
from quire.policy.groups import Group
from quire.policy.pages import PagePool
from quire.policy.prefix import Hash, PrefixIndex, PrefixKey, blake2b_128, pack
from quire.policy.sequence import Sequence


class Copy(NamedTuple):
    """Copy page `source` to page `target` before the step. The source is held until `PageCache.copied`."""

    source: int
    target: int


class PageCache:
    """Page tables of all open sequences, the pool under them and the prefix index over them."""

    def __init__(self, groups: Seq[Group], num_pages: int, *, sharing: bool = True, identity: bytes = b"", hash_bytes: Hash = blake2b_128) -> None:
        self.groups = tuple(groups)
        self.index = PrefixIndex()
        self.pool = PagePool(num_pages, self.index.forget)
        self.sharing = sharing
        self.hash_bytes = hash_bytes
        self.num_cached_tokens = 0
        self._root = PrefixKey(None, identity, hash_bytes)
        self._open: dict[int, Sequence] = {}
        self._copies: list[Copy] = []
        self._one_page_size = len({g.page_size for g in self.groups}) == 1
        self._full = [g for g in self.groups if not g.window and not g.chunk]
        # A hit ends where a page of every group ends: with several page sizes, at a multiple of the largest.
        self._unit = max(g.page_size for g in self.groups)

    @property
    def root(self) -> PrefixKey:
        """The key every chain starts from; it stands for all that changes values: model, dtype, codec."""
        return self._root

    def pages_to_finish(self, num_tokens: int) -> int:
        """The most pages a sequence of `num_tokens` may need at once, alone in the pool and at any chunking."""
        total = 0
        for group in self.groups:
            pages = -(-num_tokens // group.page_size)
            reach = group.window or group.chunk
            # What the window holds before a step, and what it holds after one that moved it wholly.
            total += min(pages, 2 * (-(-reach // group.page_size) + 1)) if reach else pages
        return total

    # -- hits -----------------------------------------------------------------------------------------------------------------------------

    def match(self, seq: Sequence, *, partial: bool = True) -> None:
        """Give a sequence that holds nothing the pages of its longest cached prefix, all but its last token at most.

        Sets `num_committed`. With `partial`, also the part of a page that starts with its next tokens, as a copy.
        """
        seq.clear_tables(len(self.groups))
        self._open[seq.arrival] = seq
        if not self.sharing:
            return
        limit = seq.num_known - 1
        found: list[list[int]] = [[]] * len(self.groups)
        length = limit - limit % self._unit
        for group in self._full + [g for g in self.groups if g not in self._full]:
            found[group.group_id] = self._present(seq, group, length)
            if group in self._full:
                length = min(length, len(found[group.group_id]) * group.page_size)
        length -= length % self._unit
        length = self._longest_covered(found, length)
        for group in self.groups:
            first, end = group.first_visible(length) // group.page_size, length // group.page_size
            table = seq.tables[group.group_id]
            table.extend([-1] * first)
            table.extend(found[group.group_id][first:end])
            for page_id in table[first:]:
                self.pool.retain(page_id)
            seq.first_page[group.group_id] = first
            seq.num_pages += end - first
        seq.num_committed = length
        if partial and self._one_page_size:
            self._match_part(seq, limit)
        self._set_marks(seq)

    def _present(self, seq: Sequence, group: Group, length: int) -> list[int]:
        """Pages of the first `length` tokens: of a full group up to the first miss, of another with -1 for each miss."""
        size = group.page_size
        chain = seq.chain(size, length // size, self.hash_bytes)
        pages: list[int] = []
        for i in range(length // size):
            page_id = self.index.find(group.group_id, chain[i + 1])
            if page_id is None:
                if group in self._full:
                    break
                pages.append(-1)
            else:
                seq.intern(size, i, self.index.interned(page_id))
                pages.append(page_id)
        return pages

    def _longest_covered(self, found: list[list[int]], length: int) -> int:
        """The longest hit of at most `length` tokens for which every group has all pages that the next query can see.

        Linear in the pages: a miss rules out every length that still sees it, and nothing right of it is looked at again.
        """
        settled = False
        while length and not settled:
            settled = True
            for group in self.groups:
                pages, size = found[group.group_id], group.page_size
                for i in range(length // size - 1, group.first_visible(length) // size - 1, -1):
                    if pages[i] < 0:
                        length, settled = i * size - i * size % self._unit, False
                        break
        return length

    def _match_part(self, seq: Sequence, limit: int) -> None:
        size, start = self.groups[0].page_size, seq.num_committed
        rest = pack(seq.tokens[start : min(start + size, limit)])
        if not rest:
            return
        parent = seq.chain(size, start // size, self.hash_bytes)[start // size]
        starts = [self.index.longest_start(g.group_id, parent, rest) for g in self.groups]
        num_tokens = min(num for _, num in starts)
        if num_tokens == 0:
            return
        for source, _ in starts:
            self.pool.retain(source)
        if self.pool.num_available < len(self.groups):
            for source, _ in starts:
                self._let_go(source)
            return
        for group, (source, _) in zip(self.groups, starts, strict=True):
            target = self.pool.take()
            seq.tables[group.group_id].append(target)
            self._copies.append(Copy(source, target))
        seq.num_pages += len(self.groups)
        seq.num_committed += num_tokens

    def take_copies(self) -> tuple[Copy, ...]:
        """The copies asked for since the last call; their sources stay held until `copied` is called with them."""
        copies, self._copies = tuple(self._copies), []
        return copies

    def copied(self, copies: Seq[Copy]) -> None:
        """The copies were made, or will never be: let their sources go."""
        for copy in copies:
            self._let_go(copy.source)

    # -- growth and commit ----------------------------------------------------------------------------------------------------------------

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Room for the next `num_tokens` tokens, or False with nothing taken."""
        end = seq.num_committed + num_tokens
        if end <= seq.capacity:
            return True
        needs = [self._need(seq, group, end) for group in self.groups]
        spare = self.pool.num_available - sum(end_page - first for _, first, end_page in needs)
        if spare < 0:
            return False
        # Pages the window will have left by the end of this very step are kept only for later hits, and only from plenty.
        optional = spare // 2 if self.sharing else 0
        for table, (have, first, end_page) in zip(seq.tables, needs, strict=True):
            keep = min(optional, first - have)
            optional -= keep
            table.extend([-1] * (first - have - keep))
            table.extend([self.pool.take() for _ in range(keep + end_page - first)])
            seq.num_pages += keep + end_page - first
        self._set_marks(seq)
        return True

    def pages_wanted(self, seq: Sequence, end: int) -> int:
        """How many more pages `end` committed tokens must have."""
        needs = [self._need(seq, group, end) for group in self.groups]
        return sum(end_page - first for _, first, end_page in needs)

    @staticmethod
    def _need(seq: Sequence, group: Group, end: int) -> tuple[int, int, int]:
        """(entries there, first entry a later query can see, entries wanted) for `end` committed tokens."""
        have, want = len(seq.tables[group.group_id]), -(-end // group.page_size)
        want = max(have, want)
        return have, min(max(have, group.first_visible(end) // group.page_size), want), want

    def commit(self, seq: Sequence, num_tokens: int) -> None:
        """The next `num_tokens` tokens are in the cache: index complete pages, merge equal ones, give back what left a window."""
        before = seq.num_committed
        seq.num_committed = after = before + num_tokens
        if after < seq.next_event:
            return
        for group in self.groups:
            size, table = group.page_size, seq.tables[group.group_id]
            if self.sharing:
                for i in range(before // size, after // size):
                    if table[i] >= 0:
                        table[i] = self._complete(seq, group, i, table[i])
            first = group.first_visible(after) // size
            for i in range(seq.first_page[group.group_id], min(first, len(table))):
                if table[i] >= 0:
                    # A page in the middle of a sequence is hit only by that very prefix cut there; the prompt's end is hit by the next turn.
                    near_end = (i + 1) * size > seq.num_prompt - (group.window or group.chunk) - size and i * size < seq.num_prompt
                    self._let_go(table[i], cold=not near_end)
                    table[i] = -1
                    seq.num_pages -= 1
            seq.first_page[group.group_id] = first
        self._set_marks(seq)

    def _complete(self, seq: Sequence, group: Group, i: int, page_id: int) -> int:
        """Index page i, or, where another page holds the same tokens already, let ours go and take that one."""
        key = seq.chain(group.page_size, i + 1, self.hash_bytes)[i + 1]
        other = self.index.find(group.group_id, key)
        if other is None:
            self.index.insert(group.group_id, key, page_id)
            return page_id
        if other != page_id:
            self.pool.retain(other)
            self._let_go(page_id)
        seq.intern(group.page_size, i, self.index.interned(other))
        return other

    def _set_marks(self, seq: Sequence) -> None:
        seq.peak_pages = max(seq.peak_pages, seq.num_pages)
        seq.capacity = min(len(table) * group.page_size for group, table in zip(self.groups, seq.tables, strict=True))
        seq.next_event = min(_next_event(group, seq.num_committed) for group in self.groups)

    # -- the end --------------------------------------------------------------------------------------------------------------------------

    def release(self, seq: Sequence, *, keep: bool = True) -> None:
        """Let all pages of a sequence go, tails first. With `keep`, complete pages and the last part of one stay cached."""
        if self._open.pop(seq.arrival, None) is None:
            return
        self._cancel_copies(seq)
        if keep and self.sharing and self._one_page_size:
            self._index_part(seq)
        for page_index in range(max(map(len, seq.tables)) - 1, -1, -1):
            for table in seq.tables:
                if page_index < len(table) and table[page_index] >= 0:
                    if not keep and self.pool.references(table[page_index]) == 1:
                        self.index.forget(table[page_index])
                    self._let_go(table[page_index])
        seq.clear_tables(len(self.groups))

    def _cancel_copies(self, seq: Sequence) -> None:
        """Copies asked for it and not taken yet are void; its last page then holds nothing and must not be indexed."""
        targets = {table[-1] for table in seq.tables if table}
        void = [copy for copy in self._copies if copy.target in targets]
        if void:
            self._copies = [copy for copy in self._copies if copy.target not in targets]
            self.copied(void)
            seq.num_committed -= seq.num_committed % self.groups[0].page_size

    def _index_part(self, seq: Sequence) -> None:
        """Index the last, incomplete page under the tokens it has, so that a continuation can copy them."""
        size = self.groups[0].page_size
        full, part = divmod(seq.num_committed, size)
        if not part:
            return
        key = PrefixKey(seq.chain(size, full, self.hash_bytes)[full], pack(seq.tokens[seq.num_committed - part : seq.num_committed]), self.hash_bytes)
        for group, table in zip(self.groups, seq.tables, strict=True):
            if table[full] >= 0 and self.pool.references(table[full]) == 1:
                self.index.insert(group.group_id, key, table[full])

    def _let_go(self, page_id: int, *, cold: bool = False) -> None:
        self.pool.release(page_id, cached=page_id in self.index, cold=cold)

    def reset(self) -> None:
        """Forget every cached page: what the model would compute has changed. No sequence may be open."""
        assert not self._open, "reset with open sequences would let old values be indexed later"
        self.pool.drop_cached()

    def check_integrity(self) -> None:
        """Raise IntegrityError if any invariant of the pool, the index or a table does not hold."""
        holders = [0] * self.pool.num_pages
        for seq in self._open.values():
            if seq.num_committed > seq.capacity or seq.num_committed > seq.num_known:
                raise IntegrityError(f"sequence {seq.arrival} has {seq.num_committed} tokens committed, room for {seq.capacity}, {seq.num_known} known")
            pages = [page_id for table in seq.tables for page_id in table if page_id >= 0]
            if len(pages) != seq.num_pages:
                raise IntegrityError(f"sequence {seq.arrival} counts {seq.num_pages} pages and has {len(pages)}")
            for page_id in pages:
                holders[page_id] += 1
            for group, table in zip(self.groups, seq.tables, strict=True):
                first, end = group.first_visible(seq.num_committed) // group.page_size, -(-seq.num_committed // group.page_size)
                if -1 in table[first:end]:
                    raise IntegrityError(f"sequence {seq.arrival} has lost a page its window still sees, in group {group.group_id}")
        for copy in self._copies:
            holders[copy.source] += 1
        self.index.check_integrity()
        self.pool.check_integrity(holders)
        if any(page_id not in self.index for page_id in self.pool.cached_pages()):
            raise IntegrityError("a cached page is not in the prefix index")


def _next_event(group: Group, committed: int) -> int:
    """The next number of committed tokens at which a page of the group is complete or leaves what may be seen."""
    complete = (committed // group.page_size + 1) * group.page_size
    if group.window:
        return min(complete, (group.first_visible(committed) // group.page_size + 1) * group.page_size + group.window - 1)
    return min(complete, (committed // group.chunk + 1) * group.chunk) if group.chunk else complete
