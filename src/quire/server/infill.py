"""Filling in the middle: a prompt and what comes after it, in the order a model with tokens for it was trained on."""

from __future__ import annotations

from typing import Any

from quire.server.errors import refused

# What goes before the prompt, before the suffix, and before what is to be written.
TOKENS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen Coder
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek Coder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
)


def infilled(hf: Any, prompt: str | list[int], suffix: str) -> list[int]:
    """The token ids that ask for what is between `prompt` and `suffix`.

    Raises:
        ServerError: the tokenizer has no tokens for it.
    """
    ids = None if hf is None else _ids(hf)
    if ids is None:
        raise refused("suffix", "must be left out: this model has no fill-in-the-middle tokens")
    start = hf("", verbose=False).input_ids  # what it puts before every text
    inside = [hf(text, add_special_tokens=False, verbose=False).input_ids if isinstance(text, str) else text for text in (prompt, suffix)]
    return [*start, ids[0], *inside[0], ids[1], *inside[1], ids[2]]


def _ids(hf: Any) -> list[int] | None:
    vocab = hf.get_vocab()
    return next(([vocab[token] for token in tokens] for tokens in TOKENS if all(token in vocab for token in tokens)), None)
