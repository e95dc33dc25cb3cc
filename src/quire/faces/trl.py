"""TRL's rollouts on Quire's engine: `GRPOTrainer(..., rollout_func=QuireRollouts())`, and the model in training generates its own completions.

TRL itself is not imported: what is read of a trainer are the attributes named here, as TRL 1.0 to 1.16 have them. (Before 1.0 a rollout_func ran
behind vLLM alone.) The trainer's sampler has repeated each prompt `num_generations` times, so one completion is due for each prompt that comes;
repetitions side by side run as one request, which computes its prompt once.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from transformers import PreTrainedModel

from quire.engine.llm import LLM
from quire.errors import InvalidRequestError
from quire.params import SamplingParams


class QuireRollouts(AbstractContextManager["QuireRollouts"]):
    """A `rollout_func`. It keeps one engine on the trainer's live model, without a copy of the weights, from the first rollout until `close`.

    Args:
        **options: fields of `EngineConfig`; `cache_bytes` bounds what generation takes beside training.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._llm: LLM | None = None
        self._model: PreTrainedModel | None = None

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        """Complete every prompt with the weights as they are now.

        Args:
            prompts: texts, or conversations (lists of messages), to which the trainer's own chat template is applied.
            trainer: a `GRPOTrainer`, for its model, its processing class and `args`: temperature, top_p, top_k, min_p, repetition_penalty and
                max_completion_length. Seeds come of torch's global generator, which the trainer has seeded for this process.

        Returns:
            A list for each prompt, in order, under `prompt_ids`, `completion_ids` (an end-of-sequence token included) and `logprobs`: of the
            chosen tokens, log_softmax(logits / temperature), as the trainer computes them, before top_k, top_p, min_p or a penalty.

        Raises InvalidRequestError for settings that the engine would not follow, before anything runs; ConfigError and ModelError as `LLM` does.
        """
        params, prompt_ids = _sampling(trainer), _tokenized(prompts, trainer)
        runs = [(list(ids), len(list(same))) for ids, same in groupby(map(tuple, prompt_ids))]
        seeds = torch.randint(2**62, (len(runs),)).tolist()
        llm = self._engine(trainer)
        llm.reset_cache()  # the optimizer has stepped since; changes through .data, which FSDP and some adapters make, leave no trace to notice
        each = [replace(params, n=count, seed=seed) for (_, count), seed in zip(runs, seeds, strict=True)]
        outputs = llm.generate([ids for ids, _ in runs], each)
        done = [one for output in outputs for one in output.raise_for_error().outputs]
        return {"prompt_ids": prompt_ids, "completion_ids": [one.token_ids for one in done], "logprobs": [one.logprobs for one in done]}

    def close(self) -> None:
        """End the engine and let go of the model; a later rollout makes another. A second call does nothing."""
        if self._llm is not None:
            self._llm.close()
        self._llm = self._model = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes an engine of its own."""
        return {**vars(self), "_llm": None, "_model": None}

    def __exit__(self, *_: object) -> None:
        self.close()

    def _engine(self, trainer: Any) -> LLM:
        model = trainer.accelerator.unwrap_model(trainer.model)
        if not isinstance(model, PreTrainedModel):
            raise InvalidRequestError("model", type(model).__name__, "a PreTrainedModel; merge or unload what wraps it")
        if self._llm is None or model is not self._model:
            self.close()
            self._llm, self._model = LLM(model, **self._options), model
        return self._llm


def _sampling(trainer: Any) -> SamplingParams:
    args = trainer.args
    refused = {name: getattr(args, name, None) for name in ("use_vllm", "generation_kwargs", "bf16", "fp16")}
    refused |= {"tools": getattr(trainer, "tools", None), "environment_factory": getattr(trainer, "environment_factories", None)}
    for field, value in refused.items():
        if value:
            limit = "off: the engine generates one turn, by the sampling fields of args, in the dtype of the weights (autocast wraps their forward)"
            raise InvalidRequestError(field, value, limit)
    return SamplingParams(
        max_tokens=args.max_completion_length,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k or 0,
        min_p=args.min_p or 0.0,
        repetition_penalty=args.repetition_penalty,
        stop_token_ids=_eos_token_ids(trainer),
        logprobs=0,
        scaled_logprobs=True,
    )


def _eos_token_ids(trainer: Any) -> list[int]:
    """The tokenizer's, and of later trainers' own list all; the model's are the engine's own."""
    ids = getattr(trainer, "eos_token_ids", None) or [trainer.processing_class.eos_token_id]
    return [token_id for token_id in ids if token_id is not None]


def _tokenized(prompts: Sequence[Any], trainer: Any) -> list[list[int]]:
    """Token ids of each prompt, as the trainer makes them where there is no rollout_func."""
    if not prompts:
        return []
    if isinstance(prompts[0], str):
        ids = trainer.processing_class(text=list(prompts))["input_ids"]
    else:
        ids = trainer.processing_class.apply_chat_template(
            conversation=list(prompts),
            chat_template=getattr(trainer, "chat_template", None),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **(trainer.args.chat_template_kwargs or {}),
        )["input_ids"]
    return [list(row) for row in ids]
