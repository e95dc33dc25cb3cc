"""Attention and convolution one token at a time, in plain torch: the probe's own, slow and easy to believe.

Shape letters: T packed tokens, Hq/Hkv query/KV heads, Dk/Dv head sizes, n visible keys, C channels, W width of a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from quire.tensors.attention.base import Mask
from quire.tensors.attention.carried import PlainCarried, Recurrence, Segments


class RowByRow:
    """An `AttentionStep` for fresh sequences of `lengths`, packed in order, each from position 0.

    A row sees only tensors of sizes given by its own position, so its bits depend on nothing else.
    """

    of_programs = None

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = tuple(lengths)

    def attend(self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> torch.Tensor:
        """q [T,Hq,Dk], k [T,Hkv,Dk], v [T,Hkv,Dv] -> [T,Hq,Dv] in q's dtype, computed in fp32."""
        num_kv_heads, k_dim = k.shape[1:]
        queries = q.float().view(q.shape[0], num_kv_heads, -1, k_dim)
        keys, values = k.float().unsqueeze(2), v.float().unsqueeze(2)
        sinks = None if mask.sinks is None else mask.sinks.float().view(1, num_kv_heads, -1)
        rows = []
        start = 0
        for length in self._lengths:
            for position in range(length):
                seen = slice(start + mask.first_visible(position), start + position + 1)
                rows.append(_row(queries[start + position], keys[seen], values[seen], sinks, mask))
            start += length
        return torch.stack(rows).view(q.shape[0], q.shape[1], v.shape[2]).to(q.dtype)

    def convolve(self, layer_idx: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T,C], weight [C,W] -> [T,C] in x's dtype, computed in fp32."""
        width, rows, start = weight.shape[1], [], 0
        for length in self._lengths:
            for position in range(length):
                seen = x[max(start, start + position - width + 1) : start + position + 1].float()
                rows.append((seen * weight[:, -len(seen) :].float().T).sum(0))
            start += length
        out = torch.stack(rows)
        return (out if bias is None else out + bias.float()).to(x.dtype)

    convolve_carried = convolve

    def recur(self, layer_idx: int, given: Recurrence) -> torch.Tensor:
        """See `PlainCarried`: it goes a token at a time, too."""
        count, out = len(self._lengths), torch.empty_like(given.v)
        whole = Segments([0, *accumulate(self._lengths)], list(range(count + 1)), [-1] * count, [-1] * count)
        PlainCarried().recur(given, whole, [None] * count, [None] * count, out)
        return out


def _row(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sinks: torch.Tensor | None, mask: Mask) -> torch.Tensor:
    """query [Hkv,Hq/Hkv,Dk], keys [n,Hkv,1,Dk], values [n,Hkv,1,Dv] -> [Hkv,Hq/Hkv,Dv]."""
    scores = (keys * query).sum(-1) * mask.scale
    if mask.softcap:
        scores = torch.tanh(scores / mask.softcap) * mask.softcap
    if sinks is not None:
        scores = torch.cat([scores, sinks])
    weights = scores.softmax(0)[: keys.shape[0]]
    return (weights.unsqueeze(-1) * values).sum(0)
