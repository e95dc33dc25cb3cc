"""Attention in plain torch, one query token at a time: slow, plain to read, and the oracle of every other backend.

Because a token's arithmetic is done for it alone, over exactly the keys it sees in their order, its bits cannot depend on the batch.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from quire.tensors import codec
from quire.tensors.attention.base import LayerPlace, Mask, StepInputs, page_rows
from quire.tensors.attention.carried import PlainCarried
from quire.tensors.codec import RowFormat


class ReferenceAttention:
    """See `AttentionBackend`. Computes in fp32."""

    name = "reference"

    carried = PlainCarried()

    def program_steps(self, pages: torch.Tensor, places: Iterable[LayerPlace]) -> None:
        return None

    def encode(self, x: torch.Tensor, row: RowFormat) -> torch.Tensor:
        return x if row.dtype is not None else codec.encode(x, row)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, place: LayerPlace, step: StepInputs, mask: Mask
    ) -> torch.Tensor:
        out = torch.zeros(q.shape[0], q.shape[1], place.v.dim, dtype=q.dtype)
        k, v = (x if row.dtype is not None else codec.decode(x, row) for x, row in ((k, place.k), (v, place.v)))
        table = step.tables[place.group]
        starts, page_starts = step.query_start.tolist(), table.page_start.tolist()
        for s, committed in enumerate(step.num_committed.tolist()):
            pages_of = table.page_ids[page_starts[s] : page_starts[s + 1]].tolist()
            for t in range(starts[s], starts[s + 1]):
                position = committed + t - starts[s]
                first = mask.first_visible(position)
                old_k, old_v = _committed(pages, place, pages_of, first, committed)
                staged = slice(starts[s] + max(0, first - committed), t + 1)
                out[t] = _one(q[t], torch.cat([old_k, k[staged]]), torch.cat([old_v, v[staged]]), mask)
        return out

    def commit(self, k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, place: LayerPlace, slots: torch.Tensor) -> None:
        kept = slots >= 0
        page, offset = slots[kept] // place.page_size, slots[kept] % place.page_size
        keys, values = page_rows(pages, place)
        keys[page, :, offset] = k[kept].contiguous().view(torch.uint8)
        values[page, :, offset] = v[kept].contiguous().view(torch.uint8)


def _committed(pages: torch.Tensor, place: LayerPlace, table: list[int], first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K [n, Hkv, Dk] and V [n, Hkv, Dv] at positions first .. end - 1, gathered through a page table."""
    where = torch.arange(first, max(first, end))
    entries = torch.tensor(table, dtype=torch.long)[where // place.page_size] if len(where) else where
    keys, values = page_rows(pages, place)
    at = where % place.page_size
    return codec.decode(keys[entries, :, at], place.k), codec.decode(values[entries, :, at], place.v)


def _one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> torch.Tensor:
    """q [Hq, Dk], k [n, Hkv, Dk], v [n, Hkv, Dv] -> [Hq, Dv]."""
    repeat = q.shape[0] // k.shape[1]
    keys, values = (x.float().transpose(0, 1).repeat_interleave(repeat, 0) for x in (k, v))
    scores = (keys @ q.float()[:, :, None])[:, :, 0] * mask.scale
    if mask.softcap:
        scores = mask.softcap * torch.tanh(scores / mask.softcap)
    if mask.sinks is not None:
        scores = torch.cat([scores, mask.sinks.float()[:, None]], dim=1)
    weights = torch.softmax(scores, dim=1)[:, : keys.shape[1]]
    return (weights[:, None, :] @ values)[:, 0].to(q.dtype)
