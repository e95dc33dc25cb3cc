"""What holds on any device, asked of one that there is not (tests/tensors/fake_device.py). Run by test_devices.py, in a process apart."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from quire import LLM, ConfigError, InvalidRequestError, ProbeMismatchError, RequestOutput, SamplingParams, StepError, UnsupportedModelError
from quire.tensors.device import Accelerator, Graphs, device_of
from quire.tensors.triton_cut import Cut
from tests.engine.conftest import Checkpoint
from tests.tensors.checkpoints import tiny_model
from tests.tensors.fake_device import FAKE, install, on_host
from tests.tensors.fake_graph import Graph

install()

PARAMS = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=0)
PROMPTS = [list(range(5, 5 + count)) for count in (3, 13, 7)]


@pytest.fixture(scope="module")
def served(checkpoint: Checkpoint) -> Iterator[LLM]:
    """Nothing is cached when a test begins."""
    with LLM(checkpoint("llama", num_hidden_layers=2), device="fake", page_size=4, max_tokens_per_step=8, cache_bytes=2**18) as llm:
        yield llm


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    FAKE.waits.clear()
    FAKE.uploads, Graph.num_replays, FAKE.failing = 0, 0, lambda operator: False
    yield
    FAKE.failing = lambda operator: False


@pytest.mark.parametrize(("prompts", "num_steps", "num_draws"), [(PROMPTS[:1], 4, 4), (PROMPTS[1:2], 5, 4), (PROMPTS, 6, 6)])
def test_a_step_waits_once_and_only_for_what_it_draws(served: LLM, prompts: list[list[int]], num_steps: int, num_draws: int) -> None:
    served.reset_cache()
    FAKE.waits.clear()
    before = served.stats()["num_steps"]
    served.generate(prompts, PARAMS)
    assert served.stats()["num_steps"] == before + num_steps
    assert FAKE.waits == ["synchronize"] * num_draws and FAKE.uploads == 0
    assert Graph.num_replays == 2 * num_steps, "a graph that computes and one that commits"


def test_what_else_a_step_gives_comes_in_the_same_wait(served: LLM) -> None:
    before = served.stats()["num_steps"]
    served.generate(PROMPTS[0], SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=1, pooling="mean", n=3))
    assert FAKE.waits == ["synchronize"] * (served.stats()["num_steps"] - before) and FAKE.uploads == 0


def test_scores_states_and_forks_as_on_the_cpu(checkpoint: Checkpoint) -> None:
    params = SamplingParams(max_tokens=4, temperature=0.9, seed=3, n=3, prompt_logprobs=0, pooling="mean", ignore_eos=True, logprobs=2)
    found = []
    for options in ({"device": "fake", "cache_bytes": 2**20, "enforce_eager": True}, {"backend": "reference"}):
        with LLM(checkpoint("qwen3", num_hidden_layers=1), page_size=4, **options) as llm:  # type: ignore[arg-type]
            found.append(llm.generate(PROMPTS[2], params)[0])
            llm.check_integrity()
    ours, theirs = found
    assert [one.token_ids for one in ours.outputs] == [one.token_ids for one in theirs.outputs]
    assert len({tuple(one.token_ids) for one in ours.outputs}) > 1
    assert ours.embedding is not None and ours.embedding.is_cpu
    torch.testing.assert_close(ours.embedding, theirs.embedding, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kernel", "at"), [("_attend", 2), ("_multiply", 5), ("index_select", 1), ("_copy_from", 1)])
def test_a_step_that_fails_writes_nothing(served: LLM, kernel: str, at: int) -> None:
    served.reset_cache()
    good = served.generate(PROMPTS[0], PARAMS)[0].outputs
    served.reset_cache()
    pages = on_host(served._built.engine.runner.store.pages)
    before, num_seen = pages.clone(), 0

    def failing(operator: str) -> bool:
        nonlocal num_seen
        num_seen += operator == kernel
        return operator == kernel and num_seen == at

    FAKE.failing = failing
    assert isinstance(served.generate(PROMPTS[0], PARAMS)[0].error, StepError)
    assert torch.equal(pages, before)
    served.check_integrity()
    assert served.generate(PROMPTS[0], PARAMS)[0].outputs == good


def test_captured_steps_have_the_bits_of_those_that_are_not(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """With drafts, forks, penalties, pages that fill up; to the end of the context, where tables are as long as they come; keys in parts."""
    penal = SamplingParams(max_tokens=9, temperature=0.0, repetition_penalty=1.1, logprobs=1, ignore_eos=True)
    params = [penal, SamplingParams(max_tokens=4, temperature=0.9, seed=3, n=3, logprobs=0, ignore_eos=True), PARAMS]
    prompts = [[7, 8, 9, 7, 8, 9, 7], *PROMPTS[:2]]
    found: list[list[RequestOutput]] = []
    means: list[torch.Tensor | None] = []
    for eager in (True, False):
        monkeypatch.setattr("quire.engine.kernels.Cut", lambda least, eager=eager: Cut(1 if eager else 1000))
        options = {"page_size": 2, "max_tokens_per_step": 6, "max_model_len": 17, "cache_bytes": 2**18, "enforce_eager": eager}
        with LLM(checkpoint("llama", num_hidden_layers=1), device="fake", **options) as llm:  # type: ignore[arg-type]
            assert llm.info.layers == ("plain" if eager else "plain, steps of up to 6 tokens captured")
            Graph.num_replays = 0
            found.append(llm.generate(prompts, params))
            assert Graph.num_replays == (0 if eager else 2 * llm.stats()["num_steps"])
            means.append(llm.generate(PROMPTS[2], SamplingParams(max_tokens=1, pooling="mean"))[0].embedding)
            llm.check_integrity()
        params[0] = replace(penal, prediction=found[0][0].outputs[0].token_ids)
    assert [output.outputs for output in found[0]] == [output.outputs for output in found[1]]
    assert means[0] is not None and means[1] is not None and torch.equal(means[0], means[1])
    assert found[1][0].receipt.accepted_tokens and found[1][2].outputs[0].finish_reason == "length"


def test_a_graph_that_computes_something_else_is_not_taken(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Graphs.capture
    monkeypatch.setattr(Graphs, "capture", lambda graphs, run: (own(graphs, run)[0], lambda: None))
    with LLM(checkpoint("llama", num_hidden_layers=1), device="fake", max_tokens_per_step=1, cache_bytes=2**18) as llm:
        assert llm.info.layers == "plain, no step captured (RuntimeError: a captured step of 1 tokens gave other bits than it gives itself)"
        assert not llm.generate(PROMPTS[0], PARAMS)[0].error


def test_a_live_model_is_served_where_it_is() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    with LLM(model, backend="reference") as llm:
        expected = llm.generate(PROMPTS[0], PARAMS)[0].outputs[0]
    with pytest.raises(UnsupportedModelError, match=r"embed_tokens.weight is on device cpu; this engine's is fake:0"):
        LLM(model, device="fake")
    model = model.to("fake")
    with pytest.raises(UnsupportedModelError, match=r"embed_tokens.weight is on device fake:0; this engine's is cpu"):
        LLM(model)
    with LLM(model, device="fake:0", cache_bytes=2**20) as llm:
        assert llm.info.layers == "plain", "a captured step would read the weights where they lay"
        own = llm.generate(PROMPTS[0], PARAMS)[0].outputs[0]
        assert own.token_ids == expected.token_ids and own.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        with torch.no_grad():
            model.lm_head.weight.mul_(-1)
        assert llm.generate(PROMPTS[0], PARAMS)[0].outputs[0].token_ids != own.token_ids


def test_sums_of_torch_are_found_at_load_and_by_the_probe(monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to("fake")
    assert not torch.equal(on_host(x.mean(-1)), on_host(torch.cat([row.mean(-1) for row in x.split(1)]))), "as on a device"
    own = LlamaRMSNorm.forward
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda norm, x: own(norm, x) + 0 * x.cumsum(-1))
    with pytest.raises(UnsupportedModelError, match=r"multiplied or added up by operators of torch .*LlamaRMSNorm calls cumsum"):
        LLM(checkpoint("llama", num_hidden_layers=1), device="fake")
    monkeypatch.undo()
    monkeypatch.setattr("quire.tensors.models.exact.row_handlers", lambda rows: {})
    with pytest.raises(UnsupportedModelError, match=r"LlamaRMSNorm calls mean"):
        LLM(checkpoint("llama", num_hidden_layers=1), device="fake")
    monkeypatch.setattr("quire.tensors.models.strays._SUMS", frozenset())
    with pytest.raises(UnsupportedModelError, match="depend on what else is in the batch"):
        LLM(checkpoint("llama", num_hidden_layers=1), device="fake")


def test_what_does_not_go_with_a_device_is_refused_by_name(served: LLM, checkpoint: Checkpoint) -> None:
    folder = checkpoint("llama", num_hidden_layers=1)
    for options, told in (
        ({"device": "cuda"}, "device='cuda': torch .* finds no such device"),
        ({"device": "fake:1"}, "device='fake:1': must be below fake:1"),
        ({"device": "mps"}, "device='mps': must be one of cpu, cuda"),
        ({"device": "fake", "cache_bytes": 2**40}, r"cache_bytes=\d+: must be less, fake:0 has \d+ bytes to spare"),
    ):
        with pytest.raises(ConfigError, match=told):
            LLM(folder, **options)
    with pytest.raises(InvalidRequestError, match="fake:0 takes no memory back"):
        served.resize_cache(2**17)


def test_no_room_for_the_weights_is_told(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.tensors.fake_device.MEMORY", 2**15)
    for quantization in ("none", "int8"):
        with pytest.raises(ConfigError, match="device='fake:0': it has no room for the weights of"):
            LLM(checkpoint("llama", num_hidden_layers=1), device="fake", quantization=quantization)


def test_numbers_of_a_step_go_in_memory_of_their_own() -> None:
    """Were it written again for the next step, a copy still under way would take what is written then."""
    device = device_of("fake")
    assert isinstance(device, Accelerator)
    feed, arrays = device.feed(), [array("q", [1, 2, 3]), array("i"), array("i", [4]), array("q", [5])]
    first = feed.tensors(arrays)
    arrays[0][1] = 9
    second = feed.tensors(arrays)
    assert [on_host(x).tolist() for x in first] == [[1, 2, 3], [], [4], [5]] and [on_host(x).tolist() for x in second] == [[1, 9, 3], [], [4], [5]]
    assert [x.dtype for x in first] == [torch.int64, torch.int32, torch.int32, torch.int64]
    assert all(on_host(x).data_ptr() % 16 == on_host(first[0]).data_ptr() % 16 for x in first if len(x)), "one kernel reads them all"
    (ids,) = device.to_host(second[0])
    assert ids.tolist() == [1, 9, 3] and FAKE.waits == ["synchronize"] and FAKE.uploads == 0
    device.to_host(torch.empty(0, 3, device="fake"))
    assert len(FAKE.waits) == 1, "nothing to wait for"


def test_the_device_is_strict() -> None:
    """What the tests above stand on."""
    here, there = torch.ones(3), torch.ones(3).to("fake")
    for mixed in (lambda: here + there, lambda: torch.cat([here, there]), lambda: there[torch.tensor([0, 1])]):
        with pytest.raises(RuntimeError, match="on the CPU|on the same device"):
            mixed()
    with pytest.raises(RuntimeError, match="address"):
        there.data_ptr()
    with pytest.raises(TypeError):
        there.numpy()
    copy = there.to("cpu", non_blocking=True)
    assert copy.tolist() != [1.0] * 3, "nobody has waited yet"
    FAKE.wait("")
    assert copy.tolist() == [1.0] * 3
    FAKE.waits.clear()
    assert there.sum().item() == 3.0 and there.tolist() == [1.0] * 3 and bool((there == 1).all()) and len(there.nonzero()) == 3
    assert len(FAKE.waits) == 4
    pinned = here.pin_memory()
    pinned.to("fake", non_blocking=True)
    pinned += 1
    with pytest.raises(RuntimeError, match="while it was being copied"):
        FAKE.wait("")


def test_attention_that_is_wrong_on_a_device_is_found_at_load(monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> None:
    from quire.tensors.attention.triton import TritonAttention

    own = TritonAttention.attend
    monkeypatch.setattr(TritonAttention, "attend", lambda self, q, *rest: own(self, q * 1.1, *rest))
    with pytest.raises(ProbeMismatchError):
        LLM(checkpoint("llama", num_hidden_layers=1), device="fake")


def test_parts_that_are_folded_otherwise_on_a_device_are_found_at_load(monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> None:
    from quire.tensors.attention.triton import TritonAttention

    def attend(self: TritonAttention, q: torch.Tensor, *rest: Any) -> torch.Tensor:
        out = own(self, q, *rest)
        return out * (1 + 2**-22) if self._cut.least_programs > 1 else out

    own = TritonAttention.attend
    monkeypatch.setattr(TritonAttention, "attend", attend)
    with pytest.raises(UnsupportedModelError, match="depend on what else"):
        LLM(checkpoint("llama", num_hidden_layers=1), device="fake")
