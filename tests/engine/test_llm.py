"""The front door: arguments, order, text, refusals, live models, and greedy output against transformers' own generate."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import quire
from quire import LLM, CacheTooSmallError, ConfigError, ContextLengthError, InvalidRequestError, ModelError, SamplingParams
from tests.engine.conftest import Checkpoint
from tests.tensors.checkpoints import FAMILIES, VOCAB, tiny_model

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


def own_generate(model: PreTrainedModel, prompt: list[int], num: int) -> list[int]:
    mask = torch.ones(1, len(prompt), dtype=torch.long)
    out = model.generate(
        torch.tensor([prompt]), attention_mask=mask, do_sample=False, max_new_tokens=num, min_new_tokens=num, eos_token_id=None, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


CONVOLVES = {"layer_types": ["conv", "full_attention", "conv"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 36, "num_dense_layers": 1}


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        *((family, {}, "") for family in FAMILIES),
        ("lfm2", {"conv_bias": True, "conv_L_cache": 5}, "3 of 3 as programs"),
        ("lfm2", {"conv_L_cache": 17}, "(Lfm2DecoderLayer is plain: its convolution has a kernel of 17, where a program takes at most 16)"),
        ("lfm2_moe", {**CONVOLVES, **EXPERTS}, "1 of 3 as programs"),
        ("lfm3", CONVOLVES, "3 of 3 as programs"),
    ],
)
def test_greedy_equals_transformers(checkpoint: Checkpoint, family: str, changes: dict[str, Any], told: str, one_thread: None) -> None:
    """One thread: of transformers' small operators each waits for a second one, many times as long where others want the core."""
    folder = checkpoint(family, **changes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    rng = random.Random(3)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(n)] for n in (3, 16, 61)]
    expected = [own_generate(model, p, 20) for p in prompts]
    with LLM(folder, max_tokens_per_step=19) as llm:
        got = [o.outputs[0].token_ids for o in llm.generate(prompts, SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))]
        assert told in llm.info.layers
    assert got == expected


@pytest.fixture(scope="module")
def llm(checkpoint: Checkpoint) -> Any:
    with LLM(checkpoint("llama"), page_size=4, max_tokens_per_step=16) as llm:
        yield llm


def test_one_or_many(llm: LLM) -> None:
    text, ids = "the quick brown fox", [5, 6, 7]
    assert [len(llm.generate(p, GREEDY)) for p in (text, ids, [text], [ids], [text, ids], [])] == [1, 1, 1, 1, 2, 0]
    a, b = llm.generate([text, ids], [GREEDY, SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)])
    assert (a.prompt, b.prompt) == (text, None) and b.prompt_token_ids == ids
    assert (len(a.outputs[0].token_ids), len(b.outputs[0].token_ids)) == (12, 3)
    assert a.outputs[0].logprobs is None and a.outputs[0].top_logprobs is None
    with pytest.raises(InvalidRequestError, match="one for each of the 2"):
        llm.generate([text, ids], [GREEDY])
    assert llm.generate([text] * 3, GREEDY, progress=True)


def test_ids_may_come_in_an_array_or_a_tensor(llm: LLM) -> None:
    ids = [5, 6, 7]
    expected = llm.generate(ids, GREEDY)[0].outputs
    for made in (np.array, torch.tensor, lambda ids: np.array(ids, np.uint16), lambda ids: [*np.array(ids)], lambda ids: [*torch.tensor(ids)]):
        assert [output.outputs for output in llm.generate(made(ids), GREEDY)] == [expected], "one prompt"
        assert [output.outputs for output in llm.generate([made(ids)] * 2, GREEDY)] == [expected] * 2
        assert llm.submit(made(ids), GREEDY).wait().outputs == expected and llm.embed(made(ids)).shape[0] == 1
    assert len(llm.generate([torch.tensor([5]), torch.tensor([6, 7])], GREEDY)) == len(llm.generate(np.array([[5, 6], [7, 8]]), GREEDY)) == 2
    with pytest.raises(InvalidRequestError, match="prompt=True"):
        llm.submit(torch.tensor([True, False]))


