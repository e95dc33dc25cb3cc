"""transformers' `generate` on Quire's engine: a script moves by one line, `model = quire.Generator(model)`.

transformers prepares each call with its own code (it merges configs, infers the mask, settles lengths, makes its processors) and hands over at the
hook it has for a decoding loop of somebody else's. What ours would not honour is refused by name before, and so is what nobody here has heard of.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.stopping_criteria import StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from quire.engine.home import stays_here
from quire.engine.llm import LLM
from quire.errors import ConfigError, InvalidRequestError
from quire.faces.generation import ids_of, sampling, what_is_asked
from quire.outputs import RequestOutput
from quire.params import SamplingParams

_CHAINED = frozenset(("eval", "train", "to", "cpu", "half", "float", "double", "bfloat16", "requires_grad_"))


class Generator(AbstractContextManager["Generator"]):
    """A model whose `generate` is transformers' own, run by the engine; calls and every other attribute, read or set, are the transformers model's.

    Args:
        model: a live `PreTrainedModel`, served with the weights it has at each call; a hub id or local folder; or an `LLM`, which its owner closes.
        **options: fields of `EngineConfig`, for an engine that is made here.

    Raises ConfigError and ModelError as `LLM` does, and ConfigError for options given with an `LLM`.
    """

    def __init__(self, model: str | os.PathLike[str] | PreTrainedModel | LLM, **options: Any) -> None:
        if isinstance(model, LLM) and options:
            raise ConfigError(f"{', '.join(options)}: must be left out with an LLM, which has its own options")
        self.llm = model if isinstance(model, LLM) else LLM(model, **options)
        self._owns, self._model = not isinstance(model, LLM), self.llm.model

    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: GenerationConfig | None = None, *, streamer: Any = None, **kwargs: Any
    ) -> Any:
        """What `model.generate` of transformers gives: its rows if greedy, as far as both compute the same logits; rows of the same distribution if
        sampled, by draws of their own, the same again after the same `torch.manual_seed`. Nothing is computed for rows that have ended.

        Args:
            inputs: or `input_ids`, integers [B, P]. `attention_mask` of 0 and 1 tells pads from tokens; without, transformers infers it.
            streamer: for a single row; `put` gets the prompt [1, P] and then each token [1].
            **kwargs: `tokenizer` where there are `stop_strings`, and the fields of `GenerationConfig`.

        Returns:
            int64 [R, P + G], R = B * num_return_sequences: prompts as they came, new tokens with what ended them, pads behind. Or, asked for, a
            `GenerateDecoderOnlyOutput`, its `logits` and `scores` tuples of G float32 [R, V], without meaning where a row has ended.

        Raises InvalidRequestError, before anything runs, for an argument whose effect the engine does not have; ValueError where transformers does.
        """
        tokenizer = kwargs.pop("tokenizer", None)
        strings = what_is_asked(generation_config, self._model.generation_config, kwargs)["stop_strings"]
        for ids in (inputs, kwargs.get("input_ids")):
            if ids is not None and not (isinstance(ids, torch.Tensor) and ids.dim() == 2 and ids.numel() and ids.dtype in (torch.int, torch.long)):
                raise InvalidRequestError("input_ids", ids, "integers [B, P], at least one")
            mask = kwargs.get("attention_mask")  # looked at here, as transformers drops one that is all 1, whatever its shape
            if ids is not None and isinstance(mask, torch.Tensor) and mask.shape != ids.shape:
                raise InvalidRequestError("attention_mask", list(mask.shape), f"of shape {list(ids.shape)}, like input_ids")
        if strings is not None and tokenizer is None:
            raise InvalidRequestError("tokenizer", None, "the model's tokenizer where there are stop_strings")
        stops = None if strings is None else StopStringCriteria(tokenizer, strings)
        kwargs |= {"stop_strings": None} if stops else {}  # transformers loses the tokenizer on the way to a loop not its own, and then misses it
        kwargs["custom_generate"] = lambda _, input_ids, **prepared: self._decode(input_ids, streamer=streamer, stops=stops, **prepared)
        return self._model.generate(inputs, generation_config, **kwargs)  # type: ignore[operator]

    def _decode(self, input_ids: torch.Tensor, generation_config: Any, streamer: Any, stops: Any, **prepared: Any) -> Any:
        config, (num_rows, width) = generation_config, input_ids.shape
        params = sampling(config, width, self.llm.info.vocab_size)
        prompts = _prompts(input_ids, prepared.get("attention_mask"))[:: params.n]
        pad = next((i for i in (config.pad_token_id, *ids_of(config.eos_token_id)) if i is not None), None)
        if streamer is not None and num_rows > 1:
            raise InvalidRequestError("streamer", f"{num_rows} rows", "left out for more than one row")
        if stops is not None and pad is None and num_rows > 1:
            raise InvalidRequestError("pad_token_id", None, "given where stop_strings may end some rows before others")
        if stops is not None and self.llm.tokenizer is not None:  # ends rows early; where exactly, the criterion says
            params = replace(params, stop=stops.stop_strings, skip_special_tokens=False)
        each = [replace(params, seed=int(torch.randint(2**62, ())) if config.do_sample else None) for _ in prompts]
        outputs = self.llm.generate(prompts, each) if streamer is None else [self._stream(input_ids, prompts[0], each[0], streamer, stops)]
        rows = [
            (one.logits, one.token_ids[: _stop_at(stops, output.prompt_token_ids, one.token_ids)])
            for output in outputs
            for one in output.raise_for_error().outputs
        ]
        tokens = pad_sequence([torch.tensor(ids) for _, ids in rows], batch_first=True, padding_value=0 if pad is None else int(pad))
        sequences: Any = torch.cat([input_ids.long(), tokens.to(input_ids.device)], dim=1)
        if not config.return_dict_in_generate:
            return sequences
        logits = tuple(pad_sequence([raw[: len(ids)] for raw, ids in rows]).to(input_ids.device)) if params.return_logits else ()
        scores = (prepared["logits_processor"](sequences[:, : width + i], step.clone()) for i, step in enumerate(logits))
        wanted = {"logits": logits if config.output_logits else None, "scores": tuple(scores) if config.output_scores else None}
        return GenerateDecoderOnlyOutput(sequences=sequences, **wanted)  # type: ignore[arg-type]

    def _stream(self, shown: torch.Tensor, prompt: list[int], params: SamplingParams, streamer: Any, stops: Any) -> RequestOutput:
        streamer.put(shown.cpu())
        stream, ids = self.llm.submit(prompt, params), list(prompt)
        try:
            for token in (token for event in stream for token in event.token_ids):
                streamer.put(torch.tensor([token]))
                if _stop_at(stops, ids, [token]):
                    break
                ids.append(token)
        finally:
            stream.cancel()
        streamer.end()
        return stream.wait()

    def close(self) -> None:
        """End the engine that was made here; an `LLM` that was given goes on. A second call does nothing."""
        if self._owns:
            self.llm.close()

    __reduce_ex__ = stays_here

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("llm", "_owns", "_model"):
            super().__setattr__(name, value)
        else:  # a `generation_config` that stayed here would be asked by nobody
            setattr(self._model, name, value)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__.get("_model"), name)
        chained = name in _CHAINED  # `model = model.eval()` must not lose the engine
        return (lambda *args, **kwargs: value(*args, **kwargs) and self) if chained else value


def _prompts(input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[list[int]]:
    if mask is None:
        return input_ids.tolist()
    if mask.shape != input_ids.shape or not ((mask == 0) | (mask == 1)).all():
        raise InvalidRequestError("attention_mask", mask, f"0 and 1 of shape {list(input_ids.shape)}, like input_ids")
    return [ids[real].tolist() for ids, real in zip(input_ids, mask.bool(), strict=True)]


def _stop_at(stops: StopStringCriteria | None, before: list[int], tokens: list[int]) -> int | None:
    """How many of the tokens it takes to the end of the first stop string, which may have begun before them; None without one."""
    if stops is None:
        return None
    ids, reach = before + tokens, stops.maximum_token_len
    return next((n for n in range(1, len(tokens) + 1) if stops(torch.tensor([ids[: len(before) + n][-reach:]]), None)), None)
