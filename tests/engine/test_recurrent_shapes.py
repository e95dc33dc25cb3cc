"""Recurrent layers of shapes that are seldom met. The oracle is transformers' own forward of the whole text."""

from __future__ import annotations

import pytest
import torch

from quire import LLM, SamplingParams
from tests.tensors.checkpoints import tiny_model


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_convolution_of_one_token_has_nothing_to_carry(backend: str) -> None:
    model, prompt = tiny_model("granitemoehybrid", mamba_d_conv=1), [3 + i * i * 7 % 590 for i in range(70)]
    with LLM(model, backend=backend, max_tokens_per_step=33) as llm:
        got = llm.generate([prompt], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))[0]
    assert got.error is None
    text = prompt + got.outputs[0].token_ids
    with torch.no_grad():
        logits = model(torch.tensor([text]), use_cache=False).logits[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == text[len(prompt) :]


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2"])
@pytest.mark.parametrize(("dtype", "kernel", "near"), [(torch.bfloat16, torch.float32, 0.05), (torch.float32, torch.bfloat16, 0.005)])
def test_a_convolution_is_computed_in_its_weights_dtype(family: str, dtype: torch.dtype, kernel: torch.dtype, near: float) -> None:
    """Its activation too, as in transformers: rounded in between, or not, logits were a third of a deviation off, or refused."""
    model, prompt = tiny_model(family, dtype), [3 + i * i * 7 % 590 for i in range(40)]
    for module in model.modules():
        if isinstance(module, torch.nn.Conv1d):
            module.to(kernel)
    with LLM(model, max_tokens_per_step=33) as llm:
        got = llm.generate([prompt], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, return_logits=True))[0].outputs[0]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + got.token_ids]), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    assert float((got.logits - logits).abs().max() / logits.std()) < near