def test_an_engine_is_made_under_any_default_device(llm: LLM, checkpoint: Checkpoint) -> None:
    """torch's context manager, under which models are made without weights; `set_default_device` is one that stays."""
    expected = [output.outputs for output in llm.generate([[5, 6, 7]], GREEDY)]
    with torch.device("meta"), LLM(checkpoint("llama"), page_size=4) as other:
        assert [output.outputs for output in other.generate([[5, 6, 7]], GREEDY)] == expected


def test_an_engine_made_in_inference_mode_writes_its_pages(llm: LLM, checkpoint: Checkpoint) -> None:
    """Sampled sisters copy the page in whose midst their prompt ends; they do so on the engine's thread, which is in no such mode."""
    sisters = replace(GREEDY, n=2)
    expected = [output.outputs for output in llm.generate([[5, 6, 7, 8, 9, 10]], sisters)]
    with torch.inference_mode(), LLM(checkpoint("llama"), page_size=4) as other:
        outputs = other.generate([[5, 6, 7, 8, 9, 10]], sisters)
    assert [output.raise_for_error().outputs for output in outputs] == expected


def test_streamed_text_is_generated_text(llm: LLM) -> None:
    events = list(llm.stream("the quick brown fox", GREEDY))
    whole = llm.generate("the quick brown fox", GREEDY)[0].outputs[0]
    assert "".join(e.text for e in events) == whole.text
    assert [t for e in events for t in e.token_ids] == whole.token_ids
    assert [e.finish_reason for e in events if e.finish_reason] == ["length"] == [whole.finish_reason]
    assert events[-1].output is not None and events[-1].output.outputs[0] == whole


def test_receipt(llm: LLM) -> None:
    llm.reset_cache()
    prompt = list(range(100, 141))
    cold, warm = llm.generate([prompt], GREEDY)[0].receipt, llm.generate([prompt], GREEDY)[0].receipt
    assert (cold.prompt_tokens, cold.cached_tokens, cold.computed_tokens) == (41, 0, 41 + 11)
    assert (warm.cached_tokens, warm.computed_tokens) == (40, 1 + 11)
    assert cold.peak_cache_bytes == 13 * llm.info.page_bytes
    assert min(cold.queued_s, cold.prefill_s, cold.decode_s) >= 0


def test_stops(llm: LLM) -> None:
    plain = llm.generate("the quick", SamplingParams(max_tokens=30, temperature=0.9, seed=1, ignore_eos=True))[0].outputs[0]
    stop = plain.token_ids[7]
    by_id = llm.generate("the quick", SamplingParams(max_tokens=30, temperature=0.9, seed=1, ignore_eos=True, stop_token_ids=[stop]))[0].outputs[0]
    first = plain.token_ids.index(stop)
    assert by_id.token_ids == plain.token_ids[: first + 1] and (by_id.finish_reason, by_id.stop_reason) == ("stop", stop)
    word = plain.text[5:7]
    cut = llm.generate("the quick", SamplingParams(max_tokens=30, temperature=0.9, seed=1, ignore_eos=True, stop=word))[0].outputs[0]
    assert cut.text == plain.text[: plain.text.index(word)] and (cut.finish_reason, cut.stop_reason) == ("stop", word)
    late = SamplingParams(max_tokens=30, min_tokens=20, temperature=0.9, seed=1, ignore_eos=True, stop_token_ids=[stop])
    assert len(llm.generate("the quick", late)[0].outputs[0].token_ids) >= 20


def test_end_of_sequence_ends(llm: LLM) -> None:
    bias = SamplingParams(max_tokens=9, temperature=0.0, logit_bias={2: 1000.0})
    out = llm.generate("the quick", bias)[0].outputs[0]
    assert (out.token_ids, out.finish_reason, out.stop_reason, out.text) == ([2], "stop", None, "")


