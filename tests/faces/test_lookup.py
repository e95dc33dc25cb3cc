"""`prompt_lookup_num_tokens`, as transformers' `generate` takes it: here for any number of rows, sampled or with penalties too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quire import InvalidRequestError
from quire.faces.hf import Generator
from tests.tensors.checkpoints import VOCAB, make

ROWS = torch.tensor([[3, 4, 5, 6, 5, 6], [9, 8, 7, 6, 5, 7]])
SOME = {"max_new_tokens": 40, "eos_token_id": -1, "pad_token_id": 0, "suppress_tokens": [i for i in range(VOCAB) if i not in (5, 6, 7)]}


@pytest.mark.parametrize("more", [{}, {"do_sample": True, "temperature": 1.5}, {"repetition_penalty": 1.3}], ids=str)
def test_rows_are_those_without_it(tmp_path: Path, more: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(make(tmp_path / "llama", "llama"), dtype=torch.float32).eval()
    with Generator(model, page_size=4, cache_bytes=2**24) as ours:
        rows = []
        for asked in ({}, {"prompt_lookup_num_tokens": 3}, {"prompt_lookup_num_tokens": 20}):
            torch.manual_seed(0)
            before = ours.llm.stats()["num_accepted_tokens"]
            rows.append(ours.generate(ROWS, **SOME, **more, **asked))
            assert (ours.llm.stats()["num_accepted_tokens"] > before) == bool(asked)
        assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])
        for wrong in (2.5, -1, "3"):
            with pytest.raises(InvalidRequestError, match="^prompt_lookup_num_tokens="):
                ours.generate(ROWS, **SOME, **more, prompt_lookup_num_tokens=wrong)
