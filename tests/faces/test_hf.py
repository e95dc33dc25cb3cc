"""Oracle: transformers' own `generate`, token for token in fp32, over what a script may ask; and that nothing else is taken."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, TextIteratorStreamer, TextStreamer

from quire.engine.llm import LLM
from quire.errors import ConfigError, InvalidRequestError
from quire.faces.generation import _HONOURED, _NEUTRAL, _NO_EFFECT
from quire.faces.hf import Generator
from tests.engine.conftest import tokenizer
from tests.tensors.checkpoints import VOCAB, make

FIELDS = sorted(name for name in vars(GenerationConfig()) if not name.startswith("_"))  # type: ignore[no-untyped-call]
REFUSED = [name for name in FIELDS if name not in _HONOURED | _NO_EFFECT]
TEXTS = ["the quick brown", "pack my box with five dozen liquor jugs", "a"]


class Pair(NamedTuple):
    """transformers' model, the same behind Quire, a tokenizer, and a left-padded batch of three prompts with its mask."""

    theirs: Any
    ours: Generator
    tokenizer: Any
    batch: dict[str, torch.Tensor]

    def check(self, **asked: Any) -> torch.Tensor:
        """Both give the same for a batch, which is given back."""
        wanted, got = self.theirs.generate(**asked), self.ours.generate(**asked)
        assert got.dtype == torch.int64 and torch.equal(wanted, got), (wanted, got)
        return got  # type: ignore[no-any-return]

    def drawn(self, num_tokens: int = 20) -> list[list[int]]:
        """What greedy decoding gives for each row."""
        return self.ours.generate(**self.batch, max_new_tokens=num_tokens)[:, -num_tokens:].tolist()  # type: ignore[no-any-return]


# A layer of each kind: what takes time here is transformers, which computes every layer of every token in Python.
LAYERS = {"llama": {}, "gemma3_text": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}, "gpt2": {"n_layer": 1}}


def made(root: Path, family: str) -> Iterator[Pair]:
    folder = make(root / family, family, **{"num_hidden_layers": 1, **LAYERS[family]})
    tokenizer().save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    words = tokenizer()
    words.padding_side = "left"
    encoded = words(TEXTS, return_tensors="pt", padding=True)
    with Generator(model, page_size=4, cache_bytes=2**24) as ours:
        yield Pair(model, ours, words, {name: encoded[name] for name in ("input_ids", "attention_mask")})


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "gpt2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Positions turned, windows that slide, positions learned."""
    yield from made(tmp_path_factory.mktemp("hf"), request.param)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """For what no family decides."""
    yield from made(tmp_path_factory.mktemp("hf"), "llama")


@pytest.mark.filterwarnings("ignore:Using the model-agnostic")
@pytest.mark.parametrize(
    "asked",
    [
        {"max_new_tokens": 20},
        {},  # transformers' own 20
        {"max_length": 24},
        {"max_length": 24, "max_new_tokens": 5},
        {"max_new_tokens": np.int64(5)},
        {"generation_config": GenerationConfig(max_new_tokens=9)},
        {"generation_config": GenerationConfig(max_new_tokens=9, repetition_penalty=1.3), "max_new_tokens": 4},
        {"max_new_tokens": 12, "do_sample": False, "temperature": 0.3, "top_k": 3, "top_p": 0.1},
        {"max_new_tokens": 16, "repetition_penalty": 1.7},
        {"max_new_tokens": 16, "repetition_penalty": 0.6, "min_length": 14},
        {"max_new_tokens": 6, "sequence_bias": {(7,): 90.0, (9,): float("-inf")}, "suppress_tokens": list(range(40, 300))},
        {"max_new_tokens": 6, "sequence_bias": [[[7], 3.3]], "num_beams": 1, "use_cache": True, "logits_processor": []},
    ],
    ids=str,
)
def test_the_same_rows(pair: Pair, asked: dict[str, Any]) -> None:
    pair.check(**pair.batch, **asked)


