"""The tensor face: padded prompts in, padded tokens and logits out, for trainers. The engine inside never sees a pad.

    prompt [B, P]        tokens [B, P + G]          logits [B, G, V]
    0 0 a b              0 0 a b | x y s 0          x y s .        s: a stop token, kept with its logits; behind it pads and zeros
    c d e f              c d e f | x y z w          x y z w

The signature is torchtune's (`torchtune.generation.generate`), so that a recipe keeps its call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from quire.engine.llm import LLM
from quire.errors import ConfigError, InvalidRequestError
from quire.faces.checked import MOST_SEED, integer, integers, is_whole
from quire.faces.padding import Rows, Side, rows_of
from quire.params import SamplingParams

Prompts = torch.Tensor | Sequence[Sequence[int] | torch.Tensor]


def generate(
    model: PreTrainedModel | LLM,
    prompt: Prompts,
    *,
    max_generated_tokens: int,
    pad_id: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    stop_tokens: Sequence[int] | None = None,
    rng: torch.Generator | None = None,
    return_logits: bool = True,
    logprobs: bool = False,
    prompt_lens: Sequence[int] | torch.Tensor | None = None,
    padding_side: Side | None = None,
    num_samples: int = 1,
    seeds: Sequence[int] | torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Continue every row of a batch. A row's result has the same bits in any batch, under any padding, for the same seed.

    Args:
        model: a live model, for which an engine is made and closed; or an `LLM`, whose cache then serves call after call and notices by itself
            when an optimizer has changed the weights.
        prompt: integers [B, P], padded with `pad_id` on the left or on the right; a single row [P]; or a ragged list, which comes back left-padded.
        max_generated_tokens: the most tokens to generate for a row, >= 1.
        temperature: 0 takes the most likely token.
        top_k: keep the k most likely tokens; `None` keeps all.
        stop_tokens: ids that end a row; `None` ends no row early, not even at the model's own end-of-sequence token.
        rng: draws one seed for each prompt; `None` takes torch's global generator.
        return_logits: give back logits; without, the second result is `None`.
        logprobs: give back logprobs instead of the logits: log_softmax(logits / temperature) of each chosen token (of the raw logits if greedy),
            before `top_k` cuts anything away, and never more memory than [B, G].
        prompt_lens: [B], how many tokens of each row are real; then a real token may equal `pad_id`.
        padding_side: where the padding is, if that cannot be told.
        num_samples: samples for each prompt, which share its prefill; rows b * num_samples to (b + 1) * num_samples - 1 are prompt b's.
        seeds: [B], instead of `rng`; sample i of prompt b draws with seeds[b] + i.
        **options: fields of `EngineConfig`, for an engine that is made here.

    Returns:
        tokens int64 [B * num_samples, P + G]: the prompt as it came in, what was generated, a stop token included, and behind it `pad_id`.
        logits float32 [B * num_samples, G, V], raw: before temperature and `top_k`; zeros behind a stop token. Or logprobs float32
        [B * num_samples, G], likewise. G <= max_generated_tokens is the longest row's.

    Raises:
        InvalidRequestError: a value that cannot be, or a batch whose padding could be meant in two ways; nothing has run.
    """
    rows = rows_of(prompt, pad_id, prompt_lens, padding_side)
    params = SamplingParams(
        max_tokens=_positive("max_generated_tokens", max_generated_tokens),
        temperature=temperature,
        top_k=0 if top_k is None else _positive("top_k", top_k),
        stop_token_ids=integers("stop_tokens", () if stop_tokens is None else stop_tokens, "token ids"),
        ignore_eos=True,
        n=_positive("num_samples", num_samples),
        logprobs=0 if logprobs else None,
        scaled_logprobs=logprobs,
        return_logits=return_logits and not logprobs,
    )
    each = [replace(params, seed=seed) for seed in _seeds(len(rows.spans), rng, seeds)]
    with _engine(model, options) as llm:
        for token_id in params.stop_token_ids or ():
            if token_id >= llm.info.vocab_size:
                raise InvalidRequestError("stop_tokens", token_id, f"token ids from 0 to {llm.info.vocab_size - 1}")
        outputs = [output.raise_for_error() for output in llm.generate(rows.token_ids(), each)]
    samples = [one for output in outputs for one in output.outputs]
    longest = max(len(one.token_ids) for one in samples)
    tokens = torch.full((len(samples), longest), pad_id, dtype=torch.int64)
    told: torch.Tensor | None = None
    if logprobs or return_logits:
        told = torch.zeros(len(samples), longest, *(() if logprobs else (samples[0].logits.shape[1],)), dtype=torch.float32)
    for i, one in enumerate(samples):
        tokens[i, : len(one.token_ids)] = torch.tensor(one.token_ids)
        if told is not None:
            told[i, : len(one.token_ids)] = torch.tensor(one.logprobs, dtype=torch.float32) if logprobs else one.logits
    device = rows.padded.device
    whole = torch.cat([rows.padded.repeat_interleave(num_samples, dim=0), tokens.to(device)], dim=1)
    return whole, None if told is None else told.to(device)


