"""The slot face: prefill, insert, generate, free, for whoever brings a scheduler of their own (the verbs are JetStream's).

    prefill(ids) ──> Prefix ──insert──> slot 0  [ p0 | p1 | c2 ]     p: the prefix's own pages, shared by every slot it is put in
                       │                                             c: its last, incomplete page, a copy that the slot goes on filling
                       └───────insert──> slot 3  [ p0 | p1 | d2 ]

Every token comes out once: a slot's first one from `prefill` or `insert`, each later one from `generate`, which moves all slots one token on.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from quire.config import EngineConfig
from quire.engine.build import EngineInfo
from quire.engine.home import stays_here
from quire.engine.manual import Held, ManualEngine
from quire.errors import InvalidRequestError
from quire.faces.checked import MOST_SEED, integer, integers
from quire.params import SamplingParams
from quire.request import check_fits, check_prompt
from quire.tensors.sampler import Sampled

MAX_SLOTS = 2**15
GREEDY = SamplingParams(temperature=0.0)
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "allowed_token_ids")
SAMPLING_FIELDS = frozenset(("temperature", "top_k", "top_p", "min_p", "seed", *PENALTIES))


class Prefix:
    """A computed prompt. Its pages are held for as long as the object lives.

    Attributes: `token_ids`, and `next_token`, drawn with the params' seed.
    """

    def __init__(self, engine: ManualEngine, held: Held, drawn: Sampled) -> None:
        assert drawn.logits is not None
        self.token_ids = tuple(held.sequence.tokens)
        self.next_token = drawn.token_id
        self._engine, self._held, self._logits = engine, held, drawn.logits

    __reduce_ex__ = stays_here


class Slots:
    """A model with a fixed number of places for sequences, moved on one token at a time by the caller. Thread-safe: one call at a time.

    Args:
        model: a hub id, a local folder or a live `PreTrainedModel`, whose weights may change only while nothing is held.
        num_slots: how many sequences there may be, >= 1.
        **options: fields of `EngineConfig`; not those that belong to its queue, its disk or its drafts: a call draws one token for each slot.

    Raises:
        ConfigError, ModelError: as `LLM`.
    """

    def __init__(self, model: str | os.PathLike[str] | PreTrainedModel, num_slots: int, **options: Any) -> None:
        for name in ("max_sequences", "max_waiting", "cache_dir", "cache_dir_bytes", "cache_layout", "reserve_bytes", "prompt_lookup_num_tokens"):
            if name in options:
                raise InvalidRequestError(name, options[name], "left out: the caller of slots decides what runs, and what is held")
        if isinstance(num_slots, bool) or not isinstance(num_slots, int) or not 1 <= num_slots <= MAX_SLOTS:
            raise InvalidRequestError("num_slots", num_slots, f"an integer from 1 to {MAX_SLOTS}")
        config = EngineConfig.of({"max_sequences": 2 * num_slots, **options})  # room for as many prefixes
        self._engine = ManualEngine(os.fspath(model) if isinstance(model, os.PathLike) else model, config)
        self._num_slots = num_slots
        self._slots: dict[int, Held] = {}
        self._moving = threading.RLock()
        self._close = weakref.finalize(self, self._engine.close)

    @property
    def info(self) -> EngineInfo:
        """What the options resolved to."""
        return self._engine.built.info

    @property
    def active(self) -> list[int]:
        """The slots that hold a sequence, lowest first."""
        return sorted(self._slots)

    def prefill(self, token_ids: Sequence[int], params: SamplingParams | None = None) -> Prefix:
        """Compute a prompt, in chunks of `max_tokens_per_step`; slots stay where they are. What is cached of it is not computed again.

        params: how this prefix and its slots draw; `None` is greedy. Fields that end a sequence, or ask for more than tokens, are refused.

        Raises:
            InvalidRequestError: a prompt or params that cannot be. OutOfPagesError: slots and prefixes leave too few pages. StepError: the
            model's forward failed. Nothing has changed then.
        """
        params = GREEDY if params is None else params
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError("params", params, "a SamplingParams, or None")
        _refuse_other_fields(params)
        prompt = tuple(integers("prompt", token_ids, "a list of token ids"))
        check_prompt(prompt, SamplingParams(max_tokens=1), self._engine.built.limits)
        cache = self._engine.built.engine.scheduler.cache
        check_fits(len(prompt), cache.pages_to_finish(len(prompt)), cache.pool.num_usable)
        held, drawn = self._engine.prefill(prompt, params)
        prefix = Prefix(self._engine, held, drawn)
        weakref.finalize(prefix, self._engine.release_later, held).atexit = False
        return prefix

    def insert(self, prefix: Prefix, slot: int, *, seed: int | None = None) -> int:
        """Put a prefix into a free slot and return the slot's first token: `prefix.next_token`, or with a seed one drawn anew.

        From here on the slot draws with that seed, or the prefix's.

        Raises:
            InvalidRequestError: there is no such slot, or it is taken; or the prefix is another's, or made by weights that have changed since.
            OutOfPagesError: there is no page for its copy of the last one.
        """
        slot = integer("slot", slot)
        return self.bulk_insert(prefix, [slot], seeds=None if seed is None else [integer("seed", seed, most=MOST_SEED)])[slot]

    def bulk_insert(self, prefix: Prefix, slots: Sequence[int], *, seeds: Sequence[int] | torch.Tensor | None = None) -> dict[int, int]:
        """`insert` one prefix into several slots, all or none; returns each slot's first token. Raises as `insert`."""
        if not isinstance(prefix, Prefix) or prefix._engine is not self._engine:
            raise InvalidRequestError("prefix", prefix, "one that these slots' own prefill gave")
        slots = integers("slots", slots, "a list of slots")
        seeds = None if seeds is None else integers("seeds", seeds, most=MOST_SEED)
        if seeds is not None and len(seeds) != len(slots):
            raise InvalidRequestError("seeds", seeds, f"one for each of the {len(slots)} slots")
        for seed in seeds or ():
            replace(prefix._held.state.params, seed=seed)  # refuses what no seed can be
        with self._alone:
            if len(set(slots)) != len(slots) or any(not 0 <= slot < self._num_slots or slot in self._slots for slot in slots):
                raise InvalidRequestError("slots", list(slots), f"different free ones from 0 to {self._num_slots - 1}; {self.active} are taken")
            sisters = self._engine.fork(prefix._held, prefix._logits, seeds or [prefix._held.state.seed] * len(slots))
            self._slots.update({slot: held for slot, (held, _) in zip(slots, sisters, strict=True)})
            return {slot: held.take(token) for slot, (held, token) in zip(slots, sisters, strict=True)}

    def generate(self) -> dict[int, int]:
        """Move every slot one token on: {slot: its next token}. One forward, and one copy of what was drawn to the host, serve all.

        Raises:
            OutOfPagesError: free a slot first. InvalidRequestError: a slot is at the context's end. StepError, NonFiniteLogitsError: the forward
            failed, of the slots that the error names. Nothing has happened then, and the same call may be made again, without them once they
            are freed; so it may when it was broken off (Ctrl-C).
        """
        with self._alone:
            slots, context_len = self.active, self._engine.built.limits.context_len
            for slot in slots:
                if len(self._slots[slot].sequence.tokens) >= context_len:
                    raise InvalidRequestError("slot", slot, f"freed: it is at the end of the model's context of {context_len} tokens")
            drawn = self._engine.step({f"slot {slot}": self._slots[slot] for slot in slots}) if slots else []
            return {slot: self._slots[slot].take(token) for slot, token in zip(slots, drawn, strict=True)}

    def free(self, slot: int) -> None:
        """Let a slot's sequence go. Its complete pages stay cached until something else needs room, but for those behind NaN logits.

        Raises InvalidRequestError if it is free.
        """
        with self._alone:
            if integer("slot", slot) not in self._slots:
                raise InvalidRequestError("slot", slot, f"one that is taken: {self.active}")
            self._engine.release(self._slots.pop(slot))

    def check_integrity(self) -> None:
        """Raise IntegrityError if an invariant of the cache does not hold."""
        self._engine.check_integrity()

    def close(self) -> None:
        """Let everything go and leave a live model as it was. A second call does nothing."""
        self._close()

    @property
    def _alone(self) -> AbstractContextManager[object]:
        """For whoever fills, moves or frees slots."""
        self._engine.home.check()  # before the lock, which somebody may have held at the fork
        return self._moving

    __reduce_ex__ = stays_here

    def __enter__(self) -> Slots:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _refuse_other_fields(params: SamplingParams) -> None:
    for field in fields(SamplingParams):
        value = getattr(params, field.name)
        if field.name not in SAMPLING_FIELDS and value != (() if field.name in ("stop", "stop_token_ids") else field.default):
            raise InvalidRequestError(field.name, value, "left out: slots draw tokens, and their caller decides when to stop")
