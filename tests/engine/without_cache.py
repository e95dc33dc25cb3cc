"""What a request gets from an engine that has no cache, when there is nothing but it: the oracle of random lives of a whole engine.

Models by name: a family's; "again", the same but for its weights, so that both may share a folder of pages; "live", one of its owner's with
adapters, of which the engine and the oracle have one each.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from quire import LLM, RequestOutput, SamplingParams
from quire.config import EngineConfig
from quire.engine.build import open_model
from quire.engine.kernels import choose_kernels
from quire.tensors.models.model import CausalModel
from tests.engine.by_hand import ByHand
from tests.tensors.checkpoints import make, tiny_model

MOST_TOKENS = 56  # of a prompt and its output
WINDOWS = {"sliding_window": 8}


class Adapted(torch.nn.Module):
    """A layer's MLP with two adapters, of which one may be active."""

    def __init__(self, inner: torch.nn.Module, seed: int) -> None:
        super().__init__()
        self.inner, self.active = inner, ""
        made = torch.Generator().manual_seed(seed)
        self.a, self.b = (torch.nn.Parameter(torch.randn(64, 64, generator=made) / 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x)
        return out if not self.active else out + x @ getattr(self, self.active)


class Models:
    """The models, each loaded once, and what each of them answers without a cache, each answer computed once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._answers: dict[object, RequestOutput] = {}

    @cache  # noqa: B019
    def source(self, name: str, whose: str) -> Any:
        """What an `LLM` is made of: a folder, or a live model, one for the engine and another for the oracle."""
        if name == "live":
            model = tiny_model("llama")
            for seed, layer in enumerate(model.model.layers):
                layer.mlp = Adapted(layer.mlp, seed)
            return model
        family, _, again = name.partition(" ")
        windows = WINDOWS if family == "gemma3_text" else {}
        return make(self._root / name, family, torch.bfloat16 if windows else torch.float32, seed=len(again), **windows)

    @cache  # noqa: B019
    def loaded(self, name: str, whose: str) -> CausalModel:
        config = EngineConfig()
        model = open_model(self.source(name, whose), config, choose_kernels(config.backend, 1))
        model.close = lambda: None  # type: ignore[method-assign]  # the next engine takes it too
        return model

    @cache  # noqa: B019
    def sizes(self, name: str, codec: str | None, page_size: int) -> tuple[int, int]:
        """(bytes of a page, pages that the longest request may take)."""
        one = ByHand(
            self.loaded(name, "engine"), self.source(name, "engine"), kv_codec=codec, page_size=page_size, max_model_len=MOST_TOKENS, max_sequences=1
        )
        try:
            return one.llm.info.page_bytes, one.cache.pages_to_finish(MOST_TOKENS)
        finally:
            one.close()

    @cache  # noqa: B019
    def _oracle(self, name: str, codec: str | None) -> LLM:
        options = {"kv_codec": codec, "max_model_len": MOST_TOKENS, "prefix_sharing": False, "max_sequences": 1}
        return ByHand(self.loaded(name, "oracle"), self.source(name, "oracle"), **options).llm

    def answer(self, name: str, codec: str | None, adapter: str, prompt: list[int], params: SamplingParams) -> RequestOutput:
        """What a request of one branch gets when there is nothing but it."""
        key = (name, codec, adapter, tuple(prompt), params)
        if key not in self._answers:
            oracle = self._oracle(name, codec)
            if name == "live":
                switch(self.source(name, "oracle"), adapter)
            (self._answers[key],) = oracle.generate(prompt, params)
        return self._answers[key]


def switch(model: torch.nn.Module, adapter: str) -> None:
    for module in model.modules():
        if isinstance(module, Adapted):
            module.active = adapter


def check_bits(output: RequestOutput, answers: list[RequestOutput]) -> None:
    """All of each branch, or its beginning where it was cancelled."""
    for branch, answer in zip(output.outputs, answers, strict=True):
        (expected,) = answer.outputs
        length = len(branch.token_ids)
        assert branch.token_ids == expected.token_ids[:length]
        assert (branch.logprobs or []) == (expected.logprobs or [])[:length]
        assert (branch.top_logprobs or []) == (expected.top_logprobs or [])[:length]
        if branch.finish_reason != "cancelled":
            assert (length, branch.finish_reason) == (len(expected.token_ids), expected.finish_reason)
            assert output.prompt_logprobs == answer.prompt_logprobs
            assert (output.embedding is None) == (answer.embedding is None)
            assert answer.embedding is None or torch.equal(output.embedding, answer.embedding)  # type: ignore[arg-type]
