"""The one attention function registered with transformers, and the step that is running.

Invariant: a thread runs at most one of our forwards at a time, and the hook does nothing but read what the model passes for a layer and hand it to
that forward's step. It refuses, with the reason, whatever it would otherwise have to guess or drop.

Shape letters: T packed tokens, Hq/Hkv query/KV heads, Dk/Dv head sizes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import nn
from transformers import AttentionInterface

from quire.errors import UnsupportedModelError
from quire.tensors.attention.base import Mask, ProgramStep
from quire.tensors.attention.carried import Recurrence
from quire.tensors.models.exact import ExactMode, in_whole_vectors

NAME = "quire"  # plain on purpose: transformers diverts names that hold flash, sdpa, flex_attention, paged| or a slash

# Inputs that change what attention computes and that no backend of ours reads.
_REFUSED = {
    "position_bias": "adds a position bias to attention scores",
    "indices": "attends to keys picked by an indexer",
    "block_indices": "attends to blocks picked by an indexer",
    "cache": "brings a cache of its own to attention",
}
# Tensors that ride along for other attention functions and are already applied to q and k, or say nothing a step does not know.
_HARMLESS = frozenset({"position_ids", "cache_position", "position_embeddings", "input_ids", "logits_to_keep"})


class AttentionStep(Protocol):
    """What a running forward calls for each layer that mixes tokens. The engine's runner, the dry run and the probe are such steps."""

    @property
    def of_programs(self) -> ProgramStep | None:
        """What layers that are native programs attend in, instead of calling `attend`; None: they call it as all others do."""
        ...

    def attend(self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Attention of q [T,Hq,Dk] with this step's own k [T,Hkv,Dk] and v [T,Hkv,Dv], all contiguous; returns [T,Hq,Dv]."""
        ...

    def convolve(self, layer_idx: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The causal convolution of x [T,C], contiguous, along each sequence with weight [C,W] and bias [C] or None; returns [T,C]."""
        ...

    def convolve_carried(self, layer_idx: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The same in a layer whose recurrence comes next: they keep one state."""
        ...

    def recur(self, layer_idx: int, given: Recurrence) -> torch.Tensor:
        """The recurrence along each sequence; returns [T,Hv,Dv] of v's dtype."""
        ...


@dataclass(frozen=True, slots=True)
class QueryScale:
    """Llama 4's temperature of a layer without rope: queries at position p times log1p(floor((p + 1) / floor_scale)) * attn_scale + 1."""

    floor_scale: float
    attn_scale: float


@dataclass(slots=True)
class Running:
    """One forward in progress: its step, its positions [T], the mode that is paused while the step computes, layers with a query scale.

    `chunks` [layer_idx] outlives the forward: layers that were met and found servable, with their chunk (0 none). `padded`: positions of all rows
    that the model is given, where those are more. `layer_idx`: the layer that runs, where it is a compiled one.
    """

    step: AttentionStep
    positions: torch.Tensor
    mode: ExactMode
    query_scales: dict[int, QueryScale]
    chunks: dict[int, int]
    padded: torch.Tensor
    layer_idx: int = -1
    scale_cache: dict[QueryScale, torch.Tensor] = field(default_factory=dict)


# The step travels beside the call, not through it: StableLM, Nemotron and others drop keyword arguments they do not know.
_thread = threading.local()


@contextmanager
def running(forward: Running) -> Iterator[None]:
    """Make `forward` the one that attention calls of this thread belong to."""
    before = getattr(_thread, "forward", None)
    _thread.forward = forward
    try:
        yield
    finally:
        _thread.forward = before


def current() -> Running:
    """The forward in progress on this thread. Raises UnsupportedModelError for a live model's owner who runs it on another one meanwhile."""
    forward: Running | None = getattr(_thread, "forward", None)
    if forward is None:
        raise UnsupportedModelError(
            f"attention {NAME!r} works only inside a forward of Quire; run a live model between requests, or choose another attn_implementation"
        )
    return forward


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query [1,Hq,T,Dk], key [1,Hkv,T,Dk], value [1,Hkv,T,Dv] -> (contiguous [1,T,Hq,Dv], None).

    `dropout` is zero, as the model runs in eval mode. Raises UnsupportedModelError for a call it cannot serve.
    """
    forward = current()
    layer_idx = cast(int, getattr(module, "layer_idx", None))  # None is refused by examine
    if layer_idx not in forward.chunks:
        forward.chunks[layer_idx] = examine(module, layer_idx)
    if is_causal is False:
        raise UnsupportedModelError(f"{told(module)} is not causal")
    if attention_mask is not None:
        raise UnsupportedModelError(f"{told(module)} brings an attention mask of its own")
    if query.shape[0] != 1:
        raise UnsupportedModelError(f"{told(module)} calls attention with a batch of {query.shape[0]}, not 1")
    for name, given in others.items():
        if given is not None and (name in _REFUSED or (isinstance(given, torch.Tensor) and name not in _HARMLESS)):
            raise UnsupportedModelError(f"{told(module)} {_REFUSED.get(name, 'passes attention a tensor that is not known here')} ({name})")

    mask = Mask(
        scale=float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
        window=sliding_window if sliding_window is not None and sliding_window > 0 else 0,
        chunk=forward.chunks[layer_idx],
        softcap=float(softcap) if softcap else 0.0,
        sinks=s_aux.detach().float() if s_aux is not None else None,
    )
    # Values are often slices of a fused projection: a copy of their own lets the projection go before the step is committed.
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    if layer_idx in forward.query_scales:
        q = _scaled(q, forward, forward.query_scales[layer_idx])
    with forward.mode.paused():
        out = forward.step.attend(layer_idx, q, k, v, mask)
    return out.unsqueeze(0).contiguous(), None


def examine(module: nn.Module, layer_idx: object) -> int:
    """The chunk of a layer met for the first time; raises UnsupportedModelError if it can never be served."""
    if not isinstance(layer_idx, int):
        raise UnsupportedModelError(f"{told(module)} has no layer_idx, so what it keeps of a token has no place in the cache")
    if not getattr(module, "is_causal", True):
        raise UnsupportedModelError(f"{told(module)} is not causal")
    config: Any = getattr(module, "config", None)  # no keyword carries the chunk; the mask we do not build would have
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None or layer_types[layer_idx] != "chunked_attention":
        return 0
    return int(config.attention_chunk_size)


def told(module: nn.Module) -> str:
    """A module as refusals name it."""
    kind = getattr(getattr(module, "config", None), "model_type", None)
    return f"{f'{kind}: ' if kind else ''}{type(module).__name__} (layer {getattr(module, 'layer_idx', None)})"


def _scaled(q: torch.Tensor, forward: Running, scale: QueryScale) -> torch.Tensor:
    factor = forward.scale_cache.get(scale)
    if factor is None:
        steps = torch.floor((forward.positions.float() + 1.0) / scale.floor_scale)
        factor = in_whole_vectors(torch.log1p, steps) * scale.attn_scale + 1.0
        forward.scale_cache[scale] = factor
    return (q * factor[:, None, None]).to(q.dtype)


AttentionInterface.register(NAME, attention)
