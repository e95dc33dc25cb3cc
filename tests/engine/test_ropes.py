"""Rope that changes with the longest sequence of a batch: as transformers has it, in any company, as far as it does not change; and no further."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from quire import LLM, SamplingParams
from quire.errors import ConfigError, ContextLengthError, UnsupportedModelError
from tests.tensors.checkpoints import VOCAB, make, tiny_model

LENGTH, TOLD = 64, 256
LONGROPE: dict[str, Any] = {
    "max_position_embeddings": TOLD,
    "original_max_position_embeddings": LENGTH,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1 + i / 8 for i in range(8)],
        "long_factor": [3.0 + i for i in range(8)],
    },
}
DYNAMIC: dict[str, Any] = {"max_position_embeddings": LENGTH, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}
KINDS = {"phi3": LONGROPE, "llama": DYNAMIC}
pytestmark = pytest.mark.filterwarnings("ignore:phi3. longrope takes other frequencies")


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logprobs=0)


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()  # type: ignore[no-any-return]


def answer(llm: LLM, given: list[int], *others: list[int], length: int = LENGTH) -> tuple[list[int], list[float]]:
    """The tokens behind `given` up to `length`, and their logprobs."""
    prompts = [given, *others]
    (out,) = llm.generate(prompts, [greedy(length - len(one)) for one in prompts])[0].outputs
    assert out.logprobs is not None
    return out.token_ids, out.logprobs


def expected(model: PreTrainedModel, ids: list[int], count: int) -> torch.Tensor:
    """Logprobs of the last `count` tokens in transformers' own forward of the whole."""
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return torch.stack([logprobs[i - 1, ids[i]] for i in range(len(ids) - count, len(ids))])


@pytest.mark.parametrize("family", KINDS)
def test_a_whole_context_is_as_transformers_has_it_in_any_company(family: str, tmp_path: Path) -> None:
    with LLM(make(tmp_path, family, **KINDS[family])) as llm:
        assert llm.info.context_len == LENGTH
        tokens, logprobs = answer(llm, prompt(0, 5))
        assert torch.allclose(torch.tensor(logprobs), expected(tiny_model(family, **KINDS[family]), prompt(0, 5) + tokens, len(tokens)), atol=1e-4)
        assert answer(llm, prompt(0, 5), prompt(1, 50), prompt(2, 3)) == (tokens, logprobs)
        llm.reset_cache()
        assert answer(llm, prompt(0, 5), prompt(1, LENGTH - 1)) == (tokens, logprobs)


@pytest.mark.parametrize("family", KINDS)
def test_a_context_ends_where_frequencies_would_change(family: str, tmp_path: Path) -> None:
    path = make(tmp_path, family, **KINDS[family])
    with LLM(path) as llm, pytest.raises(ContextLengthError, match=f"at most {LENGTH} tokens together"):
        llm.generate([prompt(0, 5)], greedy(LENGTH - 4))


def test_asked_for_more_longrope_has_its_second_set_for_all(tmp_path: Path) -> None:
    """transformers has it for a sequence that is longer, from its first token on."""
    path, long = make(tmp_path, "phi3", **LONGROPE), 3 * LENGTH
    with LLM(path) as first, LLM(path, max_model_len=TOLD) as second:
        assert (first.info.context_len, second.info.context_len) == (LENGTH, TOLD)
        assert first._built.model.identity != second._built.model.identity
        tokens, logprobs = answer(second, prompt(0, 5), length=long)
        assert torch.allclose(torch.tensor(logprobs), expected(tiny_model("phi3", **LONGROPE), prompt(0, 5) + tokens, len(tokens)), atol=1e-4)
        second.reset_cache()
        assert answer(second, prompt(0, 5), prompt(1, 30), length=long) == (tokens, logprobs)
        assert answer(first, prompt(0, 5))[1] != logprobs[: LENGTH - 5]
    with pytest.raises(ConfigError, match=f"max_model_len={TOLD + 1}: must be at most {TOLD}"):
        LLM(path, max_model_len=TOLD + 1)


def test_dynamic_and_live_contexts_are_not_stretched(tmp_path: Path) -> None:
    for source in (make(tmp_path, "llama", **DYNAMIC), tiny_model("phi3", **LONGROPE)):
        with pytest.raises(ConfigError, match=f"max_model_len={LENGTH + 1}: must be at most {LENGTH}"):
            LLM(source, max_model_len=LENGTH + 1)


@pytest.mark.filterwarnings("ignore:phimoe. longrope takes other frequencies")
def test_rope_that_takes_no_second_set_is_not_stretched(tmp_path: Path) -> None:
    """PhiMoE's makes frequencies of its own at every call, always the first set, with a scale that hangs on the longest sequence of a batch."""
    scales = {"short_mscale": 1.2, "long_mscale": 1.5, "original_max_position_embeddings": LENGTH}
    few = {"num_local_experts": 2, "num_hidden_layers": 1, "rope_parameters": LONGROPE["rope_parameters"] | scales}
    path = make(tmp_path, "phimoe", **LONGROPE | few)
    with pytest.raises(UnsupportedModelError, match=f"phimoe: model.rotary_emb: keeps longrope's first frequencies.* contexts end at {LENGTH}"):
        LLM(path, max_model_len=LENGTH + 1)
    LLM(path, max_model_len=LENGTH).close()


def test_that_it_ends_before_the_config_says_is_told(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for family, settings in KINDS.items():
            LLM(make(tmp_path / family, family, **settings)).close()
    (one,) = [str(warning.message) for warning in told if "frequencies" in str(warning.message)]
    assert f"longer than {LENGTH} tokens: contexts end there, not at the {TOLD} of its config (max_model_len beyond it" in one


def test_a_live_models_owner_may_run_longer_sequences() -> None:
    """They leave the other set of frequencies behind."""
    model = tiny_model("phi3", **LONGROPE)
    with LLM(model) as llm:
        before = answer(llm, prompt(0, 5))
        with torch.no_grad():
            model(torch.tensor([prompt(3, LENGTH + 9)]))
        assert not torch.equal(model.model.rotary_emb.inv_freq, model.model.rotary_emb.original_inv_freq)  # type: ignore[attr-defined, operator]
        llm.reset_cache()
        assert answer(llm, prompt(0, 5)) == before


def test_where_frequencies_may_change_within_the_context_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="llama: model.rotary_emb: dynamic rope of a live model"):
        LLM(tiny_model("llama", **DYNAMIC))
    foreign = tiny_model("phi3", **LONGROPE)
    foreign.__class__ = type("Mine", (type(foreign),), {"__module__": "mine"})
    with pytest.raises(UnsupportedModelError, match="phi3: longrope rope in code of its own"):
        LLM(foreign)
    module: Any = tiny_model("phi3", **LONGROPE)
    rotary = module.model.rotary_emb
    rotary.__class__ = type("Mine", (type(rotary),), {"__module__": "mine"})
    with pytest.raises(UnsupportedModelError, match="phi3: model.rotary_emb: longrope rope in code of its own"):
        LLM(module)


@pytest.mark.parametrize("length", [None, "128", 0])
def test_longrope_that_does_not_tell_its_length_is_refused(length: object) -> None:
    model: Any = tiny_model("phi3", **LONGROPE)
    model.config.rope_parameters["original_max_position_embeddings"] = length
    with pytest.raises(UnsupportedModelError, match="original_max_position_embeddings=.*: must be a positive integer"):
        LLM(model)
