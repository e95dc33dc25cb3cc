"""A replayed forward as one native call (native_forward.py): which models' is, and that it gives the bits of the calls that it stands for."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

pytest.importorskip("quire.tensors.native")

from quire import LLM, SamplingParams
from quire.tensors.attention.base import StepInputs, TableInputs
from quire.tensors.models import native_forward as module
from quire.tensors.models.native_forward import NativeForward, is_of_position
from quire.tensors.native import lib
from quire.tensors.store import StagedStep
from tests.engine.conftest import Checkpoint
from tests.engine.test_chains import bits
from tests.engine.test_replay import REPLAYED, own, replay_of
from tests.tensors.checkpoints import FAMILIES, tiny_model

# Of those that are replayed, others have norms of which rows of operators do not have torch's bits.
NATIVE = {"llama", "qwen2", "qwen3", "mistral", "phi3", "olmo2", "gemma", "gemma3_text", "smollm3"}
# Embeddings that are scaled, and layers that take other tables than the ones before, or none.
OTHERS = [("gemma3_text", "none"), ("gemma3_text", "int8"), ("smollm3", "none")]

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_which_models_forwards_are_replayed_and_which_of_those_are_one_call(checkpoint: Checkpoint, family: str, dtype: torch.dtype) -> None:
    """All give what the model's own forward gives, at first and when it is known."""
    with LLM(checkpoint(family, dtype)) as llm:
        to_watch = replay_of(llm)._to_watch
        first = bits(own(llm))
        assert not replay_of(llm).calls
        replay_of(llm)._to_watch = to_watch
        llm.reset_cache()
        assert bits(llm) == first and bits(llm) == first
        assert bool(replay_of(llm).calls) == (family in REPLAYED)
        assert (replay_of(llm).native is not None) == (family in NATIVE)


