"""Models with recurrent layers: transformers' own answers, promise 1 where a page holds a state, and what is refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quire import LLM, PagedCache, SamplingParams, Slots
from quire.errors import ConfigError, InvalidRequestError, UnsupportedModelError
from quire.structured import StructuredOutput
from tests.engine.conftest import Checkpoint
from tests.engine.test_llm import own_generate
from tests.engine.test_transparency import Job, alone, bits, jobs, together
from tests.tensors.checkpoints import VOCAB, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

# With states so small that a page has no more than some twenty tokens.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {"linear_key_head_dim": 8, "linear_value_head_dim": 12},
    "granitemoehybrid": {"mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 1},
}
_LINEAR = {"layer_types": ["linear_attention", "linear_attention", "full_attention"], "linear_key_head_dim": 16, "linear_value_head_dim": 24}
_GATED = {**_LINEAR, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "head_dim": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 36, "shared_expert_intermediate_size": 36}
_MAMBA = {"n_groups": 2, "chunk_size": 16}
OTHERS: dict[str, dict[str, Any]] = {
    "qwen3_next": {**_GATED, **_EXPERTS},
    "qwen3_5_moe_text": {**_GATED, **_EXPERTS},
    "olmo_hybrid": {**_LINEAR, "linear_num_key_heads": 4, "linear_num_value_heads": 4},
    "bamba": {"attn_layer_indices": [2], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 24, "mamba_n_groups": 2, "mamba_chunk_size": 16},
    "nemotron_h": {
        "layer_types": ["linear_attention", "mlp", "full_attention", "mlp"], "num_hidden_layers": 4, "head_dim": 16, "mamba_num_heads": 8,
        "mamba_head_dim": 16, "ssm_state_size": 24, **_MAMBA,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", OTHERS)
def test_greedy_equals_transformers(checkpoint: Checkpoint, family: str) -> None:
    """Prompts around the end of a page, which is some fifty tokens on."""
    folder, rng = checkpoint(family, **OTHERS[family]), random.Random(3)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with LLM(folder, max_tokens_per_step=19) as llm:
        assert any(group.carries for group in llm._built.engine.scheduler.cache.groups)
        prompts = [[rng.randrange(3, VOCAB) for _ in range(n)] for n in (3, llm.info.page_size + 1)]
        got = [o.outputs[0].token_ids for o in llm.generate(prompts, SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True))]
    assert got == [own_generate(model, prompt, 12) for prompt in prompts]


def long_jobs(seed: int, count: int, page_size: int) -> list[Job]:
    """Those of every family, behind stems of pages: none is hit before its first is complete."""
    rng = random.Random(seed)
    stem = [rng.randrange(3, VOCAB) for _ in range(2 * page_size + 3)]
    cuts = [0, page_size - 1, page_size, page_size + 1, 2 * page_size, len(stem)]
    return [(stem[: cuts[i % len(cuts)]] + prompt[:40], params) for i, (prompt, params) in enumerate(jobs(seed, count))]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(checkpoint: Checkpoint, request: pytest.FixtureRequest) -> str:
    return checkpoint(request.param, torch.bfloat16, **FAMILIES[request.param])


@pytest.fixture(scope="module")
def size(folder: str) -> int:
    """Tokens of a page: attention's of as many as fill what a state takes."""
    with LLM(folder) as llm:
        assert 12 < llm.info.page_size < 30
        return llm.info.page_size


def poison(llm: LLM) -> None:
    """Pages that nobody holds are NaN, and stay so until they are written."""
    pages, pool = llm._built.engine.runner.store.pages.fill_(255), llm._built.engine.scheduler.cache.pool
    take = pool.take

    def poisoned_take(num_pages: int) -> list[int]:
        taken = take(num_pages)
        pages[taken] = 255
        return taken

    pool.take = poisoned_take