@pytest.mark.parametrize("more", [{}, {"min_new_tokens": 18}, {"min_length": 27}, {"min_new_tokens": 500}, {"pad_token_id": 5}], ids=str)
def test_rows_end_where_they_do_there(pair: Pair, more: dict[str, Any]) -> None:
    first, second, _ = pair.drawn()
    got = pair.check(**pair.batch, max_new_tokens=20, eos_token_id=[first[6], second[3]], **more)
    assert more or got.shape[1] <= pair.batch["input_ids"].shape[1] + 20
    pair.check(**pair.batch, max_new_tokens=20, eos_token_id=first[6], **more)
    pair.check(**pair.batch, max_new_tokens=20, eos_token_id=-1, **more)  # how scripts say that nothing ends a row
    pair.check(**pair.batch, max_new_tokens=20, eos_token_id=first[6], suppress_tokens=[first[6], -1], bad_words_ids=[[second[3]]], **more)


def test_the_models_own_config_counts(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    own, first = pair.theirs.generation_config, pair.drawn()[0]
    for name, value in {
        "max_new_tokens": 11,
        "repetition_penalty": 1.2,
        "pad_token_id": None,
        "eos_token_id": [first[4]],
        "chat_format": "x",
    }.items():
        monkeypatch.setattr(own, name, value, raising=False)
    assert pair.check(**pair.batch).shape[1] <= pair.batch["input_ids"].shape[1] + 11
    pair.check(**pair.batch, generation_config=GenerationConfig(repetition_penalty=1.0))
    pair.check(**pair.batch, generation_config=own)


def test_masks(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = pair.batch["input_ids"], pair.batch["attention_mask"]
    pair.check(inputs=ids, max_new_tokens=8)  # inferred from the pads
    pair.check(input_ids=ids, attention_mask=mask.bool(), max_new_tokens=8)
    pair.check(input_ids=ids.int(), max_new_tokens=8)
    monkeypatch.setattr(pair.theirs.generation_config, "pad_token_id", pair.theirs.generation_config.eos_token_id)
    pair.check(input_ids=torch.where(mask.bool(), ids, 2), max_new_tokens=8)  # a pad that is the end: not inferred
    monkeypatch.undo()
    assert pair.check(max_new_tokens=8).shape == (1, 9)  # no prompt at all: the first token is the model's own
    right = torch.tensor([[5, 6, 7, 0, 0]])  # transformers would go on from a pad; here the row goes on from its last token
    got = pair.ours.generate(right, attention_mask=torch.tensor([[1, 1, 1, 0, 0]]), max_new_tokens=8)
    assert got[:, :5].equal(right) and got[:, 5:].equal(pair.check(input_ids=right[:, :3], max_new_tokens=8)[:, 3:])


def test_stop_strings(pair: Pair) -> None:
    rows = pair.drawn()
    strings = [pair.tokenizer.decode(rows[0][6:8]), pair.tokenizer.decode(rows[1][3:4])]
    strings = [string for string in strings if string and "\ufffd" not in string] or ["e"]
    for more in ({}, {"min_new_tokens": 10}, {"eos_token_id": rows[2][4]}):
        pair.check(**pair.batch, max_new_tokens=20, stop_strings=strings, tokenizer=pair.tokenizer, **more)
    # A stop string that begins in the prompt counts, as it does there, and so does a special token.
    biased = {"sequence_bias": {(pair.tokenizer.convert_tokens_to_ids("x"),): 1000.0}, "max_new_tokens": 4, "tokenizer": pair.tokenizer}
    one = pair.tokenizer(["pack my bo"], return_tensors="pt").input_ids
    assert pair.check(input_ids=one, stop_strings="box", **biased).shape[1] == one.shape[1] + 1
    assert pair.check(input_ids=one, stop_strings=["xx", "</s>"], **biased).shape[1] == one.shape[1] + 2
    end = {**biased, "sequence_bias": {(2,): 1000.0}, "eos_token_id": -1}
    assert pair.check(input_ids=one, stop_strings="</s>", **end).shape[1] == one.shape[1] + 1


def test_logits_and_scores(pair: Pair) -> None:
    end = pair.drawn()[0][5]
    asked = {"max_new_tokens": 9, "min_new_tokens": 3, "repetition_penalty": 1.4, "eos_token_id": end, "suppress_tokens": [9]}
    asked |= {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    wanted, got = pair.theirs.generate(**pair.batch, **asked), pair.ours.generate(**pair.batch, **asked)
    assert type(got) is type(wanted) and torch.equal(got.sequences, wanted.sequences) and got.attentions is None
    num_new = got.sequences.shape[1] - pair.batch["input_ids"].shape[1]
    assert len(got.logits) == len(got.scores) == num_new == len(wanted.logits)
    for i in range(num_new):
        live = [end not in row[-num_new : len(row) - num_new + i] for row in got.sequences.tolist()]
        for name in ("logits", "scores"):
            a, b = getattr(got, name)[i], getattr(wanted, name)[i]
            assert a.shape == b.shape == (3, VOCAB) and a.dtype == torch.float32
            torch.testing.assert_close(a[live], b[live], atol=2e-4, rtol=1e-5)
    plain = pair.ours.generate(**pair.batch, max_new_tokens=3, return_dict_in_generate=True)
    assert plain.logits is None and plain.scores is None
    assert isinstance(pair.ours.generate(**pair.batch, max_new_tokens=3, output_logits=True), torch.Tensor)
    ours = pair.ours.compute_transition_scores(got.sequences[:, :-1], got.scores[:-1])
    assert ours.shape == (3, num_new - 1)


class Told(list[torch.Tensor]):
    """A streamer that keeps what it is told."""

    def put(self, value: torch.Tensor) -> None:
        self.append(value)

    def end(self) -> None:
        self.append(torch.tensor([-1]))


@pytest.mark.parametrize("stop", [False, True])
def test_streamers_hear_the_same(pair: Pair, stop: bool) -> None:
    row = pair.drawn()[1]
    more = {"stop_strings": ["q", "e", "t"], "tokenizer": pair.tokenizer} if stop else {"eos_token_id": row[6]}
    asked = {"input_ids": pair.batch["input_ids"][1:2], "max_new_tokens": 12, **more}
    theirs, ours = Told(), Told()
    pair.theirs.generate(**asked, streamer=theirs)
    result = pair.ours.generate(**asked, streamer=ours)
    assert [t.tolist() for t in theirs] == [t.tolist() for t in ours]
    assert torch.equal(result, pair.theirs.generate(**asked))
    text = TextIteratorStreamer(pair.tokenizer, skip_prompt=True)
    pair.ours.generate(**asked, streamer=text)
    assert "".join(text) == pair.tokenizer.decode(result[0, asked["input_ids"].shape[1] :])


def test_sampling_is_seeded_by_torch(pair: Pair) -> None:
    def sampled(seed: int, **asked: Any) -> Any:
        torch.manual_seed(seed)
        return pair.ours.generate(**pair.batch, do_sample=True, num_return_sequences=4, max_new_tokens=10, eos_token_id=-1, **asked)

    rows = sampled(1)
    assert rows.shape == (12, pair.batch["input_ids"].shape[1] + 10) and torch.equal(rows, sampled(1)) and not torch.equal(rows, sampled(2))
    assert torch.equal(rows[:, :-10], pair.batch["input_ids"].repeat_interleave(4, dim=0)) and len(set(map(tuple, rows.tolist()))) == 12
    assert torch.equal(sampled(3, top_k=1)[::4], pair.check(**pair.batch, max_new_tokens=10, eos_token_id=-1))
    before = torch.get_rng_state()
    pair.drawn()
    assert torch.equal(before, torch.get_rng_state()), "greedy draws nothing"
    # Every token drawn is one that transformers' processors and warpers leave: top_k=50 if nothing is said, all others as told.
    told = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "suppress_tokens": [8, 9]}
    for more in ({}, {"top_k": 0, "top_p": 0.5}, told):
        output = sampled(4, return_dict_in_generate=True, output_scores=True, **more)
        for i, scores in enumerate(output.scores):
            kept = scores > -torch.inf
            assert kept.gather(1, output.sequences[:, i - 10, None]).all() and (more or kept.sum(1).max() == 50)


def test_sampled_rows_follow_the_distribution(one: Pair) -> None:
    torch.manual_seed(5)
    asked = {"do_sample": True, "num_return_sequences": 1000, "max_new_tokens": 1, "top_k": 6, "temperature": 5.0, "return_dict_in_generate": True}
    output = one.ours.generate(one.batch["input_ids"][1:2], **asked, output_scores=True)
    wanted = output.scores[0][0].softmax(-1)
    got = torch.bincount(output.sequences[:, -1], minlength=VOCAB) / 1000
    assert ((got - wanted).abs() < 5 * (wanted * (1 - wanted) / 1000).sqrt() + 1e-6).all()


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_the_engine_lacks_are_refused(one: Pair, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = one.ours.llm.stats()["num_steps"]
    value: Any = False if name == "use_cache" else 3
    config = GenerationConfig(max_new_tokens=2)  # type: ignore[no-untyped-call]
    setattr(config, name, value)
    with pytest.raises(InvalidRequestError) as keyword:
        one.ours.generate(**one.batch, **{name: value})
    with pytest.raises(InvalidRequestError) as given:
        one.ours.generate(**one.batch, generation_config=config)
    monkeypatch.setattr(one.theirs.generation_config, name, value)
    with pytest.raises(InvalidRequestError) as own:
        one.ours.generate(**one.batch)
    for error in (keyword, given, own):
        assert (error.value.field, error.value.value) == (name, value) and name in str(error.value) and error.value.limit
    assert one.ours.llm.stats()["num_steps"] == steps, "nothing ran"


def test_every_default_of_transformers_is_taken(one: Pair) -> None:
    defaults = {**GenerationConfig._get_default_generation_params(), "max_length": 20}
    details = ("num_assistant_tokens", "assistant_", "target_lookbehind")  # of assistants: their defaults are other than None
    neutral = {name: value for name, value in defaults.items() if not name.startswith(details)} | {"num_return_sequences": 1}
    one.check(**one.batch, **neutral)
    one.check(**one.batch, max_new_tokens=3, **dict.fromkeys(name for name in REFUSED if name not in _NEUTRAL))
    assert set(FIELDS) >= _NO_EFFECT and set(FIELDS) >= _HONOURED - {"input_ids", "attention_mask"}


def test_what_nobody_has_heard_of_is_refused(one: Pair) -> None:
    config = GenerationConfig(max_new_tokens=2, brand_new=2)  # type: ignore[no-untyped-call]
    for asked in ({"brand_new": 2}, {"generation_config": config}):
        with pytest.raises(InvalidRequestError, match="brand_new=2"):
            one.ours.generate(**one.batch, **asked)
    mine = {"self", "inputs", "generation_config", "streamer", "kwargs"}
    others = [name for name in inspect.signature(type(one.theirs).generate).parameters if name not in mine]
    assert "logits_processor" in others
    for name in (*others, "inputs_embeds", "position_ids", "past_key_values", "token_type_ids", "assistant_tokenizer"):
        with pytest.raises(InvalidRequestError, match=f"^{name}="):
            one.ours.generate(**one.batch, **{name: [lambda: None]})


BAD: dict[str, tuple[str, Callable[[Pair], dict[str, Any]]]] = {
    "a list": ("input_ids", lambda p: {"input_ids": [[5, 6]]}),
    "one row": ("input_ids", lambda p: {"input_ids": torch.tensor([5, 6])}),
    "floats": ("input_ids", lambda p: {"inputs": torch.tensor([[5.0]])}),
    "no tokens": ("input_ids", lambda p: {"inputs": torch.zeros(1, 0, dtype=torch.int64)}),
    "a weighted mask": ("attention_mask", lambda p: {**p.batch, "attention_mask": p.batch["attention_mask"] * 2}),
    "a row of pads": ("prompt", lambda p: {"input_ids": torch.tensor([[5, 6], [0, 0]])}),
    "a dict": ("generation_config", lambda p: {**p.batch, "generation_config": {"max_new_tokens": 3}}),
    "no tokenizer": ("tokenizer", lambda p: {**p.batch, "stop_strings": ["x"]}),
    "no pad": ("pad_token_id", lambda p: {**p.batch, "stop_strings": "x", "tokenizer": p.tokenizer, "eos_token_id": None, "pad_token_id": None}),
    "streams": ("streamer", lambda p: {**p.batch, "streamer": TextStreamer(p.tokenizer)}),
    "long biases": ("sequence_bias", lambda p: {**p.batch, "sequence_bias": {(5, 6): 1.0}}),
    "biases and penalty": ("sequence_bias", lambda p: {**p.batch, "sequence_bias": {(5,): 1.0}, "repetition_penalty": 1.2}),
    "long words": ("bad_words_ids", lambda p: {**p.batch, "bad_words_ids": [[5], [6, 7]]}),
    "a bias outside": ("sequence_bias", lambda p: {**p.batch, "sequence_bias": {(10**6,): -math.inf}}),
    "a word outside": ("bad_words_ids", lambda p: {**p.batch, "bad_words_ids": [[5], [10**6]]}),
    "a mask of another shape": ("attention_mask", lambda p: {**p.batch, "attention_mask": torch.ones_like(p.batch["input_ids"])[:, 1:]}),
    "no samples": ("num_return_sequences", lambda p: {**p.batch, "do_sample": True, "num_return_sequences": 0}),
    "too far": ("prompt", lambda p: {**p.batch, "max_new_tokens": 10**6}),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused(one: Pair, name: str) -> None:
    field, asked = BAD[name]
    with pytest.raises(InvalidRequestError) as error:
        one.ours.generate(**asked(one))
    assert error.value.field == field


@pytest.mark.parametrize(
    "asked", [{"max_length": 3}, {"max_new_tokens": 0}, {"do_sample": True, "temperature": 0.0}, {"num_return_sequences": 2}], ids=str
)
def test_what_transformers_refuses_it_refuses_here(one: Pair, asked: dict[str, Any]) -> None:
    for model in (one.theirs, one.ours):
        with pytest.raises(ValueError, match=r"max_length|max_new_tokens|temperature|num_return_sequences"):
            model.generate(**one.batch, **asked)


def test_it_stands_in_for_the_model(one: Pair) -> None:
    folder = one.theirs.name_or_path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8]])
    with Generator(model) as ours:
        assert ours.config is model.config and ours.device == model.device and ours.dtype == torch.float32
        assert ours.eval() is ours and ours.to("cpu") is ours and ours.float() is ours and not model.training
        assert ours.generation_config is model.generation_config
        with pytest.raises(AttributeError, match="no_such"):
            _ = ours.no_such
        assert torch.equal(ours.generate(ids, max_new_tokens=6), model.generate(ids, max_new_tokens=6))
        assert torch.equal(ours(ids).logits, model(ids).logits)
        ours.generation_config = GenerationConfig(max_new_tokens=3)
        assert model.generation_config is ours.generation_config and ours.generate(ids).shape == (1, 7)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.3)
        assert torch.equal(ours.generate(ids, max_new_tokens=6), model.generate(ids, max_new_tokens=6)), "the weights as they are now"
    with Generator(folder, dtype="float32") as ours, LLM(folder, dtype="float32") as llm:
        with Generator(llm) as other:
            assert torch.equal(other.generate(ids, max_new_tokens=6), ours.generate(ids, max_new_tokens=6))
        other.close()
        assert llm.generate([[5, 6]]), "a given engine stays open"
        with pytest.raises(ConfigError, match="page_size"):
            Generator(llm, page_size=4)
