"""Drafts change no bit of anything, right or wrong; what they save and cost is told. The oracle is the request alone in an engine without them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quire import LLM, ConfigError, InvalidRequestError, NonFiniteLogitsError, SamplingParams, StepError, StructuredOutput
from quire.errors import RequestFailedError
from quire.policy.drafts import PromptLookup
from quire.text.grammar import Guide
from tests.engine.conftest import Checkpoint, tokenizer
from tests.engine.test_transparency import Job, alone, bits, jobs, together
from tests.tensors.checkpoints import VOCAB, make

PROMPT = [*range(20, 41)]
GREEDY = SamplingParams(max_tokens=24, temperature=0, logprobs=0, ignore_eos=True)


@pytest.fixture
def knowing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[Sequence[int]], float], None]:
    """knowing(sequences, chance): from here on guesses are what these go on with, but that a token is wrong by this chance."""

    def know(sequences: Sequence[Sequence[int]], chance: float) -> None:
        rng = random.Random(7)

        def guess(self: PromptLookup, tokens: list[int], room: int) -> tuple[int, ...]:
            whole = next((list(one) for one in sequences if list(one[: len(tokens)]) == tokens), tokens)
            ahead = (whole + [5] * 20)[len(tokens) :][: max(0, min(room, rng.randint(0, self._most)))]
            return tuple(rng.randrange(VOCAB) if rng.random() < chance else token for token in ahead)

        monkeypatch.setattr(PromptLookup, "guess", guess)

    return know


def wholes(work: Sequence[Job], results: Sequence[tuple[Any, ...]]) -> list[list[int]]:
    return [[*prompt, *one[0]] for (prompt, _), result in zip(work, results, strict=True) for one in result]


CASES = [
    ("llama", torch.bfloat16, {"kv_codec": "int8", "quantization": "int8"}),
    ("gemma3_text", torch.bfloat16, {}),
    ("llama4_text", torch.float32, {}),
    ("lfm2", torch.float32, {}),
]


@pytest.mark.parametrize(("family", "dtype", "options"), CASES, ids=lambda x: str(x).removeprefix("torch."))
def test_no_bit_changes(checkpoint: Checkpoint, family: str, dtype: torch.dtype, options: dict[str, Any], knowing: Any) -> None:
    folder, work = checkpoint(family, dtype), jobs(11, 8)
    work += [(prompt, replace(params, min_tokens=1, n=2)) for prompt, params in work[:3]]
    expected = alone(folder, work, **options)
    knowing(wholes(work, expected), 0.2)
    for page_size, budget, most, max_sequences in ((16, 512, 15, 64), (3, 17, 6, 3)):
        sizes = {"page_size": page_size, "max_tokens_per_step": budget, "max_sequences": max_sequences}
        with LLM(folder, prompt_lookup_num_tokens=most, **sizes, **options) as llm:
            assert together(llm, work) == expected
            stats = llm.stats()
            assert 0 < stats["num_accepted_tokens"] < stats["num_drafted_tokens"]
            assert together(llm, work) == expected, "from the cache"


def test_what_repeats_takes_fewer_steps(checkpoint: Checkpoint) -> None:
    """With the guesses as they are."""
    folder, params = checkpoint("llama"), replace(GREEDY, max_tokens=200, allowed_token_ids=[5, 6, 7])
    [expected] = alone(folder, [(PROMPT, params)])
    with LLM(folder, prompt_lookup_num_tokens=8) as llm:
        events = [*llm.submit(PROMPT, params)]
        output = events[-1].output
        assert output is not None and bits(output) == expected
        assert [token for event in events for token in event.token_ids] == output.outputs[0].token_ids
        receipt, stats = output.receipt, llm.stats()
        assert receipt.accepted_tokens == stats["num_accepted_tokens"] > 60
        assert stats["num_steps"] == 200 - receipt.accepted_tokens
        assert receipt.computed_tokens == len(PROMPT) + 199 and receipt.staged_tokens == stats["num_computed_tokens"]
        assert receipt.rejected_tokens == stats["num_drafted_tokens"] - stats["num_accepted_tokens"]


def test_an_end_among_drafts_is_the_end(checkpoint: Checkpoint, knowing: Any) -> None:
    folder = checkpoint("llama")
    with LLM(folder) as llm:
        [plain] = llm.generate([PROMPT], GREEDY)
        token_ids, text = plain.outputs[0].token_ids, plain.outputs[0].text
        stop = llm.tokenizer.decode(token_ids[6:8]) if llm.tokenizer is not None else ""
        ends = [
            replace(GREEDY, stop_token_ids=[token_ids[7]]),
            replace(GREEDY, stop_token_ids=[token_ids[7]], min_tokens=7),
            replace(GREEDY, stop_token_ids=[token_ids[7]], min_tokens=12),
            replace(GREEDY, stop=[stop]),
            replace(GREEDY, max_tokens=5),
            replace(GREEDY, max_tokens=1),
            replace(GREEDY, max_tokens=2),
        ]
        assert stop and stop in text
        expected = [bits(output) for output in llm.generate([PROMPT] * len(ends), ends)]
    knowing([[*PROMPT, *token_ids]], 0.0)
    with LLM(folder, prompt_lookup_num_tokens=15, page_size=4) as llm:
        for params, one in zip(ends, expected, strict=True):
            before = llm.stats()["num_drafted_tokens"]
            [output] = llm.generate([PROMPT], params)
            assert bits(output) == one
            drafted = llm.stats()["num_drafted_tokens"] - before
            assert params.max_tokens == GREEDY.max_tokens or drafted <= max(0, params.max_tokens - 2), "one more is drawn behind the last draft"
            llm.check_integrity()


def test_a_penalty_counts_drafts(checkpoint: Checkpoint, knowing: Any) -> None:
    """Of few tokens, so that each is soon drawn again, and how often decides which is next."""
    penalties = ({"repetition_penalty": 1.5}, {"presence_penalty": 0.5}, {"frequency_penalty": 0.3}, {"frequency_penalty": -0.5})
    folder, work = checkpoint("llama"), [(PROMPT, replace(GREEDY, allowed_token_ids=[*range(5, 25)], **one)) for one in penalties]
    expected = alone(folder, work)
    with LLM(folder, prompt_lookup_num_tokens=15) as llm:
        for one, result in zip(work, expected, strict=True):
            knowing(wholes([one], [result]), 0.0)
            accepted = llm.stats()["num_accepted_tokens"]
            assert together(llm, [one]) == [result] and llm.stats()["num_accepted_tokens"] > accepted


def test_pages_run_out(checkpoint: Checkpoint, knowing: Any) -> None:
    folder, rng = checkpoint("gemma3_text", torch.bfloat16), random.Random(3)
    params = [SamplingParams(max_tokens=70, temperature=1.0, seed=i, logprobs=0, ignore_eos=True) for i in range(7)]
    work = [([rng.randrange(3, VOCAB) for _ in range(rng.randint(3, 20))], p) for p in params]
    expected = alone(folder, work)
    knowing(wholes(work, expected), 0.3)
    with LLM(folder, page_size=8) as llm:
        needed = llm.info.page_bytes * len(llm.info.groups) * 16
    with LLM(folder, max_tokens_per_step=40, page_size=8, cache_bytes=needed, prompt_lookup_num_tokens=15) as llm:
        assert together(llm, work) == expected
        stats = llm.stats()
        assert stats["num_preemptions"] > 0 and stats["num_accepted_tokens"] > 0


def test_what_is_nan_behind_a_wrong_draft_is_nobodys(checkpoint: Checkpoint, knowing: Any) -> None:
    folder = checkpoint("llama")
    with LLM(folder) as llm:
        [plain] = llm.generate([PROMPT], GREEDY)
    token_ids = plain.outputs[0].token_ids
    bad = next(token for token in range(3, VOCAB) if token not in token_ids)
    with LLM(folder, prompt_lookup_num_tokens=4) as llm:
        model = llm._built.engine.runner.model
        original = model.forward

        def poisoned(step: Any, ids: torch.Tensor, positions: torch.Tensor, logits_at: torch.Tensor, *more: Any) -> torch.Tensor:
            logits = original(step, ids, positions, logits_at, *more).clone()
            logits[ids[logits_at] == bad] = float("nan")
            return logits

        model.forward = poisoned
        knowing([[*PROMPT, *token_ids[:6], bad, bad, bad]], 0.0)
        [output] = llm.generate([PROMPT], GREEDY)
        assert bits(output) == bits(plain) and output.receipt.rejected_tokens > 0
        bad = token_ids[4]  # and what is drawn is not
        knowing([[*PROMPT, *token_ids]], 0.0)
        [output] = llm.generate([PROMPT], GREEDY)
        assert isinstance(output.error, NonFiniteLogitsError) and output.outputs[0].token_ids == token_ids[:5]
        llm.check_integrity()


def test_a_step_that_fails_with_drafts(checkpoint: Checkpoint, knowing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint("llama")
    with LLM(folder, prompt_lookup_num_tokens=4, page_size=4) as llm:
        [plain] = llm.generate([PROMPT], GREEDY)
        knowing([[*PROMPT, *plain.outputs[0].token_ids]], 0.0)
        runner = llm._built.engine.runner
        sample: Any = runner.sampler.sample

        def fail(logits: torch.Tensor, rows: Any) -> Any:
            if len(rows) > 2:
                raise RuntimeError("injected")
            return sample(logits, rows)

        monkeypatch.setattr(runner.sampler, "sample", fail)
        [output] = llm.generate([PROMPT], GREEDY)
        assert isinstance(output.error, StepError) and output.receipt.rejected_tokens > 1
        got = output.outputs[0].token_ids
        assert got == plain.outputs[0].token_ids[: len(got)]
        monkeypatch.setattr(runner.sampler, "sample", sample)
        assert bits(llm.generate([PROMPT], GREEDY)[0]) == bits(plain)
        llm.check_integrity()


SCHEMA = {
    "type": "object",
    "properties": {"the_quick_brown_fox": {"type": "integer"}, "jumps": {"enum": ["over", "under"]}},
    "additionalProperties": False,
}
FORMS = [
    StructuredOutput(json_schema={**SCHEMA, "required": ["the_quick_brown_fox", "jumps"]}),
    StructuredOutput(regex="the quick brown fox (jumps over the (lazy )?dog|is a fox)( and so on)*"),
    StructuredOutput(choice=["pack my box", "pack my box with five dozen", "pack my bags with liquor jugs"]),
    StructuredOutput(regex="(ab|cd)+"),
]


def test_forced_text_comes_several_tokens_a_step(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the tokens that a grammar leaves alone to be drawn, and as what may be drawn under it."""
    folder, rng = checkpoint("llama", torch.bfloat16), random.Random(9)
    sampled = SamplingParams(max_tokens=60, temperature=1.0, logprobs=2, ignore_eos=True)
    work = [
        (
            PROMPT[:i],
            replace(sampled, structured=form, seed=i, min_tokens=rng.choice([0, 0, 30]), max_tokens=rng.choice([60, 60, 30]), n=rng.choice([1, 2])),
        )
        for i, form in enumerate(FORMS * 3, 3)
    ]
    with monkeypatch.context() as patch:
        patch.setattr("quire.engine.drafting.Guided.guess", lambda *_: ())
        expected = alone(folder, work)
    with LLM(folder, max_sequences=5) as llm:
        assert together(llm, work) == expected
        stats = llm.stats()
        wrong = stats["num_drafted_tokens"] - stats["num_accepted_tokens"]
        assert stats["num_accepted_tokens"] > 40 and wrong <= 2 * len(work), "the last one may end a text, and nothing comes behind it"
    with LLM(folder, max_sequences=5, prompt_lookup_num_tokens=8, page_size=4, max_tokens_per_step=19) as llm:
        assert together(llm, work) == expected
        assert llm.stats()["num_drafted_tokens"] > llm.stats()["num_accepted_tokens"] > 40


