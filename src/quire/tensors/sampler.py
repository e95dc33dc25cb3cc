"""Draws the next tokens of a step from its logits: one call for all its rows, in C++ (`native`) or plain torch (`reference`).

A row's result depends on its logits, its sequence's state and its position alone: never on other rows, their number, its place or the number of
threads. Meanings and order of operations are those of `SamplingParams`; in particular

- penalties apply first (repetition, then presence and frequency), then bias, each rounded to float32; then the masks: allowed, banned, `mask`;
- temperature 0 takes the first of the most likely tokens that are left;
- the tokens that survive top-k, top-p and min-p are a first part of all in the order (logit descending, id ascending), never empty;
- the token drawn has the highest logit / temperature + Gumbel noise, and the noise is a function of (seed, position, token) (E. Gumbel 1954; the
  generator is Threefry-2x32-20, Salmon et al. 2011). Noise has 32 bits, so events rarer than 2**-32 are not told apart;
- logprobs are the log-softmax of the raw logits in float32, or of these over the temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, Protocol

import torch
from torch import Tensor

from quire.tensors.sampler_reference import ReferenceSampler
from quire.tensors.sampler_state import Failure, Row, Sampled, SequenceState

__all__ = ["Failure", "Row", "Sampled", "Sampler", "SequenceState"]

_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


def _native(vocab_size: int, num_threads: int) -> _Backend:
    from quire.tensors.sampler_native import NativeSampler  # here, so that the reference works where the kernels were not built

    return NativeSampler(vocab_size, num_threads)


class _Backend(Protocol):
    def run(self, logits: Tensor, rows: Sequence[Row]) -> list[Sampled]: ...


class Sampler:
    """Draws tokens for a model with `vocab_size` logits. One call at a time: its scratch is shared between calls."""

    def __init__(self, vocab_size: int, backend: Literal["native", "reference"], num_threads: int) -> None:
        if vocab_size < 1 or num_threads < 1:
            raise ValueError(f"vocab_size={vocab_size}, num_threads={num_threads}: must be at least 1")
        self.vocab_size, self.backend = vocab_size, backend
        self._backend: _Backend = ReferenceSampler() if backend == "reference" else _native(vocab_size, num_threads)

    def sample(self, logits: Tensor, rows: Sequence[Row]) -> list[Sampled]:
        """Draw one token for each row, or score the one it is given; a token's logprob has the same bits either way.

        Args:
            logits: [R, V] in float32, bfloat16 or float16, not changed; on CPU for the native backend.
            rows: R rows. None of their states changes: `append` the tokens that are kept.

        Returns:
            One `Sampled` a row. A row without a token says why in `failure` and leaves the others alone.

        Raises:
            ValueError: shapes, dtypes or positions that do not fit; a caller's mistake.
        """
        self._check(logits, len(rows))
        for row in rows:
            if row.state.vocab_size != self.vocab_size:
                raise ValueError(f"a row for a vocabulary of {row.state.vocab_size}: must be {self.vocab_size}")
            if not 0 <= row.position < 2**31:
                raise ValueError(f"position={row.position}: must be from 0 to 2**31 - 1")
            if row.given >= self.vocab_size:
                raise ValueError(f"given={row.given}: must be below {self.vocab_size}, or -1")
            if row.mask is not None:
                self._check_mask(row.mask)
        drawn = self._backend.run(logits, rows)
        if not any([row.state.asks_more for row in rows]):
            return drawn
        self._score_scaled(logits, rows, drawn)
        for i, row in enumerate(rows):
            if row.state.params.return_logits and row.given < 0:
                drawn[i] = drawn[i]._replace(logits=logits[i].to(torch.float32, copy=True))
        return drawn

    def _score_scaled(self, logits: Tensor, rows: Sequence[Row], drawn: list[Sampled]) -> None:
        """Put the logprobs of logits over the temperature in their place, for the rows that want these."""
        places = [i for i, row in enumerate(rows) if row.state.scales_logprobs and drawn[i].ok]
        if not places:
            return
        raw = logits[places].float()
        factors = torch.tensor([rows[i].state.inverse_temperature for i in places], dtype=torch.float32, device=raw.device)
        scaled = (raw - raw.amax(dim=1, keepdim=True)) * factors[:, None]  # never above 0, however low the temperature
        scores = self._backend.run(scaled, [rows[i]._replace(given=drawn[i].token_id) for i in places])
        for i, score in zip(places, scores, strict=True):
            drawn[i] = score

    def _check_mask(self, mask: Tensor) -> None:
        least = -(-self.vocab_size // 32)
        if mask.dtype != torch.int32 or mask.dim() != 1 or mask.numel() < least or not mask.is_contiguous() or mask.device.type != "cpu":
            raise ValueError(f"mask {tuple(mask.shape)} {mask.dtype} on {mask.device}: must be int32 of at least {least} words on the CPU")

    def _check(self, logits: Tensor, num_rows: int) -> None:
        if logits.shape != (num_rows, self.vocab_size) or logits.dtype not in _DTYPES:
            raise ValueError(f"logits {tuple(logits.shape)} {logits.dtype}: must be ({num_rows}, {self.vocab_size}), one of {_DTYPES}")
        if not logits.is_cpu and self.backend == "native":
            raise ValueError(f"logits on {logits.device}: the native sampler reads them on the CPU")
