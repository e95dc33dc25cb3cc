"""Masks: the tokens that may be drawn at all, as bits."""

from __future__ import annotations

import math
import random

import pytest
import torch

from quire.tensors import native
from tests.tensors.sampler_masks import mask_of
from tests.tensors.test_sampler import backend, draw, random_logits, restored_isa, row

__all__ = ["backend", "restored_isa"]  # fixtures


@pytest.mark.parametrize("vocab_size", [1, 15, 16, 17, 31, 32, 33, 600])
def test_a_mask_leaves_its_tokens_alone(backend: str, vocab_size: int, restored_isa: None) -> None:
    rng = random.Random(vocab_size)
    for isa in native.isas() if backend == "native" else ("any",):
        if backend == "native":
            native.set_isa(isa)
        for _ in range(20):
            logits = random_logits(rng, 1, vocab_size)
            allowed = set(rng.sample(range(vocab_size), rng.randint(0, min(vocab_size, 40)))) | set(
                range(16, vocab_size) if rng.random() < 0.3 else ()
            )
            mask = mask_of(allowed | set(range(vocab_size, 640)), 640)
            params = {
                "temperature": rng.choice([0.0, 1.0]),
                "allowed_token_ids": rng.choice([None, range(vocab_size // 2, vocab_size)]),
                "logprobs": 1,
            }
            masked = row(vocab_size, seed=rng.randrange(99), **params)._replace(mask=mask)
            by_hand = logits.clone()
            by_hand[0, [i for i in range(vocab_size) if i not in allowed]] = -math.inf
            drawn, expected = draw(backend, logits, [masked])[0], draw(backend, by_hand, [masked._replace(mask=None)])[0]
            assert (drawn.token_id, drawn.failure) == (expected.token_id, expected.failure)
            if drawn.ok:
                assert drawn.logprob == draw(backend, logits, [masked._replace(mask=None, given=drawn.token_id)])[0].logprob, "of the raw logits"


def test_masks_come_after_penalties_and_bias_and_short_ones_are_refused(backend: str) -> None:
    logits = torch.arange(40.0)[None]
    biased = row(40, temperature=0.0, logit_bias={39: 1000.0, 5: 100.0})
    assert draw(backend, logits, [biased._replace(mask=mask_of({5, 7}, 40))])[0].token_id == 5
    assert draw(backend, logits, [row(40, banned=[7], temperature=0.0)._replace(mask=mask_of({5, 7}, 40))])[0].token_id == 5
    for wrong in (mask_of({1}, 32), mask_of({1}, 64)[None], mask_of({1}, 64).long(), torch.zeros(4, dtype=torch.int32)[::2]):
        with pytest.raises(ValueError, match="mask"):
            draw(backend, logits, [biased._replace(mask=wrong)])
