"""Promise 1 with quantised weights: alone, together, in chunks and from cached pages, the same bits."""

from __future__ import annotations

import pytest
import torch

from quire import LLM
from quire.errors import ConfigError, ProbeMismatchError
from quire.tensors.models import probe
from tests.engine.conftest import Checkpoint
from tests.engine.test_codecs import jobs
from tests.engine.test_transparency import bits


@pytest.mark.parametrize(
    ("quantization", "family", "dtype"), [("int8", "gemma3_text", torch.bfloat16), ("int4", "llama", torch.float32), ("int8", "lfm2", torch.bfloat16)]
)
def test_bits_do_not_move(checkpoint: Checkpoint, quantization: str, family: str, dtype: torch.dtype) -> None:
    folder, (prompts, params) = checkpoint(family, dtype), jobs()
    with LLM(folder, quantization=quantization, num_threads=1, prefix_sharing=False) as llm:
        expected = [bits(llm.generate([p], s)[0]) for p, s in zip(prompts, params, strict=True)]
    with LLM(folder) as llm:
        assert expected != [bits(o) for o in llm.generate(prompts, params)], "a quantisation that changes nothing is not in use"
    for budget in (4096, 7):
        with LLM(folder, quantization=quantization, num_threads=2, max_tokens_per_step=budget) as llm:
            for _ in ("cold", "cached"):
                assert [bits(o) for o in llm.generate(prompts, params)] == expected


def test_quantization_is_validated() -> None:
    with pytest.raises(ConfigError, match="quantization='int2': must be one of none, int8, int4"):
        LLM("/nowhere", quantization="int2")


def test_what_codes_round_is_no_mismatch(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held to little more than what our products differ by, the model is served, and refused where torch's may not differ by more."""
    folder, bf16, found = checkpoint("qwen3_5_text", dtype=torch.bfloat16), torch.bfloat16, []
    errors = probe._errors
    monkeypatch.setattr(probe, "_errors", lambda packed, alone: found.append(errors(packed, alone)) or found[-1])
    monkeypatch.setitem(probe.TOLERANCE, bf16, 1e-9)
    with pytest.raises(ProbeMismatchError):
        LLM(folder, quantization="int8")
    held_to = 1.1 * float(found[1].max())
    assert held_to < float(found[0].median()), "else there is a second opinion in fp32"
    monkeypatch.setitem(probe.TOLERANCE, bf16, held_to)
    monkeypatch.setattr(probe, "TOLERANCE_OF_CODES", 0.0)
    with pytest.raises(ProbeMismatchError, match=r"packed with others, logits differ by 0\.\d+ deviations"):
        LLM(folder, quantization="int8")
    monkeypatch.undo()
    monkeypatch.setitem(probe.TOLERANCE, bf16, held_to)
    LLM(folder, quantization="int8").close()
