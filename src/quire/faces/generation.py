"""What a call of transformers' `generate` asks for, told in the engine's terms or refused by name."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import GenerationConfig

from quire.config import MAX_DRAFTS
from quire.errors import InvalidRequestError
from quire.faces.checked import integer
from quire.params import MAX_SEQUENCES_PER_REQUEST, SamplingParams

_HONOURED = frozenset((  # here, or by transformers before it hands over
    "input_ids", "attention_mask", "bad_words_ids", "bos_token_id", "do_sample", "eos_token_id", "max_length", "max_new_tokens", "min_length",
    "min_new_tokens", "min_p", "num_return_sequences", "output_logits", "output_scores", "pad_token_id", "prompt_lookup_num_tokens",
    "repetition_penalty", "sequence_bias", "return_dict_in_generate", "stop_strings", "suppress_tokens", "temperature", "top_k", "top_p",
))  # fmt: skip
_NO_EFFECT = frozenset(("transformers_version", "compile_config", "disable_compile", "early_stopping", "length_penalty"))
_NEUTRAL: dict[str, Any] = {  # of all others, beside None, where it is not False; "hybrid", in checkpoints, is what transformers resets
    "use_cache": True, "cache_implementation": "hybrid", "logits_processor": [], "stopping_criteria": [], "num_beams": 1, "num_beam_groups": 1,
    "guidance_scale": 1, "typical_p": 1, "encoder_repetition_penalty": 1, "epsilon_cutoff": 0, "eta_cutoff": 0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "diversity_penalty": 0, "penalty_alpha": 0,
}  # fmt: skip


def what_is_asked(given: GenerationConfig | None, own: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What was asked, merged as transformers does: a keyword goes before the config given, and that before the model's own."""
    if not isinstance(given, GenerationConfig | None):
        raise InvalidRequestError("generation_config", given, "a GenerationConfig, or None")
    known, theirs, ours = vars(GenerationConfig()), vars(own), vars(given) if given else {}  # type: ignore[no-untyped-call]
    asked = {name: theirs.get(name) if ours.get(name) is None else ours[name] for name in known}  # not all that a checkpoint's config may hold
    asked |= {name: value for name, value in ours.items() if name not in known and value != theirs.get(name)} | kwargs
    for name, value in asked.items():
        neutral = _NEUTRAL.get(name, False)
        same = value is neutral if isinstance(neutral, bool) else value == neutral
        if not (name in _HONOURED or name in _NO_EFFECT or name.startswith("_") or value is None or same):
            raise InvalidRequestError(name, value, "left out, or without effect: the engine does not do it")
    return asked


def sampling(config: Any, width: int, vocab_size: int) -> SamplingParams:
    """A config that transformers has settled, for prompts padded to `width`, as the engine takes it."""
    eos, max_tokens = ids_of(config.eos_token_id), integer("max_length", config.max_length) - width
    given, penalty = config.sequence_bias or (), config.repetition_penalty or 1.0
    biases = {tuple(ids): bias for ids, bias in (given.items() if isinstance(given, dict) else given)}
    words = {tuple(word) for word in config.bad_words_ids or ()} - {(i,) for i in eos}  # transformers lets them end
    for field, sequences in (("sequence_bias", biases), ("bad_words_ids", words)):
        if any(len(ids) != 1 for ids in sequences):
            raise InvalidRequestError(field, getattr(config, field), "of single tokens: the engine has no bias for longer sequences")
        if any(not 0 <= i < vocab_size for (i,) in sequences):
            raise InvalidRequestError(field, getattr(config, field), f"of token ids from 0 to {vocab_size - 1}")
    if biases and penalty != 1.0:
        raise InvalidRequestError("sequence_bias", given, "left out with a repetition_penalty, which transformers applies behind it")
    banned = {*ids_of(config.suppress_tokens), *(i for (i,) in words), *(i for (i,), bias in biases.items() if bias == -math.inf)}
    lookup = None if config.prompt_lookup_num_tokens is None else integer("prompt_lookup_num_tokens", config.prompt_lookup_num_tokens)
    num_rows = integer("num_return_sequences", config.num_return_sequences)
    if not 1 <= num_rows <= MAX_SEQUENCES_PER_REQUEST:
        raise InvalidRequestError("num_return_sequences", num_rows, f"an integer from 1 to {MAX_SEQUENCES_PER_REQUEST}")
    drawn = {name: value for name in ("temperature", "top_k", "top_p", "min_p") if (value := getattr(config, name)) is not None}
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min(max_tokens, max(0, (config.min_length or 0) - width)),
        repetition_penalty=torch.tensor(penalty, dtype=torch.float32).item(),  # as it meets transformers' logits
        logit_bias={i: torch.tensor(bias, dtype=torch.float32).item() for (i,), bias in biases.items() if i not in banned},
        allowed_token_ids=[i for i in range(vocab_size) if i not in banned] if banned else None,
        stop_token_ids=[i for i in eos if 0 <= i < vocab_size],
        ignore_eos=True,
        n=num_rows,
        prompt_lookup_num_tokens=None if lookup is None else min(lookup, MAX_DRAFTS),
        return_logits=bool(config.return_dict_in_generate and (config.output_logits or config.output_scores)),
        **(drawn if config.do_sample else {"temperature": 0.0}),
    )


def ids_of(value: Any) -> list[int]:
    """Token ids that a config has as one number, as several, or not at all."""
    return [] if value is None else torch.as_tensor(value).reshape(-1).tolist()
