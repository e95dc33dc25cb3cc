"""Models that cannot be served, told apart before anything is run: by their config, before the weights are read, by the shapes of weights, and by
their modules. What cannot be seen here is left to the dry run (geometry.py), the hook and the probe.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from quire.errors import UnsupportedModelError
from quire.tensors.models.facts import output_embeddings
from quire.tensors.models.geometry import ALONE
from quire.tensors.models.mixing import recurs
from quire.tensors.models.ropes import refuse_ropes

_SERVED_KINDS = {"full_attention", "sliding_attention", "chunked_attention", "conv", "linear_attention", *ALONE}
_FEW_MISFITS = 3  # named in a refusal
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuse_config(config: PreTrainedConfig) -> None:
    """Raise UnsupportedModelError, with the reason, for a config that no checkpoint of can be served."""
    kind = config.model_type
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{kind}: is an encoder-decoder model; only decoders are served")
    text = config.get_text_config(decoder=True)
    for told in (config, text):
        if getattr(told, "add_cross_attention", False) or getattr(told, "cross_attention_layers", None):
            raise UnsupportedModelError(f"{kind}: has cross-attention")
        if getattr(told, "is_causal", True) is False:
            raise UnsupportedModelError(f"{kind}: its attention is not causal (is_causal=False)")
    others = sorted(set(getattr(text, "layer_types", None) or ()) - _SERVED_KINDS)
    if others:
        raise UnsupportedModelError(f"{kind}: has layers of kind {', '.join(others)}; served are {', '.join(sorted(_SERVED_KINDS))}")


def refuse_model(model: PreTrainedModel, where: torch.device, *, live: bool) -> None:
    """Raise UnsupportedModelError, with the reason, for a loaded model that cannot be served on `where`. It is not run."""
    kind = model.config.model_type
    refuse_config(model.config)
    if output_embeddings(model) is None:
        raise UnsupportedModelError(f"{kind}: {type(model).__name__} has no language model head")
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise UnsupportedModelError(f"{kind}: {type(model).__name__} takes no position_ids, so sequences cannot be packed")
    refuse_dtype(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device != where:
            raise UnsupportedModelError(f"{kind}: {name} is on device {tensor.device}; this engine's is {where} (its option device)")
        if tensor.numel() and not tensor.untyped_storage().nbytes():  # as FSDP does between its forwards; reading it would end the process
            raise UnsupportedModelError(f"{kind}: the memory of {name} has been freed (its storage has 0 bytes): gather the weights first")
    refuse_ropes(model, live=live)
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None:
            raise UnsupportedModelError(f"{kind}: {name or 'the model'} is compiled (nn.Module.compile), so its attention cannot be replaced")
        if ("A_log" in module._parameters or "time_decay" in module._parameters) and not recurs(module):
            raise UnsupportedModelError(f"{kind}: {name} ({type(module).__name__}) is a recurrent layer, whose state would leak between sequences")


def refuse_dtype(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError for weights of a dtype that nothing here computes in. Ask before they are packed."""
    if model.dtype not in _DTYPES:
        raise UnsupportedModelError(f"{model.config.model_type}: its weights are {model.dtype}; served are {', '.join(map(str, _DTYPES))}")


class Misfit(NamedTuple):
    """A weight of another shape than the one its model's config makes it."""

    name: str
    shape: list[int]
    made: list[int]


def misfits(model: PreTrainedModel) -> list[Misfit]:
    """Those of a model, as far as its class makes weights of the same names from its config."""
    with suppress(Exception), torch.device("meta"):  # a class of its owner's may want more than a config
        made = dict(type(model)(copy.deepcopy(model.config)).named_parameters())
        return [
            Misfit(name, list(weight.shape), list(made[name].shape))
            for name, weight in model.named_parameters()
            if name in made and made[name].shape != weight.shape
        ]
    return []


def told_misfits(found: Sequence[Misfit]) -> str:
    """The first few of them, in words."""
    few = ", ".join(f"{one.name} {one.shape} where the config says {one.made}" for one in found[:_FEW_MISFITS])
    return few + (f", and {len(found) - _FEW_MISFITS} more" if len(found) > _FEW_MISFITS else "")
