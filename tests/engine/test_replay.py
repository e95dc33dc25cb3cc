"""A model's forward as the calls that it was seen to make (replay.py): which models' is, what it gives, and when it is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

pytest.importorskip("quire.tensors.native")

from quire import LLM, SamplingParams
from quire.tensors.models.chain import Chain
from quire.tensors.models.model import CausalModel
from quire.tensors.models.replay import Replay, Watch
from tests.engine.conftest import Checkpoint
from tests.engine.test_chains import PROMPTS, bits, lengths
from tests.tensors.checkpoints import tiny_model

# Others scale or add to their embeddings, or scale or cap their logits, themselves, or have no two layers that follow one another.
REPLAYED = {"llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3_text", "phi3", "olmo2", "smollm3", "stablelm"}
LONG = [3 + (i * i * 5 + i) % 500 for i in range(700)]


def replay_of(llm: LLM) -> Replay:
    lowered = llm._built.model.lowered
    assert lowered is not None
    return lowered.replay


def own(llm: LLM) -> LLM:
    """The same engine, whose model runs its own forward."""
    replay = replay_of(llm)
    replay.calls, replay.native, replay._to_watch = [], None, False
    return llm


def counted(llm: LLM) -> list[None]:
    """One for each replayed forward from now on."""
    replay, seen = replay_of(llm), []
    replayed, native = replay._replayed, replay.native

    def counting_native(*args: Any) -> torch.Tensor:
        seen.append(None)
        assert native is not None
        return native(*args)

    def counting(inputs: dict[str, Any]) -> torch.Tensor:
        seen.append(None)
        return replayed(inputs)

    replay._replayed = counting  # type: ignore[method-assign]
    replay.native = counting_native if native is not None else None  # type: ignore[assignment]
    return seen


ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 512},
    "llama3": {"factor": 2.0, "original_max_position_embeddings": 512, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


@pytest.mark.parametrize("rope", ROPES)
def test_positions_are_those_of_the_model(tmp_path: Path, rope: str) -> None:
    parameters = {"rope_type": rope, "rope_theta": 10000.0, **ROPES[rope]}
    tiny_model("llama", torch.bfloat16, rope_parameters=parameters, max_position_embeddings=1024).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)  # its frequencies are fp32, as the others' are
    prompts = [LONG, *PROMPTS]
    with LLM(str(tmp_path)) as llm, LLM(str(tmp_path)) as plain, LLM(model) as live:
        first, second, third = ([bits(one), bits(one, prompts), bits(one, prompts)] for one in (own(plain), llm, live))
        assert first == second == third
        assert replay_of(llm).calls and replay_of(live).calls


def test_a_model_whose_forwards_are_never_short_is_seen_too(checkpoint: Checkpoint) -> None:
    """40 requests begin together, and each step after their prompts' has 40 tokens; a single long prompt is not run twice."""
    prompts = [[3 + i, 7, 11 * i + 5] for i in range(40)]
    with LLM(checkpoint("qwen3", torch.bfloat16)) as llm, LLM(checkpoint("qwen3", torch.bfloat16)) as plain:
        params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=2)
        together = [out.outputs for out in llm.generate(prompts, params)]
        assert replay_of(llm).native is not None
        assert together == [out.outputs for out in own(plain).generate(prompts, params)]
    with LLM(checkpoint("qwen3", torch.bfloat16)) as llm:
        llm.generate([LONG[:17]], SamplingParams(max_tokens=1))
        assert not replay_of(llm).calls
        llm.generate([LONG[:17]], SamplingParams(max_tokens=2))
        assert replay_of(llm).native is not None


def test_hidden_states_are_those_of_the_model(checkpoint: Checkpoint) -> None:
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True, pooling="mean", logprobs=2)

    def states(llm: LLM) -> list[object]:
        bits(llm)
        outputs = [output.raise_for_error() for output in llm.generate(PROMPTS, params)]
        return [(output.embedding.tolist(), output.outputs[0].logprobs) for output in outputs]

    with LLM(checkpoint("qwen3", torch.bfloat16)) as llm, LLM(checkpoint("qwen3", torch.bfloat16)) as plain:
        bits(llm)
        forwards = counted(llm)
        assert states(llm) == states(own(plain)) and forwards


