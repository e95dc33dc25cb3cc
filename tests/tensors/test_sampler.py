"""What a draw means: greedy, penalties, masks, logprobs, failures; and that a row never notices its company."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from quire.errors import InvalidRequestError
from quire.params import SamplingParams
from quire.tensors import native
from quire.tensors.sampler import Row, Sampled, Sampler, SequenceState
from quire.tensors.sampler_reference import edited_logits
from tests.tensors.sampler_masks import random_mask

VOCABS = [1, 2, 17, 600, 50257]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def restored_isa() -> Iterator[None]:
    before = native.isa()
    yield
    native.set_isa(before)


def draw(backend: str, logits: Tensor, rows: Sequence[Row], num_threads: int = 2) -> list[Sampled]:
    return Sampler(logits.shape[1], backend, num_threads).sample(logits, rows)


def row(vocab_size: int, prompt: Sequence[int] = (), output: Sequence[int] = (), seed: int = 0, banned: Sequence[int] = (), **params: object) -> Row:
    state = SequenceState(SamplingParams(**params), seed, vocab_size, prompt).after(output)
    return Row(state, len(prompt) + len(output), banned)


def random_rows(rng: random.Random, vocab_size: int, num_rows: int) -> list[Row]:
    def ids(most: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(rng.randint(1, most))]

    rows = []
    for _ in range(num_rows):
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.3, 1.0, 1.0, 2.0, 1e-40]),
            top_k=rng.choice([0, 0, 1, 5, 50, 100_000]),
            top_p=rng.choice([1.0, 1.0, 0.1, 0.9, 0.999, 1e-9]),
            min_p=rng.choice([0.0, 0.0, 0.1, 1.0]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.3, 0.7]),
            presence_penalty=rng.choice([0.0, 0.5, -1.0]),
            frequency_penalty=rng.choice([0.0, 0.25]),
            logit_bias=rng.choice([None, {ids(1)[0]: 3.5, 0: -100.0}]),
            allowed_token_ids=rng.choice([None, None, ids(30)]),
            logprobs=rng.choice([None, 0, 3, 20]),
        )
        state = SequenceState(params, rng.randrange(2**64), vocab_size, ids(40)).after(ids(40))
        rows.append(Row(state, rng.randrange(2**31), rng.choice([(), ids(2)]), mask=rng.choice([None, None, random_mask(rng, vocab_size)])))
    return rows


def random_logits(rng: random.Random, num_rows: int, vocab_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Wide or flat, sometimes with many ties, sometimes with tokens the model rules out."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    logits = torch.randn(num_rows, vocab_size, generator=generator) * rng.choice([0.01, 1.0, 3.0, 10.0])
    if rng.random() < 0.3:
        logits = logits.round()
    if rng.random() < 0.3:
        logits[torch.rand(num_rows, vocab_size, generator=generator) < 0.3] = -math.inf
    return logits.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", VOCABS)
def test_greedy_is_the_first_largest_logit(backend: str, vocab_size: int, dtype: torch.dtype) -> None:
    logits = torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(vocab_size)).to(dtype)  # in 16 bits the largest is often tied
    logits[0] = 1.5
    logits[1, vocab_size // 2 :] = 9.0
    drawn = draw(backend, logits, [row(vocab_size, temperature=0.0)] * 5)
    assert [d.token_id for d in drawn] == [values.index(max(values)) for values in logits.tolist()]
    assert all(d == Sampled(d.token_id) for d in drawn)


def test_native_agrees_with_the_reference(restored_isa: None) -> None:
    rng, num, differing = random.Random(5), 0, 0
    for case in range(70):
        vocab_size = rng.choice([1, 2, 17, 31, 32, 33, 600]) if case else 4099
        logits = random_logits(rng, 6, vocab_size, rng.choice(DTYPES))
        rows = random_rows(rng, vocab_size, 6)
        slow = draw("reference", logits, rows)
        for isa in native.isas():
            native.set_isa(isa)
            for mine, theirs, asked in zip(draw("native", logits, rows), slow, rows, strict=True):
                num += 1
                assert mine.failure == theirs.failure
                if mine.token_id != theirs.token_id:
                    assert asked.state.params.temperature > 0
                    differing += 1
                    continue
                assert (mine.logprob is None) == (theirs.logprob is None) and (mine.top is None) == (theirs.top is None)
                assert [t.token_id for t in mine.top or []] == [t.token_id for t in theirs.top or []]
                logprobs = [[d.logprob or 0.0, *(t.logprob for t in d.top or [])] for d in (mine, theirs)]
                assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-5, rel=1e-6)
    assert differing <= num / 1000


def test_large_vocabulary_agrees_with_the_reference() -> None:
    rng = random.Random(6)
    logits = random_logits(rng, 6, 151_936, torch.bfloat16)
    kinds: list[dict[str, object]] = [{}, {"top_p": 0.9}, {"top_k": 50}, {"top_k": 5000, "top_p": 0.5}, {"top_p": 0.9999}, {"min_p": 0.01}]
    rows = [row(151_936, seed=i, logprobs=5, **kind) for i, kind in enumerate(kinds)]
    for fast, slow in zip(draw("native", logits, rows), draw("reference", logits, rows), strict=True):
        assert fast.token_id == slow.token_id
        assert [t.token_id for t in fast.top or []] == [t.token_id for t in slow.top or []]


def test_same_values_in_any_dtype_give_the_same_draw(backend: str) -> None:
    rng = random.Random(7)
    logits = torch.randint(-60, 60, (12, 600), generator=torch.Generator().manual_seed(3)) / 8.0
    rows = random_rows(rng, 600, 12)
    assert draw(backend, logits, rows) == draw(backend, logits.bfloat16(), rows) == draw(backend, logits.half(), rows)


def test_a_row_does_not_notice_its_company(backend: str) -> None:
    rng = random.Random(8)
    logits, rows = random_logits(rng, 24, 1000), random_rows(rng, 1000, 24)
    logits[5, 3] = math.nan
    alone = [draw(backend, logits[i : i + 1], [r], 1)[0] for i, r in enumerate(rows)]
    for num_threads in (1, 2, 5):
        assert draw(backend, logits, rows, num_threads) == alone
        order = rng.sample(range(24), 17)
        assert draw(backend, logits[order], [rows[i] for i in order], num_threads) == [alone[i] for i in order]
    wide = torch.full((24, 3000), math.nan)  # rows of a wider matrix, poison beside them
    wide[:, 1000:2000] = logits
    assert draw(backend, wide[:, 1000:2000], rows) == alone
    assert draw(backend, logits.T.contiguous().T, rows) == alone
    assert draw(backend, logits[:0], []) == []


def test_logits_are_not_changed_and_draws_repeat(backend: str) -> None:
    rng = random.Random(9)
    logits, rows = random_logits(rng, 8, 600), random_rows(rng, 600, 8)
    before = logits.clone()
    assert draw(backend, logits, rows) == draw(backend, logits, rows)
    assert torch.equal(logits, before)


def test_a_row_without_finite_logits_fails_alone(backend: str) -> None:
    logits = torch.zeros(6, 40)
    logits[0, 39], logits[1, 0], logits[2] = math.nan, math.inf, -math.inf
    logits[5, 1:] = -math.inf
    rows = [row(40, logprobs=2)] * 4 + [row(40, banned=[7, 8], allowed_token_ids=[8, 7]), row(40, logprobs=3)]
    drawn = draw(backend, logits, rows)
    assert [d.failure for d in drawn] == ["not_finite", "not_finite", "nothing_left", None, "nothing_left", None]
    assert [d.ok for d in drawn] == [d.token_id >= 0 for d in drawn] == [False, False, False, True, False, True]
    assert drawn[0] == Sampled(-1, failure="not_finite")
    assert drawn[5].token_id == 0 and drawn[5].logprob == 0.0 and drawn[5].top == [(0, 0.0)]  # tokens without mass are not among the top


def test_masks(backend: str) -> None:
    logits = torch.arange(20.0).repeat(30, 1)
    rows = [Row(SequenceState(SamplingParams(temperature=5.0, allowed_token_ids=[3, 3, 11, 4]), 1, 20), i, [4]) for i in range(30)]
    assert {d.token_id for d in draw(backend, logits, rows)} == {3, 11}
    assert draw(backend, logits[:1], [row(20, temperature=0.0, banned=[19, 18, -1, 99])])[0].token_id == 17
    assert draw(backend, logits[:1], [row(20, temperature=0.0, logit_bias={2: 17.5, 19: -1000.0})])[0].token_id == 2
    assert draw(backend, logits[:1], [row(20, temperature=0.0, logit_bias={2: 17.0})])[0].token_id == 2  # a tie
    assert draw(backend, logits[:1], [row(20, temperature=0.0, logit_bias={2: 1000.0}, allowed_token_ids=[1])])[0].token_id == 1


def test_penalties_follow_the_formula(backend: str) -> None:
    """Each token's edited logit, seen through greedy draws among two tokens with a bias that just tips the balance."""
    prompt, output, rng = [1, 2, 2, 3], [3, 4, 4, 4, 5], random.Random(10)
    logits = torch.tensor([[rng.uniform(-4, 4) for _ in range(12)]])
    params = SamplingParams(repetition_penalty=1.25, presence_penalty=0.5, frequency_penalty=-0.375)
    expected, counts = logits[0].tolist(), Counter(output)
    for i in {*prompt, *output}:
        expected[i] = expected[i] / 1.25 if expected[i] > 0 else expected[i] * 1.25
        expected[i] -= 0.5 * (counts[i] > 0) - 0.375 * counts[i]
    state = SequenceState(params, 0, 12, prompt).after(output)
    assert edited_logits(logits[0], Row(state, 9)).tolist() == pytest.approx(expected, abs=1e-6)
    for i in range(1, 12):
        for nudge in (-1e-4, 1e-4):
            asked = row(
                12,
                prompt,
                output,
                temperature=0.0,
                allowed_token_ids=[0, i],
                logit_bias={i: expected[0] - expected[i] + nudge},
                repetition_penalty=1.25,
                presence_penalty=0.5,
                frequency_penalty=-0.375,
            )
            assert draw(backend, logits, [asked])[0].token_id == (i if nudge > 0 else 0)


