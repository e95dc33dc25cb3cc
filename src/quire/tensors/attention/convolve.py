"""Short causal convolutions over pages, in plain torch: how layers such as LFM2's mix tokens without attention.

Such a layer is to the cache what one with a window is: it keeps one row of a token, its input, and of these the last `W`, as many as its kernel is
wide, are all that the next token needs. So a prefix, a fork or a step that is dropped is to it what it is to attention.

Shape letters: T packed tokens of the step, S sequences, P pages, B page size, C channels, W width of the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quire.tensors.attention.base import LayerPlace, StepInputs, page_rows


@dataclass(frozen=True, slots=True)
class Reach:
    """Where the rows are that a step's tokens meet, the same for all layers of a group and a width.

    `pages`, `slots` int64 [S * (W - 1)]: of the rows before each sequence's first token of the step; `there`: whether the sequence has it. `sources`
    int64 [T, W]: see `sources`. `live` bool [T]: whether a token is a sequence's.
    """

    pages: torch.Tensor
    slots: torch.Tensor
    there: torch.Tensor
    sources: torch.Tensor
    live: torch.Tensor


def sources(query_start: torch.Tensor, before: int, num_tokens: int) -> torch.Tensor:
    """int64 [T, before + 1]: of each token the rows that it meets, its own last, among `before` of each sequence and, behind all, the step's."""
    starts = query_start.long()
    tokens = torch.arange(num_tokens, device=starts.device)
    seqs = torch.searchsorted(starts[1:], tokens, right=True).clamp_(max=starts.shape[0] - 2)
    at = (tokens - starts[seqs])[:, None] + torch.arange(-before, 1, device=starts.device)  # of the step's own, from its first
    found = torch.where(at >= 0, before * (starts.shape[0] - 1) + starts[seqs][:, None] + at, before * (seqs[:, None] + 1) + at)
    return found.clamp_(min=0)  # of padding in a step without any sequence


def reach(step: StepInputs, place: LayerPlace, width: int, num_tokens: int) -> Reach:
    """What tokens of a step see in a layer at `place`. Nothing waits for a device."""
    table, before, device = step.tables[place.group], width - 1, step.query_start.device
    positions = step.num_committed.long()[:, None] + torch.arange(-before, 0, device=device)
    if table.page_ids.shape[0]:
        entries = table.page_start[:-1].long()[:, None] + positions.clamp(min=0) // place.page_size
        pages = table.page_ids[entries.clamp_(max=table.page_ids.shape[0] - 1)].long().clamp_(min=0)
    else:
        pages = torch.zeros_like(positions)
    live = torch.arange(num_tokens, device=device) < step.query_start[-1]
    seen = sources(step.query_start, before, num_tokens)
    return Reach(pages.flatten(), (positions % place.page_size).flatten(), positions.flatten() >= 0, seen, live)


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pages: torch.Tensor, place: LayerPlace, seen: Reach) -> torch.Tensor:
    """The convolution of x [T,C] along each sequence with weight [C,W], the last of which is a token's own, plus bias [C]; [T,C] of x's dtype.

    Rows that are no sequence's are zero.
    """
    rows = page_rows(pages, place)[0][seen.pages, 0, seen.slots].view(x.dtype)
    rows = torch.cat([torch.where(seen.there[:, None], rows, 0), x])
    return torch.where(seen.live[:, None], convolved(rows, seen.sources, weight, bias), 0)


def convolved(rows: torch.Tensor, seen: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Sums of rows seen [T,W] of rows [.., C] times weight [C,W], plus bias [C]; [T,C] of the rows' dtype.

    In fp32, the oldest first, each product and each sum rounded once, so that every backend has the same bits.
    """
    wide = weight.float()
    out = rows[seen[:, 0]].float() * wide[:, 0]
    for tap in range(1, weight.shape[1]):
        out = out + rows[seen[:, tap]].float() * wide[:, tap]
    return (out if bias is None else out + bias.float()).to(rows.dtype)