def test_batch_chunks_and_hits(folder: str, size: int) -> None:
    work = long_jobs(1, 5, size)
    expected = alone(folder, work)
    for budget, seed in ((512, 0), (7, 1)):
        order = random.Random(seed).sample(range(len(work)), len(work))
        with LLM(folder, max_tokens_per_step=budget) as llm:
            poison(llm)
            assert together(llm, [work[i] for i in order]) == [expected[i] for i in order], "cold"
            before = llm.stats()["num_cached_tokens"]
            assert together(llm, work) == expected, "from the cache"
            assert llm.stats()["num_cached_tokens"] - before >= sum((len(prompt) - 1) // size * size for prompt, _ in work) > 0


@pytest.mark.parametrize("folder", ["granitemoehybrid"], indirect=True)
@pytest.mark.parametrize("options", [{"backend": "reference"}, {"cache_layout": "stacked", "max_sequences": 3}, {"prefix_sharing": False}])
def test_other_ways_to_serve_give_the_same_bits(folder: str, size: int, options: dict[str, Any]) -> None:
    backend = {name: options[name] for name in options if name == "backend"}
    work = long_jobs(2, 4, size)
    if backend:
        work = [(prompt[: size + 3], SamplingParams(max_tokens=4, seed=1, logprobs=0)) for prompt, _ in work]
    expected = alone(folder, work, **backend)
    with LLM(folder, max_tokens_per_step=50, **options) as llm:
        assert together(llm, work) == expected == together(llm, work)


@pytest.mark.parametrize("folder", ["granitemoehybrid"], indirect=True)
def test_preemption(folder: str, size: int) -> None:
    rng = random.Random(3)
    params = [SamplingParams(max_tokens=3 * size, temperature=1.0, seed=i, logprobs=0, ignore_eos=True) for i in range(3)]
    work = [([rng.randrange(3, VOCAB) for _ in range(size - 10 + i)], p) for i, p in enumerate(params)]
    expected = alone(folder, work)
    with LLM(folder) as llm:
        needed = llm.info.page_bytes * sum(group.pages_to_finish(4 * size, size) for group in llm._built.engine.scheduler.cache.groups)
    with LLM(folder, max_tokens_per_step=40, max_model_len=4 * size, cache_bytes=needed) as llm:
        outputs = llm.generate([prompt for prompt, _ in work], [p for _, p in work])
        assert [bits(o) for o in outputs] == expected
        assert llm.stats()["num_preemptions"] > 0
        llm.check_integrity()


@pytest.mark.parametrize("folder", ["granitemoehybrid"], indirect=True)
def test_sisters_slots_and_the_next_turn(folder: str, size: int) -> None:
    """Sampled n at a time, or in slots behind one prefix, whose last state each has a copy of; then a prompt that goes on from an answer."""
    prompt = [3 + (7 * i * i + 3 * i) % 500 for i in range(size + 9)]
    apart = [SamplingParams(seed=40 + i, max_tokens=size + 5, temperature=1.0, logprobs=0, ignore_eos=True) for i in range(3)]
    single = [one for (one,) in alone(folder, [(prompt, params) for params in apart])]
    with LLM(folder) as llm:
        branches = llm.generate([prompt], SamplingParams(n=3, seed=40, max_tokens=size + 5, temperature=1.0, logprobs=0, ignore_eos=True))[0]
        assert list(bits(branches)) == single and len({tuple(one[0]) for one in single}) == 3
        longer = [*prompt, *branches.outputs[1].token_ids, 5]
        turn = llm.generate([longer], apart[0])[0]
        assert turn.receipt.cached_tokens == len(longer) - 2  # all that was computed: its state was in the page it ended in
    assert [bits(turn)] == alone(folder, [(longer, apart[0])])
    with Slots(folder, 3) as slots:
        prefix = slots.prefill(prompt, SamplingParams(temperature=1.0, seed=40))
        got = [[slots.insert(prefix, i, seed=40 + i)] for i in range(2)]
        for _ in range(9):  # the second is moved on before the third begins
            for i, token in slots.generate().items():
                got[i].append(token)
        got.append([slots.insert(prefix, 2, seed=42)])
        for _ in range(9):
            for i, token in slots.generate().items():
                got[i].append(token)
        slots.check_integrity()
    assert got == [one[0][: len(mine)] for one, mine in zip(single, got, strict=True)]


def test_a_prompt_that_leaves_a_text_within_a_page_is_told_that_no_state_was_kept(folder: str, size: int) -> None:
    prompt = [3 + (7 * i * i + 3 * i) % 500 for i in range(size + 9)]
    with LLM(folder) as llm:
        for one, expected in ((prompt, (0, "never seen")), ([*prompt[:-2], 5, 6], (size, "not kept")), (prompt, (size, "not kept"))):
            told, receipt = llm.explain(one), llm.generate([one], SamplingParams(max_tokens=3, ignore_eos=True))[0].receipt
            assert (receipt.miss_index, receipt.miss_reason) == (told.miss_index, told.reason) == expected


@pytest.mark.parametrize("folder", ["granitemoehybrid"], indirect=True)
def test_restored_states_give_the_same_bits(folder: str, size: int, tmp_path: Path) -> None:
    work = [(prompt, params) for prompt, params in long_jobs(5, 5, size) if len(prompt) > size]
    expected = alone(folder, work)
    for restored in (False, True):
        with LLM(folder, max_tokens_per_step=70, cache_dir=tmp_path) as llm:
            outputs = llm.generate([prompt for prompt, _ in work], [params for _, params in work])
            assert [bits(output) for output in outputs] == expected
            assert (llm.stats()["num_fetched_pages"] > 0) == restored
            assert not restored or all(output.receipt.cached_tokens >= size for output in outputs)


def test_a_live_model_whose_weights_change_has_no_old_states() -> None:
    model, prompt = tiny_model("qwen3_5_text"), list(range(3, 80))
    params = SamplingParams(max_tokens=4, temperature=0.0, logprobs=0, ignore_eos=True)
    with LLM(model) as llm:
        before = bits(llm.generate([prompt], params)[0])
        with torch.no_grad():
            model.model.layers[0].linear_attn.in_proj_qkv.weight.mul_(1.5)
        after = llm.generate([prompt], params)[0]
        assert after.receipt.cached_tokens == 0 and bits(after) != before
    with LLM(model) as llm:
        assert bits(llm.generate([prompt], params)[0]) == bits(after)


@pytest.mark.parametrize("folder", ["qwen3_5_text"], indirect=True)
def test_what_a_grammar_forces_is_not_drafted(folder: str) -> None:
    """A state that has gone on with a token does not go back, should the sequence end before it."""
    pytest.importorskip("llguidance")
    forms = StructuredOutput(regex="(over the lazy dog )?pack my box with five dozen liquor jugs[a-z]{9}the quick brown fox jumps[a-z]{20}")
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=3, logprobs=0, structured=forms, stop=["liquor"])
    with LLM(folder) as llm:
        forced = llm.generate([[5, 6, 7]], params)[0]
        assert forced.receipt.accepted_tokens == forced.receipt.rejected_tokens == 0
        longer = [5, 6, 7, *forced.outputs[0].token_ids, 9]
        again = llm.generate([longer], SamplingParams(max_tokens=3, seed=1, logprobs=0))[0]
        assert again.receipt.cached_tokens == len(longer) - 2
    assert alone(folder, [(longer, SamplingParams(max_tokens=3, seed=1, logprobs=0))]) == [bits(again)]


