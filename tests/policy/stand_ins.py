"""What the policy's oracle has in place of a model and of a store."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from quire.tensors.device import CPU


class Prefixes:
    """Numbers token prefixes exactly: two positions have one number if and only if everything up to and including them is the same."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[Hashable, int], int] = {}

    def extend(self, numbers: list[int], tokens: Sequence[int], start: Hashable, bridge: tuple[int, bytes] | None = None) -> list[int]:
        """`numbers` continued to all of `tokens`; `start` stands for what comes before the first token. `bridge` is (place, name): what begins at
        that place is another thing under another name."""
        for i in range(len(numbers), len(tokens)):
            before: Hashable = numbers[-1] if i else start
            if bridge is not None and i == bridge[0]:
                before = (before, bridge[1])
            numbers.append(self._numbers.setdefault((before, tokens[i]), len(self._numbers) + 1))
        return numbers


class Poisoned:
    """The store as the keeper sees it: pages of one byte, which forget everything when they are given back."""

    page_bytes = 1

    device = CPU

    def __init__(self, pages: list[dict[int, tuple[int, int]]]) -> None:
        self.pages = pages

    def give_back(self, page_ids: Iterable[int]) -> None:
        for page_id in page_ids:
            self.pages[page_id] = {}
