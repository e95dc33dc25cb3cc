"""Random lives of a disk store: any order of writing, reading, asking, damage, loss of the index and restarts, beside a list."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.policy.oracle import SOAK
from tests.tensors.disk_shelf import Shelf, content_id, file_bytes


class StoreMachine(RuleBasedStateMachine):
    """Any life of a store of four pages, beside a list of what it should hold, the page used longest ago first."""

    numbers = st.integers(0, 7)

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.shelf = Shelf(self.folder, 4)
        self.held: list[int] = []

    def used(self, number: int) -> None:
        self.held = [*(other for other in self.held if other != number), number]

    @rule(number=numbers)
    def write(self, number: int) -> None:
        assert self.shelf.write(number)
        if number not in self.held:
            self.held = self.held[-3:]
        self.used(number)

    @rule(number=numbers)
    def read(self, number: int) -> None:
        assert self.shelf.read(number) == (number in self.held)
        if number in self.held:
            self.used(number)

    @rule(numbers=st.lists(numbers, max_size=4, unique=True))
    def ask(self, numbers: list[int]) -> None:
        num = next((i for i, number in enumerate(numbers) if number not in self.held), len(numbers))
        assert self.shelf.contains(*numbers) == num
        for number in reversed(numbers[:num]):
            self.used(number)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def flip_a_bit(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.held))
        path = self.shelf.file(number)
        flip(path, data.draw(st.integers(0, path.stat().st_size * 8 - 1)))
        self.lose(number)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), size=st.integers(0, file_bytes(64) - 1))
    def cut_off(self, data: st.DataObject, size: int) -> None:
        number = data.draw(st.sampled_from(self.held))
        os.truncate(self.shelf.file(number), size)
        self.lose(number)

    def lose(self, number: int) -> None:
        before = self.shelf.count("damaged")
        assert not self.shelf.read(number) and self.shelf.count("damaged") == before + 1
        self.held.remove(number)

    @rule()
    def reopen(self) -> None:
        self.shelf.close()
        self.shelf = Shelf(self.folder, 4)
        assert self.shelf.count("pages") == len(self.held)

    @rule(where=st.floats(0, 1), size=st.sampled_from([0, 1, 100]), open_meanwhile=st.booleans())
    def damage_the_index(self, where: float, size: int, open_meanwhile: bool) -> None:
        """Of size 0: loss. The order may be lost with it, so all are used again."""
        if not open_meanwhile:
            self.shelf.close()
        path = self.folder / "index.sqlite"
        if path.exists():
            raw = bytearray(path.read_bytes())
            at = int(where * len(raw))
            raw[at : at + size] = bytes(byte ^ 0x5A for byte in raw[at : at + size])
            path.write_bytes(raw) if size else path.unlink()
        self.reopen()
        for number in self.held:
            assert self.shelf.read(number)

    @invariant()
    def only_these_are_on_disk(self) -> None:
        assert sorted(self.held) == [n for n in range(8) if list(self.folder.glob(f"{content_id(n).hex()}*"))]

    def teardown(self) -> None:
        self.shelf.close()
        shutil.rmtree(self.folder)


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=400 if SOAK else 40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
