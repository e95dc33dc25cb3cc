"""The final hidden states of a forward: what its output layer is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from quire.tensors.models.calls import changed
from quire.tensors.models.facts import output_embeddings

NO_STATES = torch.empty(0, 0)


class HiddenRows:
    """Wanted of a forward: the final hidden states [H, D] of the packed tokens `at`, int64 [H]; afterwards `states`, in the model's dtype."""

    def __init__(self, at: torch.Tensor) -> None:
        self.at = at
        self.states = NO_STATES


def output_layer(model: PreTrainedModel) -> nn.Linear | None:
    """The layer that makes logits of final hidden states, None where the model has none of the plain kind."""
    layer = output_embeddings(model)
    return layer if isinstance(layer, nn.Linear) else None


def width(layer: nn.Linear | None) -> int | None:
    """Of the hidden states that an output layer is given; None without one."""
    return layer.in_features if layer is not None else None


@contextmanager
def kept(layer: nn.Linear, hidden: HiddenRows, rows: torch.Tensor | slice, logits: slice) -> Iterator[None]:
    """Inside, `hidden` gets those of the rows that `layer` is given, and only the rows `logits` go through it."""
    forward = layer.forward

    def keeping(states: torch.Tensor) -> Any:
        hidden.states = states[0, rows].contiguous()
        return forward(states[:, logits])

    with changed([(layer.__dict__, "forward", keeping)]):
        yield
