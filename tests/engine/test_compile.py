"""Compiled steps: the promises hold among them, nothing is compiled after the start, and what cannot be compiled is refused by name."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from quire import LLM, ConfigError, SamplingParams, UnsupportedModelError
from quire.tensors.models.model import CausalModel
from quire.tensors.models.probe import TOLERANCE
from quire.tensors.models.row_by_row import RowByRow
from quire.tensors.products import ReferenceProducts
from tests.engine.conftest import Checkpoint
from tests.engine.test_transparency import alone, jobs, together
from tests.tensors.checkpoints import VOCAB, tiny_model

CXX = os.environ.get("CXX", "g++")
needs_compiler = pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no C++ compiler ({CXX}) on this machine")
# One kind of layers, two with a window, and one that convolves.
CASES = [("llama", torch.bfloat16), ("gemma3_text", torch.float32), ("lfm2", torch.bfloat16)]
KINDS = {"llama": 1, "gemma3_text": 2, "lfm2": 1}
CHANGES: dict[str, dict[str, Any]] = {"lfm2": {"num_hidden_layers": 1, "layer_types": ["conv"]}}


def compilations() -> dict[str, int]:
    """What torch has compiled, or read from its cache, so far in this process."""
    return {f"{group} {name}": count for group in ("inductor", "aot_autograd", "frames", "recompiles") for name, count in counters[group].items()}


@needs_compiler
@pytest.mark.parametrize(("family", "dtype"), CASES, ids=lambda x: str(x).removeprefix("torch."))
def test_the_same_bits_and_nothing_compiled_on_the_way(checkpoint: Checkpoint, family: str, dtype: torch.dtype) -> None:
    """Not even at the next start, which finds the code that the first one has left."""
    folder, work = checkpoint(family, dtype, **CHANGES.get(family, {})), jobs(5, 6)
    expected = alone(folder, work, compile=True)
    for page_size, budget, threads, seed in ((16, 512, 2, 0), (4, 7, 1, 1)):
        order = list(range(len(work)))
        random.Random(seed).shuffle(order)
        earlier = compilations()
        with LLM(folder, compile=True, max_tokens_per_step=budget, page_size=page_size, num_threads=threads) as llm:
            before = compilations()
            new = {name: count - earlier.get(name, 0) for name, count in before.items() if count != earlier.get(name, 0)}
            assert new.get("aot_autograd autograd_cache_hit") == KINDS[family] and not any("miss" in name for name in new), new
            assert together(llm, [work[i] for i in order]) == [expected[i] for i in order], "cold"
            assert together(llm, work) == expected, "from the cache"
            assert compilations() == before


@needs_compiler
@pytest.mark.usefixtures("one_thread")
def test_close_to_plain_layers() -> None:
    for family, dtype in CASES:
        ids, lengths = torch.randint(3, VOCAB, (70,)), [40, 1, 29]
        positions = torch.cat([torch.arange(length) for length in lengths])
        alike = [tiny_model(family, dtype, **CHANGES.get(family, {})) for _ in range(2)]
        models = [CausalModel(model, ReferenceProducts(), name=family, identity="", live=False) for model in alike]
        models[1].compile()
        assert models[1].compiled and models[1].identity != models[0].identity
        plain, compiled = (model.forward(RowByRow(lengths), ids, positions, torch.arange(70)).float() for model in models)
        assert not torch.equal(plain, compiled) or dtype == torch.float32
        assert (plain - compiled).abs().max() <= TOLERANCE[dtype] * plain.std()


@needs_compiler
def test_a_live_model_is_left_alone_and_its_changes_are_seen() -> None:
    model = tiny_model("llama", torch.bfloat16)
    states = [dict(module.__dict__) for module in model.modules()]
    prompts = [list(range(3, 3 + length)) for length in (1, 20, 33)]

    def generated(llm: LLM) -> list[Sequence[int]]:
        return [out.outputs[0].token_ids for out in llm.generate(prompts, SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))]

    with LLM(model, compile=True) as llm:
        first = generated(llm)
        for module, before in zip(model.modules(), states, strict=True):
            assert module.__dict__.keys() == before.keys() and all(module.__dict__[name] is value for name, value in before.items())
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "proj" in name:
                    weight.mul_(1.5)
        model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(-model.model.layers[0].mlp.up_proj.weight.detach())
        llm.reset_cache()
        second = generated(llm)
        hook = model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out * 2)
        for _ in range(2):
            with pytest.raises(UnsupportedModelError, match="other modules than those compiled: undo it, or open it anew"):
                generated(llm)
        hook.remove()
        assert generated(llm) == second
    assert first != second
    with LLM(model, compile=True) as llm:
        assert generated(llm) == second


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever gets as far as the compiler fails the test."""

    def fail(*_: Any) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr("quire.tensors.models.compiled._compile", fail)
    yield


@needs_compiler
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_experts_are_refused(checkpoint: Checkpoint, family: str, uncompiled: None) -> None:
    with pytest.raises(UnsupportedModelError, match=f"^{family}: compile=True: .*DecoderLayer cannot be compiled: .*experts"):
        LLM(checkpoint(family), compile=True)


@needs_compiler
def test_a_wrapped_live_model_is_refused(uncompiled: None) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match="compile=True: LlamaMLP in a layer of this live model is its owner's code, or wrapped"):
        LLM(model, compile=True)


def test_without_a_compiler(checkpoint: Checkpoint) -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": (None, "no-such-compiler")}), pytest.raises(ConfigError, match=r"^compile=True: needs a C\+\+ compiler"):
        LLM(checkpoint("llama"), compile=True)
    with pytest.raises(ConfigError, match="compile='yes': must be True or False"):
        LLM(checkpoint("llama"), compile="yes")
