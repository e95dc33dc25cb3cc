"""What captured steps need no device for; what they compute is asked in devices_rules.py and devices_families.py."""

from __future__ import annotations

import pytest

from quire.engine.captured import MAX_SIZE, sizes


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16]), (64, [1, 2, 4, 8, 16, 32, 64]), (65, [1, 2, 4, 8, 16, 32, 64, 65])],
)
def test_sizes_are_powers_of_two_up_to_the_rows_that_a_product_takes_at_once(limit: int, expected: list[int]) -> None:
    assert list(sizes(limit)) == expected


def test_beyond_that_they_are_its_multiples_and_end_at_the_limit() -> None:
    assert list(sizes(200)) == [1, 2, 4, 8, 16, 32, 64, 128, 192, 200]
    assert list(sizes(MAX_SIZE))[-2:] == [MAX_SIZE - 64, MAX_SIZE]
