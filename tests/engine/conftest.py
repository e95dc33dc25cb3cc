"""Tiny checkpoints with a tokenizer, each made once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.tensors.checkpoints import VOCAB, make, one_thread

__all__ = ["one_thread"]
Checkpoint = Callable[..., str]


def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    text = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"] * 20
    core.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """checkpoint(family, dtype=float32, **config): a folder with a model and a tokenizer."""
    root, made = tmp_path_factory.mktemp("checkpoints"), {}

    def get(family: str = "llama", dtype: torch.dtype = torch.float32, **config: object) -> str:
        key = repr((family, dtype, sorted(config.items())))
        if key not in made:
            made[key] = make(Path(root) / str(len(made)), family, dtype, **config)
            tokenizer().save_pretrained(made[key])
        return made[key]

    return get
