"""Engines on models opened once, and the bits that one without a cache gives: what random lives of an engine are held to."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

from quire import SamplingParams
from quire.config import EngineConfig
from quire.engine import build
from quire.engine.build import Built
from quire.engine.intake import Intake
from quire.outputs import RequestOutput
from quire.tensors.models.model import CausalModel
from tests.engine.test_llm import Adapted
from tests.tensors.checkpoints import make, tiny_model

FOLDER = Path(tempfile.mkdtemp(prefix="quire-random-"))
KERNELS = functools.cache(lambda: build.choose_kernels("auto", 1))
PAGE = 4
Bits = list[tuple[object, ...]]


@functools.cache
def model_of(kind: str) -> CausalModel:
    """Opened and probed once: engines come and go by the hundred. "adapted" is live, the others are folders'."""
    if kind == "adapted":
        live = tiny_model("llama", num_hidden_layers=2)
        live.model.layers[1].self_attn.k_proj = Adapted(live.model.layers[1].self_attn.k_proj)
        return build.open_model(live, EngineConfig.of({}), KERNELS())
    folder = make(FOLDER / kind, kind, num_hidden_layers=3 if kind == "gemma3_text" else 2, sliding_window=7)
    return build.open_model(folder, EngineConfig.of({}), KERNELS())


def opened(kind: str, **options: Any) -> Built:
    config = EngineConfig.of({"page_size": PAGE, "reserve_bytes": 0, **options})
    source: Any = str(FOLDER / kind) if kind != "adapted" else model_of(kind).transformers_model
    return build._lay_out(source, model_of(kind), config, KERNELS(), 1)


def shut(built: Built) -> None:
    built.engine.masks.close()
    built.grammars.close()
    if built.tier is not None:
        built.tier.close()


def adapter(kind: str) -> Any:
    return model_of(kind).transformers_model.model.layers[1].self_attn.k_proj


def bits(output: RequestOutput) -> Bits:
    scores = (output.prompt_logprobs, output.prompt_top_logprobs)
    return [(one.token_ids, one.logprobs, one.top_logprobs, one.cumulative_logprob, one.finish_reason, scores) for one in output.outputs]


@functools.cache
def plain_engine(kind: str, codec: str | None) -> Built:
    return opened(kind, kv_codec=codec, prefix_sharing=False, cache_bytes=2**21)


@functools.lru_cache(20_000)
def expected(kind: str, codec: str | None, adapters: tuple[object, ...], prompt: tuple[int, ...], params: SamplingParams) -> Bits:
    """What an engine without a cache gives, with this request alone in it."""
    built, outputs = plain_engine(kind, codec), list[RequestOutput]()
    request = Intake(built).request(prompt, params, None, 0, None)
    built.engine.add(request, lambda event: outputs.append(event.output) if event.output is not None else None)
    while not outputs:
        built.engine.step()
    return bits(outputs[0].raise_for_error())