NOT_TAKEN_BACK = "whose recurrent layers cannot take back a token that was guessed"


@pytest.mark.parametrize("family", FAMILIES)
def test_guesses_that_may_be_wrong_are_refused(checkpoint: Checkpoint, family: str) -> None:
    folder = checkpoint(family)
    with pytest.raises(ConfigError, match=f"prompt_lookup_num_tokens=3: must be 0 for {family}, {NOT_TAKEN_BACK}"):
        LLM(folder, prompt_lookup_num_tokens=3)
    with LLM(folder) as llm:
        for guess in ({"prompt_lookup_num_tokens": 2}, {"prediction": [5, 6]}, {"prediction": "the"}):
            (name,) = guess
            with pytest.raises(InvalidRequestError, match=f"{name}=.*: must be left out for this model, {NOT_TAKEN_BACK}"):
                llm.submit([5, 6, 7], SamplingParams(**guess))
        assert llm.generate([[5, 6, 7]], SamplingParams(max_tokens=1, prompt_lookup_num_tokens=0))[0].error is None


def test_what_recurrent_layers_are_not_served_by_is_refused_by_name(checkpoint: Checkpoint) -> None:
    folder = checkpoint("granitemoehybrid")
    with pytest.raises(
        UnsupportedModelError, match="granitemoehybrid: a PagedCache goes on from any token, and a recurrent layer's state from the last"
    ):
        PagedCache(folder, num_pages=4, page_size=16)
    with pytest.raises(UnsupportedModelError, match="it carries a state from token to token, which compiled layers do not"):
        LLM(folder, compile=True)
    with (
        LLM(folder, cache_layout="stacked", max_model_len=64, max_sequences=2) as llm,
        pytest.raises(ConfigError, match="cache_layout='stacked': layers that carry a state have no such view"),
    ):
        llm.stacked()


def test_accelerators_are_refused_by_name(checkpoint: Checkpoint) -> None:
    pytest.importorskip("triton")
    with pytest.raises(UnsupportedModelError, match="qwen3_5_text: its recurrent layers are served on the CPU alone, by backend 'native' or"):
        LLM(checkpoint("qwen3_5_text"), backend="triton")
