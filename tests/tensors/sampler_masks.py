"""Packed masks for the sampler's tests."""

from __future__ import annotations

import random
from collections.abc import Collection

import torch
from torch import Tensor


def random_mask(rng: random.Random, vocab_size: int) -> Tensor:
    """Few, many or single tokens, in sixteens of all kinds; the bits and words beyond the vocabulary are set."""
    share = rng.choice([0.0, 0.02, 0.5, 0.98])
    allowed = {i for i in range(vocab_size) if rng.random() < share} | {rng.randrange(vocab_size)} | set(rng.choice([(), range(16, 48)]))
    return mask_of(allowed | set(range(vocab_size, vocab_size + 70)), vocab_size + 70)


def mask_of(allowed: Collection[int], vocab_size: int) -> Tensor:
    words = [sum(1 << i - base for i in allowed if base <= i < base + 32) for base in range(0, vocab_size, 32)]
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)