def test_repetition_penalty_is_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(4))
    prompt, output = list(range(0, 200, 3)), list(range(0, 100, 7))
    theirs = RepetitionPenaltyLogitsProcessor(penalty=1.5)(torch.tensor([prompt + output]), logits.clone())
    assert torch.equal(edited_logits(logits[0], row(300, prompt, output, repetition_penalty=1.5)), theirs[0])


def test_state_grown_token_by_token_is_the_state_made_at_once(backend: str) -> None:
    params = SamplingParams(repetition_penalty=1.2, frequency_penalty=0.3, temperature=0.8)
    grown, output, rng = SequenceState(params, 3, 50, [1, 2, 3]), [], random.Random(11)
    for position in range(3, 60):
        logits = random_logits(rng, 1, 50)
        made = SequenceState(params, 3, 50, [1, 2, 3]).after(output)
        assert draw(backend, logits, [Row(grown, position)]) == draw(backend, logits, [Row(made, position)])
        output.append(rng.randrange(10))
        grown.append(output[-1])
    assert not SequenceState(SamplingParams(), 0, 50, [1]).after([2]).penalised_ids  # nothing is counted that nobody needs


def test_extreme_numbers_stay_finite(backend: str) -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0, -math.inf]])
    for penalty in (1e-300, 1e6):
        asked = row(4, [0, 1, 2, 3], [0], repetition_penalty=penalty, temperature=0.0, logit_bias={0: 1000.0, 3: 1000.0}, logprobs=4)
        assert draw(backend, logits, [asked])[0].token_id == 0
    assert draw(backend, logits, [row(4, [1], repetition_penalty=1e6, allowed_token_ids=[1, 3])])[0].token_id == 1
    for temperature in (1e-320, 1e-30, 1e-6, 100.0):
        assert draw(backend, logits, [row(4, temperature=temperature, min_p=1e-320, top_p=1e-300)])[0].token_id == 0


