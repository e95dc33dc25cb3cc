"""Rope whose frequencies hang on the longest sequence of a batch. Up to some length they are one set, and so far such a model is served.

LongRoPE (Ding et al., 2024) has one set for sequences of up to `original_max_position_embeddings` tokens and another for longer ones; dynamic NTK
stretches its own beyond `max_position_embeddings`. There a token's bits would depend on its neighbours, and keys that are cached on what comes after
them, so contexts end before; or, where longer ones are asked for, sequences of every length have LongRoPE's second set.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from quire.errors import UnsupportedModelError
from quire.tensors.models.calls import is_foreign

_LENGTH = "original_max_position_embeddings"
_REASON = ", which may choose its frequencies from the longest sequence of a batch, shared by all others"


def refuse_ropes(model: PreTrainedModel, *, live: bool) -> None:
    """Raise UnsupportedModelError where frequencies may be others within the context: in code that is not transformers' own, and in a live model
    whose owner runs longer sequences, after which dynamic NTK keeps its stretched frequencies for a sequence that fills the context."""
    kind = model.config.model_type
    if is_foreign(model):
        for rope_type, _ in _settings(model.config.get_text_config(decoder=True)):
            if _depends(rope_type):
                raise UnsupportedModelError(f"{kind}: {rope_type} rope in code of its own{_REASON}")
    for name, module in model.named_modules():
        for rope_type in filter(_depends, _types(getattr(module, "rope_type", None))):
            if is_foreign(module) or rope_type not in ("longrope", "dynamic"):
                raise UnsupportedModelError(f"{kind}: {name}: {rope_type} rope in code of its own{_REASON}")
            if live and rope_type == "dynamic":
                raise UnsupportedModelError(f"{kind}: {name}: dynamic rope of a live model{_REASON}")


def unstretched_len(config: PreTrainedConfig) -> int | None:
    """The most tokens of a sequence for which LongRoPE's frequencies are the first set, None where it is not used.

    Raises UnsupportedModelError for a config that does not tell.
    """
    lengths = []
    for rope_type, settings in _settings(config):
        if rope_type == "longrope":
            length = settings.get(_LENGTH, getattr(config, _LENGTH, None))
            if not isinstance(length, int) or length <= 0:
                raise UnsupportedModelError(f"{config.model_type}: {_LENGTH}={length!r}: must be a positive integer where rope is longrope")
            lengths.append(length)
    return min(lengths, default=None)


def warn_of_limit(config: PreTrainedConfig) -> None:
    """Tell where contexts end before they do in the config."""
    length, told = unstretched_len(config), getattr(config, "max_position_embeddings", None)
    if length is not None and isinstance(told, int) and length < told:
        what = f"longrope takes other frequencies for a whole batch once a sequence is longer than {length} tokens"
        end = f"contexts end there, not at the {told} of its config (max_model_len beyond it takes the others for all sequences)"
        warnings.warn(f"{config.model_type}: {what}: {end}", stacklevel=3)


def stretch(model: PreTrainedModel, length: int) -> None:
    """Give a model of our own, whose sequences of up to `length` tokens have LongRoPE's first set, the second for all, as vLLM has it.

    Raises UnsupportedModelError for rope of several kinds, or in code that takes no others.
    """
    for name, module in model.named_modules():
        rope_type = getattr(module, "rope_type", None)
        if rope_type == "longrope":
            first, before = module.original_inv_freq, _tables(module)
            module.original_inv_freq, _ = ROPE_INIT_FUNCTIONS[rope_type](module.config, None, seq_len=length + 1)
            if not torch.equal(first, module.original_inv_freq) and torch.equal(before, _tables(module)):  # PhiMoE's makes its own at every call
                told = "keeps longrope's first frequencies, and may scale a whole batch by its longest sequence"
                raise UnsupportedModelError(f"{model.config.model_type}: {name}: {told}: contexts end at {length}")
        elif "longrope" in _types(rope_type):
            raise UnsupportedModelError(f"{model.config.model_type}: {name}: has longrope beside other rope: contexts end at {length}")


def _tables(module: Any) -> torch.Tensor:
    """The cosines of position 1."""
    cos: torch.Tensor = module(torch.zeros(1), torch.ones(1, 1, dtype=torch.long))[0]
    return cos


def _depends(rope_type: str) -> bool:
    return "dynamic" in rope_type or rope_type in {"longrope", "su"}


def _settings(config: PreTrainedConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """(type, settings) of a config's rope, flat or nested by layer type, under its new name or its old one."""
    for given in (getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)):
        if isinstance(given, dict):
            for settings in (given, *(value for value in given.values() if isinstance(value, dict))):
                rope_type = settings.get("rope_type", settings.get("type"))
                if isinstance(rope_type, str):
                    yield rope_type, settings


def _types(given: Any) -> tuple[str, ...]:
    """A module's `rope_type`: a name, or one for each layer type."""
    return tuple(kind for kind in (given.values() if isinstance(given, dict) else (given,)) if isinstance(kind, str))
