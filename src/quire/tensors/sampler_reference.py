"""Sampling in plain torch, a row at a time: the oracle of the native kernels, and the fallback without them."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from quire.outputs import TopLogprob
from quire.tensors.sampler_state import Row, Sampled

_MASK = 0xFFFFFFFF
_LARGEST = torch.finfo(torch.float32).max
_LEAST_RELATIVE = -27.0  # a Gumbel variate of 32 bits lies in [-3.14, 22.88]: a token this far below the most likely one is never drawn


def threefry2x32(key: tuple[int, int], first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Args:
        key: two 32-bit words.
        first, second: int64 tensors of one shape holding the counter's 32-bit words.

    Returns:
        The two words of output, as int64 in [0, 2**32).
    """
    words = (*key, 0x1BD11BDA ^ key[0] ^ key[1])
    a, b = first + words[0], (second + words[1]) & _MASK
    for i in range(1, 6):
        for turn in (13, 15, 26, 6) if i % 2 else (17, 29, 16, 24):
            a = a + b  # 64 bits have room for all its carries
            b = ((b << turn | b >> (32 - turn)) ^ a) & _MASK
        a, b = a + words[i % 3], (b + words[(i + 1) % 3] + i) & _MASK
    return a & _MASK, b


def noise_words(seed: int, position: int, token_ids: Tensor) -> Tensor:
    """The 32 random bits of each token: a function of (seed, position, token) alone.

    Keyed by the seed. Of each 32 tokens the first 16 take the first word of counter (token // 32 * 16 + token % 16, position), the others the
    second. token_ids: int64 [N]; result int64 [N] in [0, 2**32).
    """
    counter = (token_ids >> 5 << 4) | (token_ids & 15)
    first, second = threefry2x32((seed & _MASK, seed >> 32), counter, torch.full_like(counter, position))
    return torch.where(token_ids & 16 == 0, first, second)


def gumbel(words: Tensor) -> Tensor:
    """-log(-log(1 - v)) with v = (word + 1/2) / 2**32, in float64."""
    v = (words.double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-v))


class ReferenceSampler:
    """See `Sampler`. Works on the device of the logits; tested on the CPU alone."""

    def run(self, logits: Tensor, rows: Sequence[Row]) -> list[Sampled]:
        return [_sample(logits[i].float(), row) for i, row in enumerate(rows)]


def _failure(logits: Tensor) -> Sampled | None:
    if not bool((logits < math.inf).all()):  # false for NaN
        return Sampled(-1, failure="not_finite")
    return Sampled(-1, failure="nothing_left") if bool((logits == -math.inf).all()) else None


def _sample(raw: Tensor, row: Row) -> Sampled:
    failed = _failure(raw)
    if failed is not None:
        return failed
    if row.given >= 0:
        return _told(raw, row, row.given)
    logits = edited_logits(raw, row)
    if bool((logits == -math.inf).all()):
        return Sampled(-1, failure="nothing_left")
    token_ids = surviving_ids(logits, row)
    if row.state.inverse_temperature > 0.0:
        relative = _relative(logits, row)[token_ids].double()
        score = relative + gumbel(noise_words(row.state.seed, row.position, token_ids))
        token_ids = token_ids[score == score.max()].amin()
    return _told(raw, row, int(token_ids))


def _told(raw: Tensor, row: Row, token_id: int) -> Sampled:
    """A token with as much of the logprobs as its row asks for."""
    num_top = row.state.params.logprobs
    if num_top is None:
        return Sampled(token_id)
    logprobs = torch.log_softmax(raw.double(), dim=-1)
    order = torch.sort(raw, descending=True, stable=True).indices[:num_top]
    top = [TopLogprob(int(i), _rounded(logprobs[i])) for i in order if raw[i] > -math.inf] if num_top > 0 else None
    return Sampled(token_id, _rounded(logprobs[token_id]), top)


def edited_logits(raw: Tensor, row: Row) -> Tensor:
    """Penalties, bias and masks applied to raw float32 logits [V]; a new tensor. Each is computed in double and rounded once.

    A logit that was finite stays finite unless it is masked.
    """
    state, params, logits = row.state, row.state.params, raw.clone()
    if state.penalised_ids:
        ids, counts = _tensor(state.penalised_ids, raw), _tensor(state.output_counts, raw)
        x = logits[ids].double()
        x = torch.where(x < 0, x * params.repetition_penalty, x / params.repetition_penalty)
        logits[ids] = _clamped(torch.where(counts > 0, x - params.presence_penalty - params.frequency_penalty * counts.double(), x), logits[ids])
    if state.bias_ids:
        ids = _tensor(state.bias_ids, raw)
        bias = torch.tensor(state.biases.tolist(), dtype=torch.float64, device=raw.device)
        logits[ids] = _clamped(logits[ids].double() + bias, logits[ids])
    if state.allowed_ids is not None:
        ids = _tensor(state.allowed_ids, raw)
        allowed = torch.full_like(logits, -math.inf)
        allowed[ids] = logits[ids]
        logits = allowed
    banned = [i for i in row.banned_ids if 0 <= i < logits.numel()]
    logits[banned] = -math.inf
    if row.mask is not None:
        token_ids = torch.arange(logits.numel(), device=raw.device)
        logits[row.mask.to(raw.device)[token_ids >> 5] >> (token_ids & 31) & 1 == 0] = -math.inf
    return logits


def surviving_ids(logits: Tensor, row: Row) -> Tensor:
    """Ids of the tokens that may be drawn, most likely first, ties by lower id: after temperature, top-k, top-p and min-p.

    logits: edited float32 logits [V], not all -inf. With temperature 0 the first most likely token alone.
    """
    params = row.state.params
    if row.state.inverse_temperature == 0.0:
        return logits.argmax().reshape(1)
    order = torch.sort(logits, descending=True, stable=True).indices
    order = order[: int((logits > -math.inf).sum())]
    if params.top_k > 0:
        order = order[: params.top_k]
    relative = _relative(logits, row)[order]
    if params.top_p < 1.0:
        mass = masses(relative).double().cumsum(0)  # exact, see masses
        order = order[: int((mass < params.top_p * mass[-1]).sum()) + 1]
    keep = relative[: len(order)] >= max(row.state.min_relative, _LEAST_RELATIVE)
    return order[keep]


def masses(relative: Tensor) -> Tensor:
    """e**relative rounded to a multiple of 2**-35, so that sums of up to 2**18 masses are exact in double: a cut depends on no order of summation.

    relative: float32, no higher than 0, the logits less the largest one over the temperature; result float32.
    """
    mass, small = relative.exp(), 2.0**-12
    return torch.where(mass < small, (mass + small) - small, mass)


def _relative(logits: Tensor, row: Row) -> Tensor:
    return (logits - logits.max()) * row.state.inverse_temperature


def _clamped(values: Tensor, before: Tensor) -> Tensor:
    return torch.where(before == -math.inf, before, values.clamp(-_LARGEST, _LARGEST).float())


def _tensor(values: array[int], like: Tensor) -> Tensor:
    return torch.tensor(values.tolist(), dtype=torch.int64, device=like.device)


def _rounded(value: Tensor) -> float:
    return float(value.float())
