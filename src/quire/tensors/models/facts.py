"""What is read off a model and its config before anything runs."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from quire.errors import UnsupportedModelError
from quire.tensors.models.ropes import unstretched_len
from quire.tensors.packed import PackedWeight

MAX_TOKEN_ID = 2**31 - 1
_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config of the language model proper, within a composite config or the config itself."""
    return model.config.get_text_config(decoder=True)


def ordinary_tokens(config: PreTrainedConfig, count: int) -> list[int]:
    """The ids below `count` without those the config names: a model warns of a pad, and takes some for an image to come."""
    named = [value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_ids", "_token_index"))]
    special = {token for value in named for token in (value if isinstance(value, (list, tuple)) else [value])}
    return [token for token in range(count) if token not in special]


def eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """Of its config, the config of the language model proper, and the generation config; those that no vocabulary has, as -1 for none, are left out.

    Raises UnsupportedModelError for what is no id and no list of them: a sequence would not end where it should.
    """
    found: set[int] = set()
    for source in (model.config, text_config(model), getattr(model, "generation_config", None)):
        given = getattr(source, "eos_token_id", None)
        ids = given if isinstance(given, (list, tuple)) else [] if given is None else [given]
        if any(type(token_id) is not int for token_id in ids):  # transformers checks a config's, not a generation config's
            raise UnsupportedModelError(
                f"{model.config.model_type}: eos_token_id={given!r} in its {type(source).__name__}: must be an id, or a list of ids"
            )
        found.update(ids)
    return frozenset(token_id for token_id in found if 0 <= token_id <= MAX_TOKEN_ID)


def context_len(config: PreTrainedConfig, *, stretched: bool = False) -> int:
    """The longest position + 1, as far as rope is the same for all (ropes.py), or has been made so. Raises UnsupportedModelError for a config that
    names none."""
    for field in _CONTEXT_FIELDS:
        try:
            value = getattr(config, field, None)
        except NotImplementedError:  # how XLNet says that it has no limit
            continue
        if isinstance(value, int) and value > 0:
            return value if stretched else min(value, unstretched_len(config) or value)
    raise UnsupportedModelError(f"{config.model_type}: its config names no context length ({', '.join(_CONTEXT_FIELDS)})")


def check_context(model: PreTrainedModel, served: int) -> None:
    """Raise UnsupportedModelError where an owner has made the context of a model's config shorter than what is served of it."""
    if (length := context_len(text_config(model))) < served:
        raise UnsupportedModelError(f"{model.config.model_type}: its config has a context of {length} tokens, and {served} are served: open it anew")


def output_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """The module that makes logits of final hidden states, None where there is none."""
    found: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return found


def weight_bytes(model: PreTrainedModel) -> int:
    """Of parameters and buffers, shared ones once."""
    held: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) is PackedWeight:  # many in one storage
            held[id(tensor)] = tensor.num_bytes
        else:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(held.values())