def test_what_a_grammar_forbids_is_not_drafted(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PromptLookup, "guess", lambda self, tokens, room: (VOCAB - 1,) * room)
    with LLM(checkpoint("llama"), prompt_lookup_num_tokens=8) as llm:
        [free, held] = llm.generate([PROMPT] * 2, [GREEDY, replace(GREEDY, structured=StructuredOutput(regex="[a-f]{90}"))])
        assert free.receipt.rejected_tokens > 0 and held.error is None and held.receipt.rejected_tokens == 0


def test_a_mask_that_fails_behind_a_draft_ends_the_request(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    after = Guide.after

    def failing(self: Guide, token_id: int) -> Guide:
        ahead = after(self, token_id)
        ahead.fail("injected")
        return ahead

    monkeypatch.setattr(Guide, "after", failing)
    with LLM(checkpoint("llama")) as llm:
        [output] = llm.generate([PROMPT], replace(GREEDY, structured=FORMS[1]))
        assert isinstance(output.error, RequestFailedError) and "structured: injected" in str(output.error)
        llm.check_integrity()


def test_a_request_may_ask_for_more_or_none(checkpoint: Checkpoint) -> None:
    repeating = replace(GREEDY, allowed_token_ids=[5, 6, 7])
    for own, asked in ((8, 0), (0, 8), (8, None)):
        with LLM(checkpoint("llama"), prompt_lookup_num_tokens=own) as llm:
            [output] = llm.generate([PROMPT], replace(repeating, prompt_lookup_num_tokens=asked))
            assert bool(output.receipt.accepted_tokens) == (asked != 0)


@pytest.mark.parametrize("value", [-1, 16, True, 2.0, "4"])
def test_how_many_is_checked(value: Any) -> None:
    limit = r"prompt_lookup_num_tokens=.*must be an integer from 0 to 15"
    with pytest.raises(ConfigError, match=limit):
        LLM("nowhere", prompt_lookup_num_tokens=value)
    with pytest.raises(InvalidRequestError, match=limit):
        SamplingParams(prompt_lookup_num_tokens=value)


def test_a_prediction_is_drafted(checkpoint: Checkpoint) -> None:
    """Where it is right it is taken whole, where it differs what follows the difference is found again. Nothing else depends on it."""
    folder = checkpoint("llama")
    with LLM(folder) as llm:
        [plain] = llm.generate([PROMPT], replace(GREEDY, max_tokens=60))
        token_ids = plain.outputs[0].token_ids
        edited = [*token_ids[:20], 7, 7, *token_ids[23:]]
        assert llm.tokenizer is not None
        text = llm.tokenizer.decode(token_ids, skip_special_tokens=False)
        for prediction in (token_ids, edited, text, [5] * 50, "", []):
            [output] = llm.generate([PROMPT], replace(GREEDY, max_tokens=60, prediction=prediction))
            assert bits(output) == bits(plain)
            accepted = output.receipt.accepted_tokens
            assert prediction is not token_ids or accepted >= 45
            assert prediction is not edited or accepted >= 35
            assert prediction not in ("", []) or accepted + output.receipt.rejected_tokens == 0
        for wrong in ([VOCAB], "\ud800"):
            with pytest.raises(InvalidRequestError, match="prediction="):
                llm.generate([PROMPT], replace(GREEDY, prediction=wrong))
        llm.check_integrity()


def test_a_prediction_that_cannot_be_drafted_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A tokenizer may know more tokens than the model: a draft of one failed the step, and all who were in it."""
    folder = make(tmp_path, "llama", vocab_size=310)
    knows_more = tokenizer()
    knows_more.add_tokens(["FOX"])
    knows_more.save_pretrained(folder)
    with LLM(folder) as llm:
        outside = knows_more("FOX").input_ids
        assert outside == [310]
        for prediction in ("the FOX", outside):
            with pytest.raises(InvalidRequestError, match="prediction=310: must be token ids from 0 to 309"):
                llm.generate([[5, 6]], SamplingParams(prediction=prediction))
        assert llm.generate([[5, 6]], SamplingParams(prediction="the fox"))[0].error is None
        with pytest.raises(InvalidRequestError, match="prediction='2049 tokens': must be at most 2048 tokens, the context"):
            llm.generate([[5, 6]], SamplingParams(prediction=[5] * 2049))
