"""Padded batches: which tokens of a row are real, and the masks and positions of those who run a padded forward of their own.

prompts          left_pad          position_ids       causal_mask (of row 0)
[1, 2, 3]        0 1 2 3           0 0 1 2            T . . .    a pad sees itself alone, so that no row of scores is empty
[4, 5, 6, 7]     4 5 6 7           0 1 2 3            . T . .
                                                      . T T .
                                                      . T T T
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch

from quire.errors import InvalidRequestError
from quire.faces.checked import integer, integers, is_whole

Side = Literal["left", "right"]


class Rows(NamedTuple):
    """A batch [B, P] and where its rows' real tokens lie: row b's are `padded[b, spans[b][0] : spans[b][1]]`."""

    padded: torch.Tensor
    spans: list[tuple[int, int]]

    def token_ids(self) -> list[list[int]]:
        """The real tokens of each row."""
        return [row[start:end] for row, (start, end) in zip(self.padded.tolist(), self.spans, strict=True)]


def left_pad(prompts: Sequence[Sequence[int] | torch.Tensor], pad_id: int = 0) -> torch.Tensor:
    """Ragged prompts as one int64 tensor [B, P], P the longest, pads in front.

    Raises:
        InvalidRequestError: there are no prompts, or one that is not a row of integers.
    """
    rows = [_row(prompt) for prompt in prompts]
    if not rows:
        raise InvalidRequestError("prompt", prompts, "at least one row")
    padded = torch.full((len(rows), max(map(len, rows))), integer("pad_id", pad_id), dtype=torch.int64)
    for place, row in zip(padded, rows, strict=True):
        place[len(place) - len(row) :] = row
    return padded


def causal_mask(padding_mask: torch.Tensor, target_len: int | None = None) -> torch.Tensor:
    """Which keys each query of a padded batch may see: bool [B, S, target_len], True where it may.

    padding_mask: bool [B, S], True for real tokens. target_len: keys there are room for, at least S; `None` takes S.

    Raises:
        InvalidRequestError: target_len is below S.
    """
    _, num_tokens = padding_mask.shape
    target_len = num_tokens if target_len is None else target_len
    if target_len < num_tokens:
        raise InvalidRequestError("target_len", target_len, f"at least {num_tokens}, the width of the batch")
    mask = torch.ones(num_tokens, target_len, dtype=torch.bool, device=padding_mask.device).tril()
    real = torch.nn.functional.pad(padding_mask.bool(), (0, target_len - num_tokens))
    return mask & real[:, None, :] | torch.eye(num_tokens, target_len, dtype=torch.bool, device=padding_mask.device)


def position_ids(padding_mask: torch.Tensor) -> torch.Tensor:
    """Positions within each sequence, int64 [B, S]: 0 for the first real token and for pads. padding_mask: bool [B, S], True for real tokens."""
    return (padding_mask.long().cumsum(-1) - 1).clamp(min=0) * padding_mask.long()


def rows_of(
    prompt: torch.Tensor | Sequence[Sequence[int] | torch.Tensor], pad_id: int, lens: Sequence[int] | torch.Tensor | None, side: Side | None
) -> Rows:
    """Find the real tokens of a batch: a ragged list, one row, or a tensor or an array [B, P] padded on one side.

    Raises:
        InvalidRequestError: a row without a token, or a batch that could be meant in two ways.
    """
    integer("pad_id", pad_id)
    if side not in (None, "left", "right"):
        raise InvalidRequestError("padding_side", side, "'left', 'right' or None")
    if hasattr(prompt, "__array_interface__"):  # numpy's
        prompt = torch.tensor(prompt.tolist())  # type: ignore[union-attr]
    if not isinstance(prompt, torch.Tensor):
        if lens is not None or side is not None:
            raise InvalidRequestError("prompt_lens" if lens is not None else "padding_side", "given", "None for a ragged list of prompts")
        if not isinstance(prompt, Iterable):
            raise InvalidRequestError("prompt", prompt, "a tensor of integers, or rows of token ids")
        rows = [_row(row) for row in prompt]
        padded = left_pad(rows, pad_id)
        return Rows(padded, _checked([(padded.shape[1] - len(row), padded.shape[1]) for row in rows]))
    padded = prompt[None] if prompt.dim() == 1 else prompt
    if padded.dim() != 2 or not padded.numel() or not is_whole(padded):
        raise InvalidRequestError("prompt", f"{tuple(prompt.shape)} {prompt.dtype}", "integers [B, P] or [P], at least one")
    padded = padded.long()  # in a narrow dtype a pad_id beyond its range, such as -1 for no pads, would be equal to some token
    found = _given_spans(padded, pad_id, lens, side) if lens is not None else _found_spans(padded, pad_id, side)
    return Rows(padded, _checked(found))


def _found_spans(padded: torch.Tensor, pad_id: int, side: Side | None) -> list[tuple[int, int]]:
    is_real, width = padded != pad_id, padded.shape[1]
    _checked([(0, int(row.sum())) for row in is_real])
    if side is None:
        left, right = not is_real[:, 0].all(), not is_real[:, -1].all()
        if left and right:
            raise InvalidRequestError(
                "prompt", f"rows that begin and rows that end with pad_id={pad_id}", "padded on one side; say which, or give prompt_lens"
            )
        side = "right" if right else "left"
    if side == "left":
        return [(int(row.int().argmax()), width) for row in is_real]
    return [(0, width - int(row.flip(0).int().argmax())) for row in is_real]


def _given_spans(padded: torch.Tensor, pad_id: int, lens: Sequence[int] | torch.Tensor, side: Side | None) -> list[tuple[int, int]]:
    width, counts = padded.shape[1], integers("prompt_lens", lens)
    if len(counts) != padded.shape[0] or not all(1 <= n <= width for n in counts):
        raise InvalidRequestError("prompt_lens", counts, f"one for each of the {padded.shape[0]} rows, each from 1 to {width}")
    spans: dict[Side, list[tuple[int, int]]] = {"left": [(width - n, width) for n in counts], "right": [(0, n) for n in counts]}
    if side is None:
        rest_is_pad = {
            side: all(
                bool((row[:start] == pad_id).all()) and bool((row[end:] == pad_id).all()) for row, (start, end) in zip(padded, places, strict=True)
            )
            for side, places in spans.items()
        }
        if rest_is_pad["left"] == rest_is_pad["right"] and min(counts) < width:
            raise InvalidRequestError("prompt_lens", counts, "lengths that fit padding on one side; say which by padding_side")
        side = "left" if rest_is_pad["left"] else "right"
    return spans[side]


def _checked(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    for b, (start, end) in enumerate(spans):
        if start >= end:
            raise InvalidRequestError("prompt", f"row {b}, all padding", "rows with at least one token; prompt_lens tells pads from tokens")
    return spans


def _row(prompt: Sequence[int] | torch.Tensor) -> torch.Tensor:
    return torch.tensor(integers("prompt", prompt, "rows of token ids"), dtype=torch.int64)
