"""Filling in the middle: a prompt and what comes after it, in the order a model with tokens for it was trained on."""

from __future__ import annotations

from typing import Any

from quire.server.errors import refused
from quire.server.token_texts import encoded

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
        ServerError: the tokenizer has no tokens for it, or cannot encode one of the two.
    """
    ids = None if hf is None else _ids(hf)
    if ids is None:
        raise refused("suffix", "must be left out: this model has no fill-in-the-middle tokens")
    start = hf("", verbose=False).input_ids  # what it puts before every text
    before = encoded(hf, prompt, "prompt", add_special_tokens=False) if isinstance(prompt, str) else prompt
    return [*start, ids[0], *before, ids[1], *encoded(hf, suffix, "suffix", add_special_tokens=False), ids[2]]


def _ids(hf: Any) -> list[int] | None:
    vocab = hf.get_vocab()
    return next(([vocab[token] for token in tokens] for tokens in TOKENS if all(token in vocab for token in tokens)), None)