def change_weights(model: Any) -> None:
    model.model.embed_tokens.weight = nn.Parameter(model.model.embed_tokens.weight.detach() * 2)
    model.model.norm.weight.data = model.model.norm.weight.detach() * 3
    model.lm_head.weight.detach().mul_(0.5)


def scale_rope(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def hook_a_part(model: Any) -> None:
    model.model.norm.register_forward_hook(lambda module, args, result: result * 2)


def hook_what_is_around(model: Any) -> None:
    model.model.register_forward_pre_hook(lambda module, args, kwargs: (args, {**kwargs, "input_ids": kwargs["input_ids"] ^ 1}), with_kwargs=True)


@pytest.mark.parametrize("change", [change_weights, scale_rope, hook_a_part, hook_what_is_around])
def test_a_live_model_is_taken_as_it_is_now(change: Callable[[Any], None]) -> None:
    model = tiny_model("llama")
    with LLM(model) as llm:
        before = bits(llm)
        assert replay_of(llm).calls
        change(model)
        llm.reset_cache()
        changed = bits(llm)
        assert changed != before
        with LLM(model) as other:
            assert bits(own(other)) == changed


def test_a_hook_put_around_while_requests_run_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes are asked for when a request comes, and this one comes later."""
    after = []
    for prepare in (lambda llm: llm, own):
        model = tiny_model("llama")
        with LLM(model) as llm, monkeypatch.context() as patched:
            before = bits(prepare(llm))
            patched.setattr(CausalModel, "changed", False)
            hook_what_is_around(model)
            llm.reset_cache()
            after.append(bits(llm))
            assert after[-1] != before
    assert after[0] == after[1]


def test_what_fails_is_run_as_the_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(tiny_model("llama")) as llm:
        first = bits(llm)
        assert replay_of(llm).calls
        call = Chain.__call__

        def failing(self: Chain, *args: Any, **kwargs: Any) -> torch.Tensor:
            call(self, *args, **kwargs)
            raise ValueError("broken")

        monkeypatch.setattr(Chain, "__call__", failing)
        llm.reset_cache()
        assert bits(llm) == first and lengths(llm) == [], "layers run one by one from then on"
        monkeypatch.undo()
        forwards = counted(llm)
        llm.reset_cache()
        assert bits(llm) == first and not forwards


class Around(nn.Module):
    """Two parts, and what `between` does with what the first gives and `after` with what the second does."""

    def __init__(self, between: Callable[..., torch.Tensor], after: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> None:
        super().__init__()
        self.a, self.b = nn.Embedding(10, 4), nn.Linear(4, 6)
        self.between, self.after = between, after

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, logits_to_keep: torch.Tensor) -> torch.Tensor:
        return self.after(self.b(self.between(self.a(input_ids), logits_to_keep)))


def seen_of(module: Around) -> list[str]:
    inputs = {"input_ids": torch.arange(5)[None], "position_ids": torch.arange(5)[None], "logits_to_keep": torch.tensor([1, 4])}
    watch = Watch(inputs)
    with torch.no_grad(), watch.watching([module.a, module.b], live=True):
        logits = module(**inputs)
    assert "forward" not in module.a.__dict__ and "forward" not in module.b.__dict__
    return [getattr(call.run, "__name__", type(call.run).__name__) for call in watch.calls_for(logits)]


def written_in_place(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    x[0].view(-1)[3:].mul_(1.0)
    return x


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Around(lambda x, at: x[:, at]), ["Embedding", "_rows", "Linear"]),
        (Around(lambda x, at: x), ["Embedding", "Linear"]),
        (Around(lambda x, at: (x.sum(), x.argmax().item(), x)[-1]), ["Embedding", "Linear"]),
        (Around(lambda x, at: x[:, at] * 1.0), []),
        (Around(lambda x, at: x + 0), []),
        (Around(lambda x, at: x[:, at.flip(0)]), []),
        (Around(lambda x, at: x[:, -2:]), []),
        (Around(written_in_place), []),
        (Around(lambda x, at: x[:, at], lambda x: x / 1), []),
        (Around(lambda x, at: x[:, at], lambda x: x.mul_(1)), []),
    ],
)
def test_only_calls_and_rows_of_them_are_replayed(module: Around, expected: list[str]) -> None:
    assert seen_of(module) == expected
