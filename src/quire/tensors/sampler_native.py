"""Sampling by the C++ kernels (csrc/sampling.h): all rows of a step in one call."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from quire.outputs import TopLogprob
from quire.tensors import native
from quire.tensors.sampler_state import Failure, Row, Sampled, SequenceState

# struct SampleRow of csrc/sampling_args.h, in two halves.
_OF_SEQUENCE = struct.Struct("=QQQQddddiiiiff")
_OF_STEP = struct.Struct("=QQQQiiii")
_NONE: array[int] = array("i")
_FAILURES: tuple[Failure | None, ...] = (None, "not_finite", "nothing_left")


class NativeSampler:
    """See `Sampler`. Holds each thread's scratch, so that a step allocates nothing of the vocabulary's size."""

    def __init__(self, vocab_size: int, num_threads: int) -> None:
        assert _OF_SEQUENCE.size + _OF_STEP.size == native.lib.sample_row_bytes, "sampler_native.py and sampling_args.h disagree"
        self._vocab_size, self._num_threads = vocab_size, num_threads
        self._scratch = torch.empty(num_threads * native.lib.sample_scratch_floats(vocab_size), dtype=torch.float32)

    def run(self, logits: Tensor, rows: Sequence[Row]) -> list[Sampled]:
        banned = [array("i", row.banned_ids) if row.banned_ids else _NONE for row in rows]  # kept until the call returns
        packed = [(row.state.packed or self._of_sequence(row.state)) + _of_step(row, ids) for row, ids in zip(rows, banned, strict=True)]
        return self._call(logits, packed, [row.state.params.logprobs for row in rows])

    def _of_sequence(self, state: SequenceState) -> bytes:
        params, allowed, num_top = state.params, state.allowed_ids, state.params.logprobs
        state.packed = _OF_SEQUENCE.pack(
            state.seed,
            _address(state.bias_ids),
            _address(state.biases),
            0 if allowed is None else _address(allowed),
            params.top_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
            len(state.bias_ids),
            -1 if allowed is None else len(allowed),
            min(params.top_k, self._vocab_size),
            -1 if num_top is None else min(num_top, self._vocab_size),
            state.inverse_temperature,
            state.min_relative,
        )
        return state.packed

    def _call(self, logits: Tensor, packed: list[bytes], num_tops: list[int | None]) -> list[Sampled]:
        logits = logits.contiguous()
        drawn = native.lib.sample(
            native.DTYPE_CODES[logits.dtype],
            logits.data_ptr(),
            self._vocab_size,
            self._vocab_size,
            b"".join(packed),
            min(max((n or 0 for n in num_tops), default=0), self._vocab_size),
            self._scratch.data_ptr(),
            self._scratch.numel(),
            self._num_threads,
        )
        return [_sampled(result, num_top) for result, num_top in zip(drawn, num_tops, strict=True)]


def _of_step(row: Row, banned: array[int]) -> bytes:
    state = row.state
    penalised = state.penalised_ids
    return _OF_STEP.pack(
        _address(penalised) if penalised else 0,
        _address(state.output_counts) if penalised else 0,
        _address(banned) if banned else 0,
        0 if row.mask is None else row.mask.data_ptr(),
        len(penalised),
        len(banned),
        row.position,
        row.given,
    )


def _address(values: array[int] | array[float]) -> int:
    return values.buffer_info()[0]


def _sampled(result: tuple[int, int, float, list[tuple[int, float]]], num_top: int | None) -> Sampled:
    token_id, status, logprob, top = result
    if status != 0:
        return Sampled(-1, failure=_FAILURES[status])
    if num_top is None:
        return Sampled(token_id)
    return Sampled(token_id, logprob, [TopLogprob(*t) for t in top] if num_top > 0 else None)