@pytest.mark.parametrize(
    ("field", "call"),
    {
        "prompt": lambda llm: llm.generate([[]]),
        "prompt ": lambda llm: llm.generate([[5, VOCAB]]),
        "prompt  ": lambda llm: llm.generate([[5, -1]]),
        "prompt   ": lambda llm: llm.generate([[5, 2.5]]),
        "stop_token_ids": lambda llm: llm.generate([[5]], SamplingParams(stop_token_ids=[VOCAB])),
        "allowed_token_ids": lambda llm: llm.generate([[5]], SamplingParams(allowed_token_ids=[VOCAB])),
        "logit_bias": lambda llm: llm.generate([[5]], SamplingParams(logit_bias={VOCAB: 1.0})),
        "temperature": lambda _: SamplingParams(temperature=-1.0),
        "temperature ": lambda _: SamplingParams(temperature=float("nan")),
        "temperature  ": lambda _: SamplingParams(temperature=float("inf")),
        "top_p": lambda _: SamplingParams(top_p=0.0),
        "top_k": lambda _: SamplingParams(top_k=-1),
        "min_p": lambda _: SamplingParams(min_p=1.5),
        "max_tokens": lambda _: SamplingParams(max_tokens=0),
        "max_tokens ": lambda _: SamplingParams(max_tokens=True),
        "min_tokens": lambda _: SamplingParams(min_tokens=5, max_tokens=4),
        "repetition_penalty": lambda _: SamplingParams(repetition_penalty=0.0),
        "presence_penalty": lambda _: SamplingParams(presence_penalty=2.5),
        "seed": lambda _: SamplingParams(seed=-1),
        "seed ": lambda _: SamplingParams(seed=2**64),
        "n": lambda _: SamplingParams(n=0),
        "stop": lambda _: SamplingParams(stop=[""]),
        "stop ": lambda _: SamplingParams(stop=["x"] * 100000),
        "logprobs": lambda _: SamplingParams(logprobs=-1),
        "ignore_eos": lambda _: SamplingParams(ignore_eos=1),  # type: ignore[arg-type]
    }.items(),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refusals_name_the_field(llm: LLM, field: str, call: Callable[[LLM], Any]) -> None:
    before = llm.stats()
    with pytest.raises(InvalidRequestError) as error:
        call(llm)
    assert error.value.field == field.strip() and field.strip() in str(error.value)
    assert llm.stats() == before, "nothing ran"


def test_context_and_cache_limits_name_the_numbers(checkpoint: Checkpoint) -> None:
    with LLM(checkpoint("llama"), max_model_len=64, page_size=16) as llm:
        with pytest.raises(ContextLengthError, match=r"60 .*max_tokens=5.*64"):
            llm.generate([[5] * 60], SamplingParams(max_tokens=5))
        out = llm.generate([[5] * 60], SamplingParams(max_tokens=4, ignore_eos=True))[0].outputs[0]
        assert (len(out.token_ids), out.finish_reason) == (4, "length")
        assert len(llm.generate([[5] * 60], SamplingParams(max_tokens=None, ignore_eos=True))[0].outputs[0].token_ids) == 4
        with pytest.raises(ContextLengthError):
            llm.generate([[5] * 64], SamplingParams(max_tokens=None))
        assert len(llm.generate([[5] * 60])[0].outputs[0].token_ids) <= 4, "the default was not asked for"
        assert len(llm.generate([[5] * 60], SamplingParams(ignore_eos=True))[0].outputs[0].token_ids) == 4
        with pytest.raises(InvalidRequestError, match=r"min_tokens=5: must be at most 4"):
            llm.generate([[5] * 60], SamplingParams(max_tokens=None, min_tokens=5))
        with pytest.raises(ContextLengthError, match=r"60 .*max_tokens=128.*64"):
            llm.generate([[5] * 60], SamplingParams(max_tokens=128))
        page_bytes = llm.info.page_bytes
    with LLM(checkpoint("llama"), page_size=16, cache_bytes=4 * page_bytes) as llm:
        assert len(llm.generate([[5] * 60], SamplingParams(max_tokens=5, ignore_eos=True))[0].outputs[0].token_ids) == 5, "exactly full"
        with pytest.raises(CacheTooSmallError, match=r"5 pages.*4 pages"):
            llm.generate([[5] * 60], SamplingParams(max_tokens=6))
        for params in (SamplingParams(ignore_eos=True), SamplingParams(max_tokens=None, ignore_eos=True)):
            assert len(llm.generate([[5] * 60], params)[0].outputs[0].token_ids) == 5, "what nobody asked for is what the pool has room for"
        with pytest.raises(CacheTooSmallError, match=r"5 pages.*4 pages"):
            llm.generate([[5] * 65])
        llm.check_integrity()


@pytest.mark.parametrize(
    "options",
    [
        {"page_size": 0},
        {"max_tokens_per_step": -1},
        {"dtype": "int3"},
        {"no_such_option": 1},
        {"cache_bytes": 1},
        {"max_model_len": 10**6},
        {"backend": "x"},
    ],
    ids=str,
)
def test_options_are_refused_by_name(checkpoint: Checkpoint, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        LLM(checkpoint("llama"), **options)


def test_unknown_models_are_refused(tmp_path: Any) -> None:
    for name in ("/nonexistent/model", str(tmp_path)):
        with pytest.raises(ModelError, match=name):
            LLM(name)


def test_a_model_without_tokenizer_takes_ids_only() -> None:
    with LLM(tiny_model("llama")) as llm:
        assert llm.tokenizer is None
        assert llm.generate([[5, 6]], GREEDY)[0].outputs[0].text == ""
        with pytest.raises(InvalidRequestError, match="without a tokenizer"):
            llm.generate("text", GREEDY)
        with pytest.raises(InvalidRequestError, match="stop=.*without a tokenizer"):
            llm.generate([[5, 6]], SamplingParams(stop="x"))


def test_a_live_model_is_served_as_it_is_and_left_as_it_was() -> None:
    model, prompt = tiny_model("gemma3_text"), list(range(7, 47))  # long enough to leave pages behind
    model.train()
    implementation = model.config._attn_implementation
    pointers = [p.data_ptr() for p in model.parameters()]
    with LLM(model) as llm:
        before = llm.generate([prompt], GREEDY)[0].outputs[0].token_ids
        assert model.training and model.config._attn_implementation == implementation, "between steps the model is its owner's"
        loss = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([prompt])).loss
        loss.backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * weight.std().nan_to_num(0.0) * 0.5)
        after = llm.generate([prompt], GREEDY)[0].outputs[0].token_ids
        assert after == own_generate(model, prompt, 12) != before, "an optimizer's steps are noticed"
        with torch.no_grad():
            for weight in model.parameters():
                weight.data.mul_(1.5)
        llm.reset_cache()
        assert llm.generate([prompt], GREEDY)[0].outputs[0].token_ids == own_generate(model, prompt, 12), "what leaves no trace must be told"
    model.eval()
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert model.config._attn_implementation == implementation
    assert not any("forward" in module.__dict__ for module in model.modules())


