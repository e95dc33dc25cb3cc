"""The tensor face: a padded batch is its rows alone, and its logits are the model's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import quire
from quire import LLM, ConfigError, ContextLengthError, InvalidRequestError
from tests.tensors.checkpoints import VOCAB, tiny_model

ROWS = [[3 + (i * i * 7 + n) % 150 for i in range(n)] for n in (10, 33, 1, 57)]
FAMILIES = ["llama", "gemma3_text", "gpt_oss"]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def llm(model: PreTrainedModel) -> Iterator[LLM]:
    with LLM(model) as engine:
        yield engine


def left(rows: list[list[int]] = ROWS) -> torch.Tensor:
    return quire.left_pad(rows)


def right(rows: list[list[int]] = ROWS) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_is_its_rows_alone_under_any_padding(llm: LLM, temperature: float) -> None:
    options: dict[str, Any] = {"max_generated_tokens": 9, "temperature": temperature, "top_k": 50}
    batches = [quire.generate(llm, prompt, seeds=[7, 8, 9, 10], **options) for prompt in (left(), right(), ROWS)]
    for prompt, (tokens, _) in zip((left(), right(), left()), batches, strict=True):
        assert torch.equal(tokens[:, : prompt.shape[1]], prompt)
    for i, row in enumerate(ROWS):
        alone, alone_logits = quire.generate(llm, torch.tensor(row), seeds=[7 + i], **options)
        assert alone.shape == (1, len(row) + 9)
        for tokens, logits in batches:
            assert torch.equal(tokens[i, -9:], alone[0, -9:]) and torch.equal(logits[i], alone_logits[0])


def test_a_pad_id_that_no_token_can_be_is_no_token(llm: LLM) -> None:
    """In a narrow dtype -1 is 255, and 256 is 0."""
    rows = torch.tensor([[255, 0, 7], [9, 255, 255]])
    for dtype, pad_id in ((torch.uint8, -1), (torch.uint8, 256), (torch.int16, 2**16)):
        expected, found = (
            quire.generate(llm, tokens, max_generated_tokens=3, temperature=0.0, pad_id=pad)[0]
            for tokens, pad in ((rows, -1), (rows.to(dtype), pad_id))
        )
        assert torch.equal(found, expected)
        assert torch.equal(quire.score(llm, rows.to(dtype), pad_id=pad_id), quire.score(llm, rows, pad_id=-1))


def test_logits_are_the_models_before_temperature_and_cuts(llm: LLM, model: PreTrainedModel) -> None:
    tokens, logits = quire.generate(llm, left(), max_generated_tokens=6, temperature=0.7, top_k=5, rng=torch.Generator().manual_seed(1))
    assert logits.dtype == torch.float32 and logits.shape == (4, 6, VOCAB) and not logits.requires_grad
    for i, row in enumerate(ROWS):
        with torch.no_grad():
            own = model(torch.tensor([row + tokens[i, -6:].tolist()])).logits[0, len(row) - 1 : -1]
        torch.testing.assert_close(logits[i], own, atol=2e-4, rtol=2e-4)
        assert (logits[i].gather(1, tokens[i, -6:, None]) >= logits[i].topk(5).values[:, -1:]).all()


def test_stops_on_the_first_token_in_the_middle_and_never(llm: LLM) -> None:
    free, free_logits = quire.generate(llm, left(), max_generated_tokens=12, temperature=0.0)
    generated = free[:, -12:].tolist()
    stops = [generated[0][0], generated[1][4]]
    tokens, logits = quire.generate(llm, left(), max_generated_tokens=12, temperature=0.0, stop_tokens=stops, pad_id=0)
    lens = [next((i + 1 for i, token in enumerate(row) if token in stops), 12) for row in generated]
    assert tokens.shape[1] == left().shape[1] + max(lens) and logits.shape[1] == max(lens)
    for i, length in enumerate(lens):
        assert tokens[i, left().shape[1] :].tolist() == generated[i][:length] + [0] * (max(lens) - length)
        assert torch.equal(logits[i, :length], free_logits[i, :length]) and not logits[i, length:].any()


def test_a_real_token_that_equals_pad_survives(llm: LLM) -> None:
    rows = [[0, 5, 0, 9], [7, 0]]
    padded = torch.tensor([[0, 5, 0, 9], [0, 0, 7, 0]])
    tokens, _ = quire.generate(llm, padded, prompt_lens=[4, 2], max_generated_tokens=5, temperature=0.0)
    for i, row in enumerate(rows):
        alone, _ = quire.generate(llm, [row], max_generated_tokens=5, temperature=0.0)
        assert torch.equal(alone[0, -5:], tokens[i, -5:])


def test_a_group_shares_its_prefill_and_is_its_samples_alone(llm: LLM) -> None:
    prompts = [[40 + i % 100 for i in range(64)], [9] * 20]
    llm.reset_cache()  # of what other tests have asked
    before = llm.stats()["num_computed_tokens"]
    tokens, logprobs = quire.generate(llm, prompts, max_generated_tokens=8, num_samples=4, seeds=[5, 50], logprobs=True)
    assert tokens.shape == (8, 64 + 8) and logprobs.shape == (8, 8)
    assert llm.stats()["num_computed_tokens"] - before == 64 + 20 + 8 * 7, "one prefill a prompt; the last token drawn is never computed"
    for b in range(2):
        for i in range(4):
            alone, alone_logprobs = quire.generate(llm, [prompts[b]], max_generated_tokens=8, seeds=[(5, 50)[b] + i], logprobs=True)
            assert torch.equal(alone[0, -8:], tokens[4 * b + i, -8:]) and torch.equal(alone_logprobs[0], logprobs[4 * b + i])


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_scores_are_the_bits_that_sampling_gave(llm: LLM, temperature: float) -> None:
    tokens, logprobs = quire.generate(llm, left(), max_generated_tokens=10, temperature=temperature, seeds=[1, 2, 3, 4], logprobs=True)
    assert torch.equal(quire.score(llm, tokens, temperature=temperature)[:, -10:], logprobs)
    mask = torch.arange(tokens.shape[1]) >= torch.tensor([57 - len(row) for row in ROWS])[:, None]
    assert torch.equal(quire.score(llm, tokens, temperature=temperature, mask=mask)[:, -10:], logprobs)


@pytest.mark.parametrize(("dtype", "roundings"), [(torch.bfloat16, 1), (torch.float32, 8)])
def test_a_trainers_own_padded_forward_agrees_to_the_roundings_of_the_dtype(dtype: torch.dtype, roundings: int) -> None:
    """On real text, also after the weights have changed. One rounding of the largest logit in bf16; in fp32 the order of addition shows."""
    folder = Path(quire.__file__).parent / "demo_model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)
    prompts = quire.left_pad([tokenizer(text).input_ids for text in ("The king", "She said to her brother", "Once")])
    real = torch.cat([(prompts != 0).repeat_interleave(2, 0), torch.ones(6, 16, dtype=torch.bool)], dim=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with LLM(model) as llm:
        for seed in (1, 2):
            tokens, sampled = quire.generate(llm, prompts, max_generated_tokens=16, num_samples=2, logprobs=True, seeds=[seed, 20, 300])
            assert torch.equal(quire.score(llm, tokens)[:, -16:], sampled)
            logits = model(tokens, attention_mask=real.long(), position_ids=quire.position_ids(real)).logits[:, -17:-1].float()
            own = logits.log_softmax(-1).gather(2, tokens[:, -16:, None])[..., 0]
            assert (own - sampled).abs().max() <= roundings * torch.finfo(dtype).eps * logits.abs().max()
            own.mean().backward()
            optimizer.step()


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_a_recipes_default_dtype_rounds_nothing(llm: LLM, default: torch.dtype) -> None:
    """Recipes set it, to make a model in it; what comes back is float32 all the same."""

    def told() -> list[torch.Tensor]:
        options: dict[str, Any] = {"max_generated_tokens": 4, "temperature": 0.0}
        results = [quire.generate(llm, left(), **options, logprobs=logprobs) for logprobs in (False, True)]
        return [*(x for result in results for x in result if x is not None), quire.score(llm, results[0][0])]

    expected = told()
    torch.set_default_dtype(default)
    try:
        got = told()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_generators_and_the_global_one_repeat_themselves(llm: LLM) -> None:
    def drawn(**rng: Any) -> list[list[int]]:
        return quire.generate(llm, left(), max_generated_tokens=8, return_logits=False, **rng)[0].tolist()

    assert drawn(rng=torch.Generator().manual_seed(3)) == drawn(rng=torch.Generator().manual_seed(3))
    torch.manual_seed(4)
    first, second = drawn(), drawn()
    torch.manual_seed(4)
    assert [drawn(), drawn()] == [first, second] and first != second


def test_new_weights_are_noticed_and_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama").train()
    with LLM(model) as llm:
        tokens, before = quire.generate(llm, left(), max_generated_tokens=4, temperature=0.0, logprobs=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        after = quire.generate(llm, left(), max_generated_tokens=4, temperature=0.0, logprobs=True)
        assert llm.stats()["num_cached_tokens"] == 0
    fresh = quire.generate(model, left(), max_generated_tokens=4, temperature=0.0, logprobs=True)
    assert torch.equal(after[0], fresh[0]) and torch.equal(after[1], fresh[1]) and not torch.equal(after[1], before)
    assert model.training


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_generated_tokens": 0}, "max_generated_tokens=0"),
        ({"top_k": 0}, "top_k=0"),
        ({"temperature": -1.0}, "temperature"),
        ({"stop_tokens": [VOCAB]}, f"stop_tokens={VOCAB}: must be token ids from 0 to {VOCAB - 1}"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"seeds": 5}, "seeds=5"),
        ({"seeds": [1]}, "one for each of the 4 prompts"),
        ({"seeds": [1] * 4, "rng": torch.Generator()}, "rng"),
        ({"max_generated_tokens": 100_000}, "context"),
        ({"pad_id": None}, "pad_id=None"),
        ({"pad_id": 0.5}, "pad_id=0.5"),
        ({"stop_tokens": [5.5]}, "stop_tokens=5.5"),
        ({"seeds": [1.5] * 4}, "seeds=1.5"),
        ({"prompt_lens": [1.5] * 4}, "prompt_lens=1.5"),
        ({"rng": 5}, "rng=5"),
    ],
)
def test_what_cannot_be_is_refused(llm: LLM, options: dict[str, Any], match: str) -> None:
    with pytest.raises((InvalidRequestError, ContextLengthError), match=match):
        quire.generate(llm, left(), **{"max_generated_tokens": 4, **options})


def test_options_belong_to_an_engine_made_here(llm: LLM, model: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="page_size: must be left out with an LLM"):
        quire.generate(llm, left(), max_generated_tokens=2, page_size=4)
    small, _ = quire.generate(model, left(), max_generated_tokens=6, temperature=0.0, page_size=4, max_tokens_per_step=5)
    assert torch.equal(small, quire.generate(llm, left(), max_generated_tokens=6, temperature=0.0)[0])


@pytest.mark.parametrize("tokens", [torch.tensor([[0, 5]]), torch.tensor([[5]]), torch.tensor([5, 6]), torch.tensor([[5.0, 6.0]]), [[5, 6]]])
def test_what_has_no_score_is_refused(llm: LLM, tokens: Any) -> None:
    with pytest.raises(InvalidRequestError, match="tokens"):
        quire.score(llm, tokens)


@pytest.mark.parametrize("mask", [torch.tensor([[0.2, 0.5]]), torch.tensor([[1, 1, 1]]), [[True, True]]])
def test_a_mask_that_is_none_is_refused(llm: LLM, mask: Any) -> None:
    with pytest.raises(InvalidRequestError, match="mask="):
        quire.score(llm, torch.tensor([[5, 6]]), mask=mask)
