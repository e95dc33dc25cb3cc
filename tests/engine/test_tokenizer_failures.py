"""A tokenizer may be anybody's code: what it raises while decoding ends the request whose tokens they are, and no other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from quire import LLM, SamplingParams, TokenizerError
from tests.engine.conftest import Checkpoint

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
MINE, OTHER = list(range(3, 40)), list(range(90, 140))


class TokenizerFault(KeyError):
    pass


@pytest.fixture
def faulty(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> tuple[LLM, Callable[[int], None]]:
    """An engine, and what makes its tokenizer raise for a token from then on."""
    llm = LLM(checkpoint())
    tokenizer = llm._built.tokenizer
    assert tokenizer is not None
    decode = type(tokenizer).decode

    def raise_for(token_id: int) -> None:
        def faulty_decode(self: object, ids: Sequence[int], skip_special_tokens: bool) -> str:
            if token_id in ids:
                raise TokenizerFault(token_id)
            return decode(tokenizer, ids, skip_special_tokens)

        monkeypatch.setattr(type(tokenizer), "decode", faulty_decode)

    return llm, raise_for


def has_text(llm: LLM, token_id: int) -> bool:
    """A model's vocabulary may be larger than its tokenizer's, which is then never asked."""
    tokenizer = llm._built.tokenizer
    return tokenizer is not None and tokenizer.knows(token_id) and token_id not in tokenizer.special_ids


@pytest.mark.parametrize("at", [0, 5, 23], ids=["first", "middle", "last"])
@pytest.mark.parametrize("params", [GREEDY, replace(GREEDY, n=2), replace(GREEDY, stop=["no such text"])], ids=["one", "two", "stop"])
def test_what_it_raises_ends_its_request_alone(faulty: tuple[LLM, Callable[[int], None]], params: SamplingParams, at: int) -> None:
    llm, raise_for = faulty
    mine, other = llm.generate([MINE, OTHER], params)
    tokens = mine.outputs[0].token_ids
    spared = {*MINE, *OTHER} | {token for one in other.outputs for token in one.token_ids}
    bad = next(token for token in [*tokens[at:], *tokens] if token not in spared and has_text(llm, token))
    raise_for(bad)
    failed, unharmed = llm.generate([MINE, OTHER], params)
    assert isinstance(failed.error, TokenizerError) and isinstance(failed.error.__cause__, TokenizerFault)
    assert "tokenizer" in str(failed.error) and all(one.finish_reason == "error" for one in failed.outputs)
    assert [(one.token_ids, one.text, one.finish_reason) for one in unharmed.outputs] == [
        (o.token_ids, o.text, o.finish_reason) for o in other.outputs
    ]
    drawn = failed.outputs[0].token_ids
    assert bad in drawn and drawn == tokens[: len(drawn)]
    llm.check_integrity()
    assert llm.stats()["num_running"] == 0 and llm.failure is None
    llm.close()


def test_a_prompt_that_it_cannot_decode_ends_before_it_runs(faulty: tuple[LLM, Callable[[int], None]]) -> None:
    llm, raise_for = faulty
    reference = llm.generate(OTHER, GREEDY)[0]
    raise_for(MINE[-1])
    failed, unharmed = llm.generate([MINE, OTHER], GREEDY)
    assert isinstance(failed.error, TokenizerError) and failed.outputs[0].token_ids == []
    assert unharmed.outputs[0].text == reference.outputs[0].text
    llm.check_integrity()
    llm.close()


def test_a_stream_ends_with_it(faulty: tuple[LLM, Callable[[int], None]]) -> None:
    llm, raise_for = faulty
    token_ids = llm.generate(MINE, GREEDY)[0].outputs[0].token_ids
    bad = next(token for token in token_ids[4:] if token not in MINE and has_text(llm, token))
    raise_for(bad)
    stream = llm.stream(MINE, GREEDY)
    last = list(stream)[-1]
    assert last.finish_reason == "error" and last.output is not None and isinstance(last.output.error, TokenizerError)
    assert llm.generate(OTHER, GREEDY)[0].outputs[0].finish_reason == "length"
    llm.close()
