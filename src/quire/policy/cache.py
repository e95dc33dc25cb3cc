"""What the scheduler asks of the cache: hits, room to grow, commits, releases. Pages of all groups come from one pool.

    sequence of 11 tokens, B = 4, window 4          full group     [ 17 |  3 | 40 ]
                                                    sliding group  [ -1 |  9 | 12 ]     page 0 left the window: back in the pool
    num_committed = 11                                                    ^ partial

Nothing here is computed or copied; a hit that ends inside a page is returned as a copy for the engine to make before the step's forward.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from quire.errors import IntegrityError
from quire.policy.copies import Copies
from quire.policy.groups import Alike, Group, Need, alike
from quire.policy.hits import HitFinder
from quire.policy.namespaces import Namespaces
from quire.policy.pages import PagePool
from quire.policy.prefix import Hash, PrefixIndex, PrefixKey, blake2b_128, pack
from quire.policy.sequence import Sequence


class PageCache:
    """Page tables of all open sequences, the pool under them and the prefix index over them."""

    def __init__(self, groups: Seq[Group], num_pages: int, *, sharing: bool = True, identity: bytes = b"", hash_bytes: Hash = blake2b_128) -> None:
        self.groups = tuple(groups)
        self.index = PrefixIndex()
        self.pool = PagePool(num_pages, self.index)
        self.sharing = sharing
        self.hash_bytes = hash_bytes
        self._open: dict[int, Sequence] = {}
        self.copies = Copies(self.pool)
        self.finder = HitFinder(self.groups, self.index, hash_bytes)
        self.unit, self.ids_by_size = self.finder.unit, self.finder.ids_by_size
        # Parts of pages can be told from whole ones only where all have one size. A state is that of all its page's tokens: a part with one is hit by
        # what has all its tokens, and no more is written to its page once it can be.
        self.takes_back = not any(g.carries for g in groups)  # tokens that are in pages and turn out not to be a sequence's
        self.keeps_ends = len(self.ids_by_size) == 1
        self.keeps_parts = self.keeps_ends and self.takes_back
        self.namespaces = Namespaces(identity, self.unit, hash_bytes)
        self._alike = alike(self.groups)
        self._windowed = [groups for groups in self._alike if groups.first.kind != "full"]
        self._tidy_every = min(g.page_size for g in self.groups)

    def shares(self, seq: Sequence) -> bool:
        """Whether its pages may be hit, and it may hit pages."""
        return self.sharing or seq.own_root

    def pages_to_finish(self, num_tokens: int) -> int:
        """The most pages a sequence of `num_tokens` may need at once, alone in the pool and at any chunking."""
        return sum(group.pages_to_finish(num_tokens, self.unit) for group in self.groups)

    # -- hits -----------------------------------------------------------------------------------------------------------------------------

    def match(self, seq: Sequence, *, partial: bool = True) -> None:
        """Give a sequence that holds nothing the pages of its longest cached prefix, all but its last token at most.

        Sets `num_committed`. With `partial`, also the part of a page that starts with its next tokens, as a copy.
        """
        seq.clear_tables(len(self.groups))
        self._open[seq.arrival] = seq
        if not self.shares(seq):
            return
        limit = seq.num_known - 1
        found, length = self.finder.longest(seq, limit)
        for group, pages, table in zip(self.groups, found, seq.tables, strict=True):
            first, end = group.first_kept(length, self.unit), length // group.page_size
            hit = pages[first:end]
            self.pool.retain(hit)
            table.extend([-1] * first + hit)
            seq.first_page[group.group_id] = first
            seq.num_pages += len(hit)
        seq.num_committed = seq.num_hit = seq.num_indexed = length
        if partial:
            self._match_part(seq, limit)
        self._set_capacity(seq)

    def _match_part(self, seq: Sequence, limit: int) -> None:
        sources, num_tokens = self.part(seq, seq.num_committed, limit)
        if num_tokens == 0:
            return
        self.pool.retain(sources)
        if self.pool.num_available < len(sources):
            self.pool.release(sources)
            return
        for group_id, (source, target) in enumerate(zip(sources, self.pool.take(len(sources)), strict=True)):
            seq.tables[group_id].append(target)
            self.copies.ask(source, target, group_id, num_tokens)
        seq.num_pages += len(sources)
        seq.num_committed += num_tokens

    def fork(self, seq: Sequence, sister: Sequence) -> bool:
        """Give a sister that holds nothing all that `seq` has committed: whole pages shared, the page it is in the middle of as a copy.

        False, with nothing taken, where there is no room for the copies.
        """
        in_part = [g for g in self.groups if seq.num_committed % g.page_size]
        if self.pool.num_available < len(in_part):
            return False
        sister.clear_tables(len(self.groups))
        self._open[sister.arrival] = sister
        targets = iter(self.pool.take(len(in_part)))
        for group, table, own in zip(self.groups, seq.tables, sister.tables, strict=True):
            full, part = divmod(seq.num_committed, group.page_size)
            own.extend(table[:full])
            self.pool.retain([page_id for page_id in own if page_id >= 0])
            if part:
                own.append(next(targets))
                self.copies.ask(table[full], own[full], group.group_id, part)
                self.pool.retain([table[full]])
            sister.num_pages += sum(page_id >= 0 for page_id in own)
        sister.first_page = list(seq.first_page)
        sister.num_committed = sister.num_hit = seq.num_committed
        sister.num_indexed = seq.num_indexed
        self._set_capacity(sister)
        return True

    def part(self, seq: Sequence, start: int, limit: int) -> tuple[list[int], int]:
        """(pages, n): an indexed page of every group whose first n tokens are the sequence's own from `start`, the end of a page, on; of groups that
        carry states, all its tokens."""
        size = self.unit
        rest = pack(seq.tokens[start : min(start + size, limit)])
        if not self.keeps_ends:
            return [], 0
        return self.index.longest_start(seq.parent_of(size, start // size, self.hash_bytes), rest, whole=not self.keeps_parts)

    # -- growth and commit ----------------------------------------------------------------------------------------------------------------

    def grow(self, seq: Sequence, num_tokens: int, num_drafts: int = 0) -> bool:
        """Room for the next `num_tokens` tokens, or False with nothing taken. That the last `num_drafts` of them will stay is not sure."""
        end = seq.num_committed + num_tokens
        if end <= seq.capacity:
            return True
        needs = self._needs(seq, end, end - num_drafts)
        spare = self.pool.num_available - sum(need.num_pages for need in needs)
        if spare < 0:
            return False
        # Pages the window will have left by the end of this very step are kept only for later hits, and only from plenty.
        optional = spare // 2 if self.shares(seq) else 0
        for need in needs:
            keep = min(optional // len(need.group_ids), need.first - need.have)
            optional -= keep * len(need.group_ids)
            for g in need.group_ids:
                seq.tables[g].extend([-1] * (need.first - need.have - keep) + self.pool.take(keep + need.end - need.first))
            seq.num_pages += need.num_pages + keep * len(need.group_ids)
        self._set_capacity(seq)
        return True

    def grow_by_one(self, seqs: Seq[Sequence]) -> bool:
        """Room for one more token in each of these sequences, which have none left; False, with nothing taken, if it must be made one by one."""
        num_groups = len(self.groups)
        if not self.keeps_ends or self.unit == 1 or self.pool.num_available < len(seqs) * num_groups:
            return False
        new = iter(self.pool.take(len(seqs) * num_groups))
        for seq in seqs:
            for table, page_id in zip(seq.tables, new, strict=False):
                table.append(page_id)
            seq.num_pages += num_groups
            seq.capacity += self.unit
        return True

    def shrink(self, seq: Sequence) -> None:
        """Give back the pages behind all that it has in hand, which drafts have left that were wrong."""
        seq.peak_pages = max(seq.peak_pages, seq.num_pages)
        for group, table in zip(self.groups, seq.tables, strict=True):
            behind = table[-(-seq.num_known // group.page_size) :]
            del table[len(table) - len(behind) :]
            self.pool.release(behind)
            seq.num_pages -= len(behind)
        self._set_capacity(seq)

    def pages_wanted(self, seq: Sequence, end: int) -> int:
        """How many more pages `end` committed tokens must have."""
        return sum(need.num_pages for need in self._needs(seq, end, end))

    def _needs(self, seq: Sequence, end: int, num_sure: int) -> list[Need]:
        return [groups.need(len(seq.tables[groups.first.group_id]), end, num_sure, self.unit) for groups in self._alike]

    def commit(self, seq: Sequence, num_tokens: int) -> None:
        """The next `num_tokens` tokens are in the cache. Indexes complete pages and gives back what left a window, now or within a page."""
        seq.num_committed += num_tokens
        if seq.num_committed >= seq.next_tidy:
            self._tidy(seq)

    def _tidy(self, seq: Sequence) -> None:
        """Index its complete pages, let those go that left a window, and set when to come again.

        A prompt's pages are wanted by others at once. Sequences that decode in step would all complete a page in one step, so each of them
        comes at a place in the page of its own.
        """
        self.index_complete(seq)
        committed, every = seq.num_committed, self._tidy_every
        for groups in self._windowed:
            first = groups.first.first_kept(committed, self.unit)
            if first > seq.first_page[groups.first.group_id]:
                self._leave(seq, groups, first)
        if committed == seq.num_prompt and self.keeps_parts:
            self._index_part(seq)
        seq.next_tidy = committed + every - (committed - seq.arrival) % every if committed >= seq.num_prompt else 0

    def index_complete(self, seq: Sequence) -> None:
        """Let everybody find the complete pages that it has computed."""
        if not self.shares(seq):
            return
        for size, group_ids in self.ids_by_size.items():
            for i in range(seq.num_indexed // size, seq.num_committed // size):
                self._complete(seq, size, group_ids, i)
        seq.num_indexed = seq.num_committed

    def _complete(self, seq: Sequence, size: int, group_ids: list[int], i: int) -> None:
        """Index page i of these groups; where another page holds the same tokens already, let ours go and take that one."""
        key = seq.chain(size, i + 1, self.hash_bytes)[i + 1]
        found = self.index.find(key)
        if found is None:
            pages = [-1] * len(self.groups)
            for g in group_ids:
                pages[g] = seq.tables[g][i]
            if max(pages) >= 0:
                self.index.insert(key, pages)
            return
        for g in group_ids:
            page_id, other = seq.tables[g][i], found.pages[g]
            if page_id < 0 or page_id == other:
                continue
            if other < 0:
                self.index.complete(found, g, page_id)
            else:
                # A pin would be left with a page that nobody finds; it stays under the part it was pinned for.
                if not self.pool.references_aside(page_id):
                    self.index.forget([page_id])
                self.pool.retain([other])
                self.pool.release([page_id])
                seq.tables[g][i] = other
        seq.intern(size, i, found)

    def _leave(self, seq: Sequence, groups: Alike, first: int) -> None:
        """Give back the pages before `first`."""
        size, reach = groups.first.page_size, groups.first.window or groups.first.chunk
        seq.peak_pages = max(seq.peak_pages, seq.num_pages)
        for i in range(seq.first_page[groups.first.group_id], first):
            pages = []
            for g in groups.group_ids:
                if seq.tables[g][i] >= 0:
                    pages.append(seq.tables[g][i])
                    seq.tables[g][i] = -1
            # A page in the middle of a sequence is hit only by that very prefix cut there; the prompt's end is hit by the next turn, and where
            # a hit ended once, others will.
            warm = any(end - reach - self.unit < (i + 1) * size and i * size < end for end in (seq.num_prompt, seq.num_hit))
            self.pool.release(pages, cold=not warm)
            seq.num_pages -= len(pages)
        seq.first_page[groups.first.group_id] = first

    def _set_capacity(self, seq: Sequence) -> None:
        seq.capacity = min([len(seq.tables[group.group_id]) * group.page_size for group, _ in self._alike])

    # -- the end --------------------------------------------------------------------------------------------------------------------------

    def release(self, seq: Sequence, *, keep: bool = True) -> None:
        """Let all pages of a sequence go, tails first. With `keep`, complete pages and the last part of one stay cached."""
        if self._open.pop(seq.arrival, None) is None:
            return
        seq.peak_pages = max(seq.peak_pages, seq.num_pages)
        if self.copies.cancel(seq.tables):  # the page one was for holds nothing and must not be indexed
            self.forget_end(seq)
        if keep:
            self.index_complete(seq)
            self._index_part(seq)
        places = [(i * g.page_size, page_id) for g, table in zip(self.groups, seq.tables, strict=True) for i, page_id in enumerate(table)]
        pages = [page_id for _, page_id in sorted(places, reverse=True) if page_id >= 0]
        if not keep:
            self.index.forget(page_id for page_id in pages if self.pool.references(page_id) == 1)
        self.pool.release(pages)
        seq.clear_tables(len(self.groups))

    def forget_end(self, seq: Sequence) -> None:
        """What its last, incomplete pages hold is not sure: nobody shall find them."""
        seq.num_committed -= seq.num_committed % self.unit

    def forget(self, root: PrefixKey) -> None:
        """Nobody will have this root again: nothing is indexed under it any more, and what is cached becomes free."""
        self.pool.drop(self.index.below(root))

    def _index_part(self, seq: Sequence) -> None:
        """Index the last, incomplete page under the tokens it has, so that a continuation can copy them; its owner may go on filling it."""
        full, part = divmod(seq.num_committed, self.unit)
        if not part or not self.shares(seq) or not self.keeps_ends:
            return
        tokens = pack(seq.tokens[seq.num_committed - part : seq.num_committed])
        key = PrefixKey(seq.parent_of(self.unit, full, self.hash_bytes), tokens, self.hash_bytes)
        if self.index.find(key) is None:
            self.index.insert(key, [table[full] for table in seq.tables])

    def reset(self) -> None:
        """Forget every cached page: what the model would compute has changed. Nobody may hold a page."""
        assert not self.pool.num_held, "reset with pages held would let old values be indexed later"
        self.pool.drop(list(self.pool.cached_pages()))

    def check_integrity(self) -> None:
        """Raise IntegrityError if any invariant of the pool, the index or a table does not hold. Callable at any time."""
        holders = [self.pool.references_aside(page_id) for page_id in range(self.pool.num_pages)]
        for seq in self._open.values():
            name = f"sequence {seq.arrival}"
            if seq.num_committed > seq.capacity or seq.num_committed > seq.num_known:
                raise IntegrityError(f"{name} has {seq.num_committed} tokens committed, room for {seq.capacity}, {seq.num_known} known")
            pages = [page_id for table in seq.tables for page_id in table if page_id >= 0]
            if len(pages) != seq.num_pages:
                raise IntegrityError(f"{name} counts {seq.num_pages} pages and has {len(pages)}")
            for page_id in pages:
                holders[page_id] += 1
            for group, table in zip(self.groups, seq.tables, strict=True):
                first, end = group.first_kept(seq.num_committed, self.unit), -(-seq.num_committed // group.page_size)
                if -1 in table[first:end]:
                    raise IntegrityError(f"{name} has lost a page it may still need, in group {group.group_id}")
        for source in self.copies.sources():
            holders[source] += 1
        self.index.check_integrity()
        self.pool.check_integrity(holders)
        if any(page_id not in self.index for page_id in self.pool.cached_pages()):
            raise IntegrityError("a cached page is not in the prefix index")