@pytest.mark.parametrize("vocab_size", VOCABS)
def test_logprobs_are_those_of_the_raw_logits(backend: str, vocab_size: int) -> None:
    logits = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * 4
    logits[1] = torch.arange(vocab_size) % 7
    expected = torch.log_softmax(logits.double(), -1)
    heavy: dict[str, object] = {"temperature": 3.0, "repetition_penalty": 2.0, "logit_bias": {0: 5.0}, "top_k": 3}
    for k in (0, 1, 20, 256):
        for drawn, logprobs in zip(draw(backend, logits, [row(vocab_size, [0], logprobs=k, **heavy)] * 3), expected, strict=True):
            assert drawn.logprob == pytest.approx(float(logprobs[drawn.token_id]), abs=1e-5)
            ids = torch.sort(logprobs, descending=True, stable=True).indices[:k].tolist()
            assert (drawn.top is None) == (k == 0)
            if drawn.top is not None:
                assert [t.token_id for t in drawn.top] == ids
                assert [t.logprob for t in drawn.top] == pytest.approx(logprobs[ids].tolist(), abs=1e-5)
                assert all(t.logprob == drawn.logprob for t in drawn.top if t.token_id == drawn.token_id)


def test_a_given_token_is_scored_with_the_bits_of_one_drawn(backend: str) -> None:
    rng = random.Random(12)
    logits = random_logits(rng, 10, 600, torch.bfloat16)
    drawn = draw(backend, logits, [row(600, seed=i, logprobs=4) for i in range(10)])
    assert draw(backend, logits, [row(600, logprobs=4)._replace(given=d.token_id) for d in drawn]) == drawn
    logits[0, 5], logits[1, 6] = math.nan, -math.inf
    scored = draw(backend, logits, [row(600, logprobs=0)._replace(given=6)] * 10)
    assert scored[0] == Sampled(-1, failure="not_finite") and scored[1].logprob == -math.inf and scored[1].top is None


