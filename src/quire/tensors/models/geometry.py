"""What the cache must hold for each layer, read from one token's forward: it knows per-layer geometry and Dv != Dk, which configs often do not tell.

Shape letters: T packed tokens, Hq/Hkv query/KV heads, Dk/Dv head sizes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from quire.errors import UnsupportedModelError
from quire.tensors.attention.base import Mask
from quire.tensors.attention.carried import MOST_K_DIM, MOST_WIDTH, Recurrence
from quire.tensors.models.facts import context_len, text_config

STATE_REACH = 2  # the window of a layer with a state: its next token needs the page of the one before
STATE_LINE = 64  # bytes; what the parts of a state begin at
ALONE = frozenset(("mlp", "moe"))  # kinds of layers in which no token meets another
NOT_TAKEN_BACK = "whose recurrent layers cannot take back a token that was guessed"


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """One layer that mixes tokens. `window` and `chunk` are 0 where the layer has none.

    A short convolution keeps its input of each token as one key, with no value, and its window is as wide as its kernel. A recurrent layer keeps one
    state of `state_bytes` for all tokens, and no rows.
    """

    layer_idx: int
    num_kv_heads: int
    k_dim: int
    v_dim: int
    window: int
    chunk: int
    state_bytes: int = 0

    @property
    def convolves(self) -> bool:
        """Whether it is a convolution, and no more."""
        return not self.v_dim and not self.state_bytes


def carries(layers: Iterable[LayerGeometry]) -> bool:
    """Whether any of them keeps a state: of such a model no token can be taken back, and no part of a page stands for fewer of its tokens."""
    return any(layer.state_bytes for layer in layers)


class DryRun:
    """An `AttentionStep` for one token. Attention over one key is its value, whatever the scores, so nothing needs computing."""

    of_programs = None

    def __init__(self) -> None:
        self.layers: list[LayerGeometry] = []
        self._convolved_bytes = 0  # of the state of the layer that is running

    def attend(self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> torch.Tensor:
        """q [1,Hq,Dk], k [1,Hkv,Dk], v [1,Hkv,Dv] -> v for every query head, [1,Hq,Dv]."""
        self.layers.append(LayerGeometry(layer_idx, k.shape[1], k.shape[2], v.shape[2], mask.window, mask.chunk))
        return v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)

    def convolve(self, layer_idx: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [1,C] -> [1,C]: what a sequence's first token gets."""
        self.layers.append(LayerGeometry(layer_idx, 1, x.shape[1], 0, weight.shape[1], 0))
        return _of_one_token(x, weight, bias)

    def convolve_carried(self, layer_idx: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As `convolve`."""
        if weight.shape[1] > MOST_WIDTH:
            raise UnsupportedModelError(
                f"layer {layer_idx} convolves {weight.shape[1]} tokens in front of its state, and at most {MOST_WIDTH} are served"
            )
        self._convolved_bytes = (weight.shape[1] - 1) * x.shape[1] * x.element_size()
        return _of_one_token(x, weight, bias)

    def recur(self, layer_idx: int, given: Recurrence) -> torch.Tensor:
        """v [1,Hv,Dv] -> [1,Hv,Dv], zeros."""
        rule_bytes = 4 * math.prod(given.state_shape)
        if given.k.shape[2] > MOST_K_DIM:
            raise UnsupportedModelError(f"layer {layer_idx} has states for keys of {given.k.shape[2]}, and at most {MOST_K_DIM} are served")
        self.layers.append(LayerGeometry(layer_idx, 1, 0, 0, STATE_REACH, 0, -(-self._convolved_bytes // STATE_LINE) * STATE_LINE + rule_bytes))
        return torch.zeros_like(given.v)


class NoAttention:
    """An `AttentionStep` whose attention is zero: for a forward of which only shapes are of interest."""

    of_programs = None

    def attend(self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> torch.Tensor:
        """q [T,Hq,Dk], k [T,Hkv,Dk], v [T,Hkv,Dv] -> zeros [T,Hq,Dv]."""
        return q.new_zeros(q.shape[0], q.shape[1], v.shape[2])

    def convolve(self, layer_idx: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T,C] -> zeros [T,C]."""
        return torch.zeros_like(x)

    convolve_carried = convolve

    def recur(self, layer_idx: int, given: Recurrence) -> torch.Tensor:
        """v [T,Hv,Dv] -> zeros [T,Hv,Dv]."""
        return torch.zeros_like(given.v)


def _of_one_token(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    own = x.float() * weight[:, -1].float()
    return (own if bias is None else own + bias.float()).to(x.dtype)


class NoProducts:
    """`Products` of the right shapes, all zero. Raises ValueError where x and weight disagree about K."""

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] -> zeros [..., N] for a weight [N, K]."""
        _check_width(x, weight, weight.shape[1])
        return x.new_zeros(*x.shape[:-1], weight.shape[0])

    def matmul(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] -> zeros [..., N] for a weight [K, N]."""
        _check_width(x, weight, weight.shape[0])
        return x.new_zeros(*x.shape[:-1], weight.shape[1])


def _check_width(x: torch.Tensor, weight: torch.Tensor, width: int) -> None:
    if x.shape[-1] != width:
        raise ValueError(f"x {list(x.shape)} and weight {list(weight.shape)} disagree about K")


def check_layers(layers: list[LayerGeometry], model: PreTrainedModel) -> tuple[LayerGeometry, ...]:
    """The layers of a model in order of layer_idx.

    Raises UnsupportedModelError when layers are missing or called twice, or when a layer's kind, or the config where layers have none, and its window
    disagree: eager attention goes by the mask, which is made for the kind, the hook by the window, and one longer than the probe would hide the
    difference.
    """
    config = text_config(model)
    if not layers:
        raise UnsupportedModelError(f"{config.model_type}: its attention never calls transformers' attention interface (it has code of its own)")
    called = [layer.layer_idx for layer in layers]
    if len(set(called)) != len(called):
        twice = sorted({i for i in called if called.count(i) > 1})
        raise UnsupportedModelError(f"{config.model_type}: layers {_some(twice)} run attention more than once in a forward")
    expected = config.num_hidden_layers
    layer_types = getattr(config, "layer_types", None)
    alone = {i for i, kind in enumerate(layer_types or ()) if kind in ALONE}
    missing = sorted(set(range(expected)) - set(called) - alone)
    if missing:
        raise UnsupportedModelError(
            f"{config.model_type}: layers {_some(missing)} of {expected} never call the attention interface, nor a convolution by transformers'"
            " own forward (recurrent, of code of their own, or wrapped)"
        )
    for layer in layers:
        kind = layer_types[layer.layer_idx] if layer_types is not None and layer.layer_idx < len(layer_types) else None
        if (kind == "sliding_attention" and not layer.window) or (kind == "full_attention" and layer.window):
            raise UnsupportedModelError(f"{config.model_type}: layer {layer.layer_idx} is of kind {kind} but passes a window of {layer.window}")
        if kind is not None and (kind == "conv") != layer.convolves:
            what = "has a convolution" if layer.convolves else "calls attention"
            raise UnsupportedModelError(f"{config.model_type}: layer {layer.layer_idx} is of kind {kind} but {what}")
    window = getattr(config, "sliding_window", None)
    told = layer_types is not None or any(layer.window for layer in layers)
    if not told and isinstance(window, int) and 0 < window < context_len(config) and _makes_windows(model):
        raise UnsupportedModelError(f"{config.model_type}: its masks have a window of {window}, of which its layers do not tell attention")
    return tuple(sorted(layers, key=lambda layer: layer.layer_idx))


def check_vocabulary(vocab_size: int, model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError where a token that may be drawn has no row in the embedding: it would end all that are in a step with it."""
    with suppress(NotImplementedError):  # code of a model's own need not tell
        embedding = model.get_input_embeddings()
        if isinstance(embedding, nn.Embedding) and embedding.weight.shape[0] < vocab_size:
            told = f"its logits are of {vocab_size} tokens, and its embedding has rows for the first {embedding.weight.shape[0]}"
            raise UnsupportedModelError(f"{model.config.model_type}: {told}: others cannot be followed")


def _makes_windows(model: PreTrainedModel) -> bool:
    """Whether its code may make masks with a window, which a `sliding_window` that a config only carries along does not say."""
    return any(
        hasattr(sys.modules.get(name), "create_sliding_window_causal_mask") for name in {type(module).__module__ for module in model.modules()}
    )


def _some(indices: list[int]) -> str:
    return ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
