"""One vector for a prompt, out of the final hidden states of its tokens."""

from __future__ import annotations

import torch

from quire.params import Pooling


class Pool:
    """Collects hidden states as steps compute them; the prompt may come in any pieces, and parts of it again after a preemption.

    The mean is a sum in float64, token after token, so its bits do not depend on the pieces.
    """

    def __init__(self, pooling: Pooling, num_tokens: int) -> None:
        self.pooling, self._num_tokens, self._num_added = pooling, num_tokens, 0
        self._sum: torch.Tensor | None = None

    @property
    def complete(self) -> bool:
        """Whether the whole prompt is in it."""
        return self._num_added == self._num_tokens

    @property
    def finite(self) -> bool:
        """Whether everything in it is a number."""
        return self._sum is None or bool(torch.isfinite(self._sum).all())

    def add(self, first: int, hidden: torch.Tensor) -> None:
        """Add the states [N, D] of the tokens from position `first` on."""
        if self.pooling == "last":
            self._sum, self._num_added = hidden[-1].double(), self._num_tokens
            return
        new = hidden[self._num_added - first :].double()
        if len(new):
            rows = new if self._sum is None else torch.cat([self._sum[None], new])
            self._sum, self._num_added = rows.cumsum(0)[-1], self._num_added + len(new)

    def embedding(self) -> torch.Tensor | None:
        """float32 [D], None as long as it is not complete."""
        if self._sum is None or not self.complete:
            return None
        return (self._sum / (self._num_tokens if self.pooling == "mean" else 1)).float()


def normalized(vector: torch.Tensor) -> torch.Tensor:
    """A vector float32 [D] at length 1; a zero stays one. The length is taken in float64."""
    wide = vector.double()
    length: torch.Tensor = torch.linalg.vector_norm(wide)
    return (wide / length.clamp(min=1e-300)).float()