def fresh_step(llm: LLM, num_tokens: int) -> StagedStep:
    """A step of one sequence with nothing in the cache: all but its first token see others, wherever they are said to be."""
    starts, none = torch.tensor([0, num_tokens], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    runner = llm._built.engine.runner
    groups = len(runner.groups)
    inputs = StepInputs(starts, none[1:].clone(), (TableInputs(torch.empty(0, dtype=torch.int32), none),) * groups)
    return StagedStep(runner.store, inputs, [torch.full((num_tokens,), -1)] * groups)


def logits_of(llm: LLM, ids: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return llm._built.model.forward(fresh_step(llm, len(ids)), ids, positions, wanted)


def native_of(llm: LLM) -> NativeForward:
    native = replay_of(llm).native
    assert native is not None
    return native


def by_calls(llm: LLM) -> LLM:
    """The same engine, whose forward is the calls of its modules."""
    native_of(llm)
    replay_of(llm).native = None
    return llm


# Tied where a head is plain, of eight bits or of four, and where what the embeddings give is scaled.
PLACED = [("qwen3", "none"), ("qwen3", "int8"), ("qwen2", "int4"), ("phi3", "none"), *OTHERS]
TIED = [("qwen3", "none"), ("qwen3", "int8"), ("qwen2", "int4"), OTHERS[0]]


@pytest.mark.parametrize(("family", "quantization", "tied"), [*((*one, False) for one in PLACED), *((*one, True) for one in TIED)])
def test_tokens_anywhere_and_rows_of_them_give_the_bits_of_the_calls(checkpoint: Checkpoint, family: str, quantization: str, tied: bool) -> None:
    """Of few tokens, whose rows of tables are kept, and of more; positions that follow one another, repeat, and push each other out."""
    folder, rng = checkpoint(family, torch.bfloat16, tie_word_embeddings=tied), random.Random(family)
    with LLM(folder, quantization=quantization) as llm:
        bits(llm)
        native = native_of(llm)
        for num_tokens in (1, 1, 2, 3, 17, 63, 64, 65, 1, 64, 130, 2, 64, 5):
            reach = rng.choice((70, 2_000, 500_000))
            positions = torch.tensor([rng.randrange(reach) for _ in range(num_tokens)])
            ids = torch.tensor([rng.randrange(3, 500) for _ in range(num_tokens)])
            wanted = torch.tensor(rng.choices(range(num_tokens), k=rng.randrange(num_tokens + 1)), dtype=torch.long)
            got = logits_of(llm, ids, positions, wanted)
            expected = logits_of(by_calls(llm), ids, positions, wanted)
            replay_of(llm).native = native
            assert got.shape == expected.shape and got.shape[0] == len(wanted)
            assert got.dtype == expected.dtype and torch.equal(got.view(torch.int16), expected.view(torch.int16)), (num_tokens, reach)


def test_rope_runs_once_for_a_block_of_positions(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    tables = NativeForward._tables
    monkeypatch.setattr(NativeForward, "_tables", lambda self, positions: computed.append(positions.tolist()) or tables(self, positions))
    size, count = lib.table_positions, lib.table_blocks
    with LLM(checkpoint("llama", torch.bfloat16)) as llm:
        bits(llm)
        computed.clear()

        def run(*positions: int) -> list[int]:
            computed.clear()
            at = torch.tensor(positions)
            logits_of(llm, torch.full_like(at, 7), at, at[:0])
            return [block[0] // size for block in computed]

        far = 1000
        assert run(*(size * (far + i) for i in range(count))) == [far + i for i in range(count)]
        assert run(*(size * (far + i) + i for i in range(count))) == []
        assert [run(size * (far + i % count)) for i in range(1, count + 1)] == [[]] * count
        assert run(5) == [0] and run(size * far) == [] and run(size * (far + 1)) == [far + 1], "the one that was used least recently has gone"
        assert run(*range(count + 1)) == [0] and len(computed[0]) == count + 1, "too many to be kept are computed as they are"


def test_what_is_out_of_range_is_refused_and_harms_nothing(checkpoint: Checkpoint) -> None:
    with LLM(checkpoint("llama", torch.bfloat16)) as llm:
        first, vocab_size = bits(llm), llm._built.model.vocab_size
        native_of(llm)
        zero, one = torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.long)
        for ids, wanted in ((zero + vocab_size, zero), (zero - 1, zero), (zero, one), (zero, -one)):
            with pytest.raises(IndexError, match="out of range"):
                logits_of(llm, ids, zero, wanted)
        assert bits(llm) == first
        llm.check_integrity()


def test_only_what_hangs_on_a_position_is_kept() -> None:
    rope: Any = tiny_model("llama").model.rotary_emb  # type: ignore[attr-defined]
    assert is_of_position(rope)
    for kind in ("dynamic", "longrope", "unheard of", None, {"full_attention": "default", "sliding_attention": "dynamic"}):
        rope.rope_type = kind
        assert not is_of_position(rope)
    rope.rope_type = {"full_attention": "default", "sliding_attention": "linear"}
    assert is_of_position(rope) and not is_of_position(nn.Embedding(4, 4)) and not is_of_position(None)
    rope.__class__ = type("Mine", (type(rope),), {})
    assert not is_of_position(rope)


class Twice(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) + super().forward(ids)


class Shifted(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids + 1)


class Other(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return functional.embedding(ids, self.weight * 2)


class Constant(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.ones(*ids.shape, self.embedding_dim)


@pytest.mark.parametrize("kind", [Twice, Shifted, Other, Constant])
def test_an_embedding_that_does_more_than_to_change_rows_of_its_own_is_none_of_rows(kind: type[nn.Embedding]) -> None:
    hidden = torch.empty(1, 1, 16)
    with torch.inference_mode(), pytest.raises(module.UnlowerableError):
        module._part(module._Behind(kind(8, 16)), hidden)


def not_lowered(*_: object, **__: object) -> Any:
    raise module.UnlowerableError("not this one")


def one_off(native: NativeForward) -> NativeForward:
    native._hidden = native._hidden.float()
    call = NativeForward.__call__
    return lambda *args: call(native, *args) + 1  # type: ignore[return-value]


@pytest.mark.parametrize("fault", ["unlowerable", "unfitting", "other bits"])
def test_a_forward_that_cannot_be_one_call_is_its_calls(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    made: Callable[..., Any] = module.native_forward
    if fault == "unlowerable":
        monkeypatch.setattr(module, "lower", not_lowered)
    elif fault == "unfitting":
        tables = module.tables_of
        monkeypatch.setattr(module, "tables_of", lambda *args: [torch.cat([x, x], -1) for x in tables(*args)])
    else:
        monkeypatch.setattr("quire.tensors.models.replay.native_forward", lambda *args: one_off(made(*args)))
    with LLM(checkpoint("llama", torch.bfloat16)) as llm, LLM(checkpoint("llama", torch.bfloat16)) as plain:
        assert bits(llm) == bits(own(plain))
        assert replay_of(llm).native is None and replay_of(llm).calls


def test_where_the_model_s_own_code_is_asked_for_there_are_no_programs(checkpoint: Checkpoint) -> None:
    folder, prompts = checkpoint("llama"), [list(range(5, 5 + count)) for count in (3, 21)]
    with LLM(folder, enforce_eager=True, max_tokens_per_step=8) as llm:
        assert llm.info.layers == "plain" and llm._built.model.lowered is None
        alone = [llm.generate(prompt, GREEDY, namespace="alone")[0].outputs for prompt in prompts]
        assert [output.outputs for output in llm.generate(prompts, GREEDY)] == alone
    with LLM(folder) as llm:
        assert [llm.generate(prompt, GREEDY)[0].outputs[0].token_ids for prompt in prompts] == [one.token_ids for (one,) in alone]