class Adapted(torch.nn.Module):
    """A linear layer with adapters beside it, told which are on in the way that peft's are."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.added = torch.nn.ModuleDict({name: torch.nn.Linear(base.in_features, base.out_features) for name in "ab"})
        self.active: list[str] = ["a"]
        self.scaling = {"a": 1.0, "b": 1.0}
        self.disabled = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base_layer(x)
        for name in [] if self.disabled else self.active:
            out = out + self.scaling[name] * self.added[name](x)
        return out


def test_a_live_models_adapters_are_noticed() -> None:
    """Keys made with one adapter are not another's, and switching them touches no weight."""
    torch.manual_seed(4)
    model, prompt = tiny_model("llama"), list(range(7, 60))
    adapted = Adapted(model.model.layers[1].self_attn.k_proj)
    model.model.layers[1].self_attn.k_proj = adapted
    params = SamplingParams(max_tokens=3, temperature=0.0, logprobs=0)

    def logprobs(llm: LLM, expected_hits: bool) -> list[float] | None:
        output = llm.generate([prompt], params)[0]
        assert (output.receipt.cached_tokens > 0) == expected_hits
        return output.outputs[0].logprobs

    seen = []
    with LLM(model) as llm:
        for name, value in (("active", ["a"]), ("active", ["b"]), ("scaling", {"a": 1.0, "b": 4.0}), ("disabled", True), ("disabled", False)):
            setattr(adapted, name, value)
            with LLM(model) as fresh:
                expected = logprobs(fresh, False)
            assert logprobs(llm, False) == logprobs(llm, True) == expected, (name, value)
            seen.append(expected)
        adapted.active.append("a")
        assert logprobs(llm, False) not in seen, "changed in place"
    assert all(a != b for a, b in zip(seen, seen[1:], strict=False))


def test_every_public_name_is_there() -> None:
    assert set(quire.__all__) <= set(dir(quire)), "what is imported later is not completed at a prompt"
    for name in quire.__all__:
        assert getattr(quire, name).__module__.startswith("quire."), name
    with pytest.raises(AttributeError, match="nothing_like_it"):
        quire.nothing_like_it  # noqa: B018
