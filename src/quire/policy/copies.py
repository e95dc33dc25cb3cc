"""Copies of parts of pages that a step must make before its forward, and who holds their sources until then."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

from quire.policy.pages import PagePool


class PageCopy(NamedTuple):
    """Copy the first `num_tokens` tokens of page `source` of a group to page `target` before the step. The source is held until `done`."""

    source: int
    target: int
    group_id: int
    num_tokens: int


class Copies:
    """Those asked for and not taken yet, and those of the step that runs."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._asked: list[PageCopy] = []
        self._in_step: list[PageCopy] = []

    def ask(self, source: int, target: int, group_id: int, num_tokens: int) -> None:
        """The source is held for it already."""
        self._asked.append(PageCopy(source, target, group_id, num_tokens))

    def take(self) -> tuple[PageCopy, ...]:
        """The copies asked for since the last call; their sources stay held until `done` is called with them."""
        taken, self._asked = self._asked, []
        self._in_step += taken
        return tuple(taken)

    def done(self, copies: Seq[PageCopy]) -> None:
        """The copies were made, or will never be: let their sources go."""
        for copy in copies:
            self._in_step.remove(copy)
        self._pool.release([copy.source for copy in copies])

    def cancel(self, tables: Seq[Seq[int]]) -> bool:
        """Copies asked for these tables and not taken yet are void: whether there were any."""
        void = [copy for copy in self._asked if any(copy.target in table for table in tables)]
        self._asked = [copy for copy in self._asked if copy not in void]
        self._pool.release([copy.source for copy in void])
        return bool(void)

    def sources(self, *, in_step: bool = False) -> list[int]:
        """The pages held to be copied from; with `in_step` only those of the step that runs."""
        return [copy.source for copy in (self._in_step if in_step else self._asked + self._in_step)]