def score(
    model: PreTrainedModel | LLM, tokens: torch.Tensor, *, pad_id: int = 0, mask: torch.Tensor | None = None, temperature: float = 1.0, **options: Any
) -> torch.Tensor:
    """The logprob of every token of a batch, through the engine's packed forward: the bits that `generate(..., logprobs=True)` gave.

    Args:
        model, **options: as in `generate`.
        tokens: integers [B, W], as `generate` returns them: pads may be on both sides of a row.
        mask: bool [B, W], True for real tokens, one run a row; `None` takes all between the first and the last token that is not `pad_id`.
        temperature: logprobs are log_softmax(logits / temperature); 0 takes the raw logits.

    Returns:
        float32 [B, W]: 0 for pads and for each row's first token, which nothing predicts.

    Raises:
        InvalidRequestError: a row without two real tokens, or whose real tokens are not in one run.
    """
    if not isinstance(tokens, torch.Tensor) or not is_whole(tokens) or tokens.dim() != 2:
        raise InvalidRequestError("tokens", tokens, "a tensor of integers [B, W]")
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.shape == tokens.shape and bool(((mask == 0) | (mask == 1)).all())):
        raise InvalidRequestError("mask", mask, f"True and False, or 1 and 0, of shape {list(tokens.shape)}, like tokens")
    real = tokens.long() != integer("pad_id", pad_id) if mask is None else mask.bool()
    spans = []
    for b, row in enumerate(real.tolist()):
        start, end = (row.index(True), len(row) - row[::-1].index(True)) if any(row) else (0, 0)
        if end - start < 2 or (mask is not None and not all(row[start:end])):
            raise InvalidRequestError("tokens" if mask is None else "mask", f"row {b}", "at least two real tokens, one behind the other")
        spans.append((start, end))
    params = SamplingParams(max_tokens=0, temperature=temperature, prompt_logprobs=0, scaled_logprobs=True)
    with _engine(model, options) as llm:
        outputs = [output.raise_for_error() for output in llm.generate(Rows(tokens, spans).token_ids(), params)]
    logprobs = torch.zeros(tokens.shape, dtype=torch.float32)
    for b, (output, (start, end)) in enumerate(zip(outputs, spans, strict=True)):
        assert output.prompt_logprobs is not None
        logprobs[b, start + 1 : end] = torch.tensor(output.prompt_logprobs[1:], dtype=torch.float32)
    return logprobs.to(tokens.device)


@contextmanager
def _engine(model: PreTrainedModel | LLM, options: dict[str, Any]) -> Iterator[LLM]:
    if isinstance(model, LLM):
        if options:
            raise ConfigError(f"{', '.join(options)}: must be left out with an LLM, which has its own options")
        yield model
    else:
        with LLM(model, **options) as llm:
            yield llm


def _seeds(num_prompts: int, rng: torch.Generator | None, seeds: Sequence[int] | torch.Tensor | None) -> list[int]:
    if seeds is None:
        if not isinstance(rng, torch.Generator | None):
            raise InvalidRequestError("rng", rng, "a torch.Generator, or None")
        drawn: list[int] = torch.randint(2**62, (num_prompts,), generator=rng, device=rng.device if rng else "cpu").tolist()
        return drawn
    if rng is not None:
        raise InvalidRequestError("rng", rng, "None where seeds are given")
    given = integers("seeds", seeds, most=MOST_SEED)
    if len(given) != num_prompts:
        raise InvalidRequestError("seeds", f"{len(given)} seeds", f"one for each of the {num_prompts} prompts")
    return given


def _positive(field: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidRequestError(field, value, "an integer above 0")
    return value
