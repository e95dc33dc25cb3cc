"""Pads, masks and positions against the shapes of the discussion that asked for them, and every batch that could be meant in two ways."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from quire import InvalidRequestError, causal_mask, left_pad, position_ids
from quire.faces.padding import rows_of

T, F = True, False
ROWS = [[1, 2, 3], [1, 2, 3, 4, 5], [1]]


def test_the_seeds_own_example() -> None:
    padded = left_pad(ROWS)
    assert padded.tolist() == [[0, 0, 1, 2, 3], [1, 2, 3, 4, 5], [0, 0, 0, 0, 1]]
    real = left_pad([[1, 2, 3], [1, 2, 3, 4, 5, 6]])[:1] != 0
    assert causal_mask(real)[0].tolist() == [
        [T, F, F, F, F, F],
        [F, T, F, F, F, F],
        [F, F, T, F, F, F],
        [F, F, F, T, F, F],
        [F, F, F, T, T, F],
        [F, F, F, T, T, T],
    ]
    assert position_ids(real).tolist() == [[0, 0, 0, 0, 1, 2]]


def test_a_mask_with_room_for_more_keys() -> None:
    mask = causal_mask(left_pad(ROWS) != 0, 8)
    assert mask.shape == (3, 5, 8) and not mask[:, :, 5:].any() and torch.equal(mask[:, :, :5], causal_mask(left_pad(ROWS) != 0))
    assert mask.any(dim=-1).all(), "no query is without a key"
    with pytest.raises(InvalidRequestError, match="target_len=4"):
        causal_mask(left_pad(ROWS) != 0, 4)


def test_right_padding_has_its_positions_too() -> None:
    assert position_ids(torch.tensor([[T, T, F], [T, T, T]])).tolist() == [[0, 1, 0], [0, 1, 2]]


@pytest.mark.parametrize(
    ("prompt", "options", "expected"),
    [
        (ROWS, {}, ROWS),
        ([torch.tensor([1, 2]), torch.tensor([3])], {}, [[1, 2], [3]]),
        (left_pad(ROWS), {}, ROWS),
        (left_pad(ROWS).numpy(), {}, ROWS),
        ((iter(row) for row in ROWS), {}, ROWS),
        (left_pad(ROWS).flip(1), {}, [row[::-1] for row in ROWS]),
        (torch.tensor([4, 5]), {}, [[4, 5]]),
        (torch.tensor([[0, 0, 7], [0, 8, 9]]), {"lens": [2, 3]}, [[0, 7], [0, 8, 9]]),
        (torch.tensor([[7, 0, 0], [8, 9, 0]]), {"lens": torch.tensor([2, 3])}, [[7, 0], [8, 9, 0]]),
        (torch.tensor([[7, 0], [0, 9]]), {"lens": [2, 2]}, [[7, 0], [0, 9]]),
        (torch.tensor([[0, 5, 0], [1, 2, 3]]), {"lens": [2, 3], "side": "left"}, [[5, 0], [1, 2, 3]]),
        (torch.tensor([[0, 5, 0], [1, 2, 3]]), {"lens": [2, 3], "side": "right"}, [[0, 5], [1, 2, 3]]),
        (torch.tensor([[5, 0, 6], [0, 2, 3]]), {}, [[5, 0, 6], [2, 3]]),
    ],
)
def test_real_tokens_are_found(prompt: Any, options: dict[str, Any], expected: list[list[int]]) -> None:
    assert rows_of(prompt, 0, options.get("lens"), options.get("side")).token_ids() == expected


@pytest.mark.parametrize(
    ("prompt", "options", "match"),
    [
        ([], {}, "prompt"),
        ([[1], []], {}, "row 1, all padding"),
        ([[1.5]], {}, "rows of token ids"),
        ([[2**70]], {}, "rows of token ids, of 64 bits"),
        ([np.array(5)], {}, "rows of token ids"),
        (None, {}, "rows of token ids"),
        (torch.zeros(0, 3, dtype=torch.long), {}, "prompt"),
        (torch.zeros(2, 3), {}, "integers"),
        (torch.tensor([[0, 1, 2], [1, 2, 0]]), {}, "padded on one side"),
        (torch.tensor([[0, 0], [1, 2]]), {}, "row 0, all padding"),
        (ROWS, {"lens": [3, 5, 1]}, "prompt_lens"),
        (ROWS, {"side": "left"}, "padding_side"),
        (left_pad(ROWS), {"lens": [3, 5]}, "one for each of the 3 rows"),
        (left_pad(ROWS), {"lens": [3, 5, 0]}, "each from 1 to 5"),
        (torch.tensor([[0, 5, 0], [1, 2, 3]]), {"lens": [2, 3]}, "say which by padding_side"),
        (torch.tensor([[1, 2, 3], [1, 2, 3]]), {"lens": [2, 3]}, "say which by padding_side"),
        (left_pad(ROWS), {"side": "middle"}, "'left', 'right' or None"),
    ],
)
def test_what_could_be_meant_in_two_ways_is_refused(prompt: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidRequestError, match=match):
        rows_of(prompt, 0, options.get("lens"), options.get("side"))


@pytest.mark.parametrize("pad_id", [0.5, 2**70, None, True])
def test_what_is_no_pad_is_refused(pad_id: Any) -> None:
    with pytest.raises(InvalidRequestError, match="pad_id"):
        left_pad(ROWS, pad_id)