def test_scaled_logprobs_are_those_of_the_logits_over_the_temperature(backend: str) -> None:
    logits = random_logits(random.Random(13), 6, 300, torch.bfloat16)
    temperatures = [0.0, 1e-30, 0.1, 0.7, 1.0, 3.0]
    rows = [row(300, seed=i, logprobs=3, temperature=t, scaled_logprobs=True) for i, t in enumerate(temperatures)]
    drawn = draw(backend, logits, rows)
    for one, raw, t in zip(drawn, logits.float(), temperatures, strict=True):
        assert one.logprob is not None and one.top is not None
        expected = torch.log_softmax((raw.double() - raw.max()) / (t or 1.0), dim=-1)
        assert one.logprob == pytest.approx(float(expected[one.token_id]), rel=1e-5, abs=1e-5)
        assert [top.token_id for top in one.top] == torch.sort(raw, descending=True, stable=True).indices[: len(one.top)].tolist()
    given = [one._replace(given=token.token_id) for one, token in zip(rows, drawn, strict=True)]
    assert draw(backend, logits.flip(0), given[::-1]) == drawn[::-1]


def test_returned_logits_are_the_raw_ones(backend: str) -> None:
    logits = random_logits(random.Random(14), 3, 100, torch.bfloat16)
    rows = [row(100, return_logits=True, logit_bias={3: 5.0}), row(100), row(100, return_logits=True)]
    drawn = draw(backend, logits, rows)
    assert drawn[1].logits is None
    for i in (0, 2):
        kept = drawn[i].logits
        assert kept is not None and kept.dtype == torch.float32 and torch.equal(kept, logits[i].float())


def test_mistakes_are_named(backend: str) -> None:
    sampler = Sampler(10, backend, 1)
    for logits in (torch.zeros(1, 9), torch.zeros(2, 10), torch.zeros(10), torch.zeros(1, 10, dtype=torch.float64)):
        with pytest.raises(ValueError, match="logits"):
            sampler.sample(logits, [row(10)])
    with pytest.raises(ValueError, match="position"):
        sampler.sample(torch.zeros(1, 10), [Row(row(10).state, -1)])
    with pytest.raises(ValueError, match="vocabulary"):
        sampler.sample(torch.zeros(1, 10), [row(11)])
    with pytest.raises(ValueError, match="given"):
        sampler.sample(torch.zeros(1, 10), [row(10)._replace(given=10)])
    with pytest.raises(ValueError, match="seed"):
        row(10, seed=2**64)
    for params in ({"logit_bias": {10: 1.0}}, {"allowed_token_ids": [10]}, {"stop_token_ids": [10]}):
        with pytest.raises(InvalidRequestError, match="vocabulary"):
            row(10, **params)
    with pytest.raises(InvalidRequestError, match="prompt"):
        row(10, [10], repetition_penalty=1.1)
