"""A step's tensors stay within their bound, whatever it is, and the bound changes no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quire import LLM, ConfigError, SamplingParams
from quire.tensors.models.model import CausalModel
from quire.tensors.models.workspace import LiveBytes, Workspace, measure
from quire.tensors.store import StagedStep
from tests.engine.conftest import Checkpoint
from tests.tensors.checkpoints import make

PROMPTS = [[3 + (i * i * 7 + n) % 150 for i in range(n)] for n in (600, 40)]
PARAMS = SamplingParams(max_tokens=4, temperature=0.0, logprobs=1, ignore_eos=True)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_steps_stay_within_what_was_foreseen(checkpoint: Checkpoint, family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = [0]
    folder = checkpoint(family, dtype, max_position_embeddings=1024) if family != "gpt2" else checkpoint(family, dtype, n_positions=1024)
    with LLM(folder, max_tokens_per_step=300, backend="native") as llm:
        _watch(monkeypatch, peaks)
        whole = llm.generate(PROMPTS, PARAMS)
        bound = llm.info.workspace_bytes
        assert 0.3 * bound < max(peaks) <= bound, (max(peaks), bound)
    with LLM(folder, workspace_bytes=bound // 3, backend="native") as llm:
        peaks.clear()  # the probe's
        assert [one.outputs for one in llm.generate(PROMPTS, PARAMS)] == [one.outputs for one in whole]
        assert llm.info.max_tokens_per_step < 300 and max(peaks) <= llm.info.workspace_bytes <= bound // 3


def _watch(monkeypatch: pytest.MonkeyPatch, peaks: list[int]) -> None:
    """Add the peak of each forward from here on."""
    forward = CausalModel.forward

    def watched(self: CausalModel, step: Any, ids: torch.Tensor, *args: Any) -> torch.Tensor:
        live = LiveBytes()
        with live:
            logits = forward(self, step, ids, *args)
        programs = step.of_programs if isinstance(step, StagedStep) else None
        peaks.append(live.peak + (programs.handle.staged_bytes if programs is not None else 0))
        return logits

    monkeypatch.setattr(CausalModel, "forward", watched)


@pytest.mark.parametrize("page_size", [1, 16])
def test_states_that_a_step_stages_are_foreseen(tmp_path: Path, page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One behind each page of a prompt, or behind the one token of each of many sequences."""
    heads = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 24}
    folder, peaks = make(tmp_path, "qwen3_5_text", layer_types=["linear_attention"] * 3, **heads), [0]
    long, many = page_size == 1, [[3 + i] for i in range(100)]
    with LLM(folder, max_tokens_per_step=300 if long else 100, max_sequences=1 if long else 100, page_size=page_size, backend="native") as llm:
        _watch(monkeypatch, peaks)
        llm.generate(PROMPTS[:1] if long else many, PARAMS)
        assert 0.3 * llm.info.workspace_bytes < max(peaks) <= llm.info.workspace_bytes, (max(peaks), llm.info.workspace_bytes)


def test_a_bound_that_nothing_fits_in_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match=r"workspace_bytes=1000: must be at least \d+, what 16 tokens take"):
        LLM(checkpoint(), workspace_bytes=1000)
    with pytest.raises(ConfigError, match="workspace_bytes=0"):
        LLM(checkpoint(), workspace_bytes=0)


def test_the_most_tokens_are_the_most() -> None:
    workspace = Workspace(fixed=100, per_token=7, per_row=50)
    for num_bytes in range(0, 3000, 13):
        most = workspace.most_tokens(num_bytes, 64, 10)
        fits = [n for n in range(1, 65) if workspace.bytes(n, min(n, 10)) <= num_bytes]
        assert most == max(fits, default=0)


def test_live_bytes_are_counted_once_and_go() -> None:
    base = torch.zeros(1000)
    live = LiveBytes()
    with live:
        view = base[10:]
        assert live.now == 0, "what was there before is nobody's"
        one = view + 1
        again = one.view(-1, 2)
        assert live.now == 3960
        del one
        assert live.now == 3960
        del again
        assert live.now == 0 and live.peak == 3960


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_one_layer_of_a_program_tells_what_all_take(family: str, tmp_path: Path) -> None:
    with LLM(make(tmp_path, family, torch.bfloat16, num_hidden_layers=6), backend="native") as llm:
        model = llm._built.model
        assert model.lowered is not None and len(model.lowered.alike) >= 3
        few = measure(model)
        model.owned = True  # of such a model every layer is watched
        every = measure(model)
    for got, expected in zip((few.fixed, few.per_token), (every.fixed, every.per_token), strict=True):
        assert expected <= got <= 1.1 * expected + 4096, (few, every)


def test_every_layer_adds_what_it_stages(tmp_path: Path) -> None:
    found = {}
    for num_layers in (4, 6):
        with LLM(make(tmp_path, "llama", torch.bfloat16, num_hidden_layers=num_layers), backend="native") as llm:
            found[num_layers] = measure(llm._built.model).per_token
            layer = llm._built.model.layers[0]
    assert found[6] - found[4] == 2 * layer.num_kv_heads * (layer.k_dim + layer.v_dim) * 2
