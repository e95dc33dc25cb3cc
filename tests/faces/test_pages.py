"""The page face: any table, the model's own logits, and what a caller may get wrong with pages."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from quire import InvalidRequestError, PagedCache
from tests.tensors.checkpoints import make, tiny_model

FAMILIES = ["llama", "gemma3_text", "gpt_oss", "gpt2"]


def own(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def prompt(length: int) -> list[int]:
    return [3 + (i * i * 7 + length) % 150 for i in range(length)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_scattered_pages_give_the_models_own_logits(family: str, page_size: int) -> None:
    model, rng = tiny_model(family), random.Random(page_size)
    rows, num_new = [prompt(n) for n in (7, 31, 18)], 3
    pages = list(range(60 if page_size > 1 else 90))
    rng.shuffle(pages)
    cache = PagedCache(model, len(pages), page_size)
    table = torch.full((3, 40), -7)
    for i, row in enumerate(rows):
        for j in range(-(-(len(row) + num_new) // page_size)):
            table[i, j] = pages.pop()
        logits = cache.forward(torch.tensor([row]), page_table=table[i : i + 1], cache_lens=[0])
        torch.testing.assert_close(logits[0], own(model, row), atol=2e-4, rtol=2e-4)
    more = torch.tensor([[4, 5, 6], [7, 8, 9], [10, 11, 12]])
    logits = cache.forward(more, page_table=table, cache_lens=torch.tensor([7, 31, 18]))
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i], own(model, row + more[i].tolist())[-3:], atol=2e-4, rtol=2e-4)
        alone = cache.forward(more[i : i + 1], page_table=table[i : i + 1], cache_lens=[len(row)], logits_to_keep=1)
        assert alone.shape[:2] == (1, 1) and torch.equal(alone[0, 0], logits[i, -1]), "written again, alone, with the same bits"
    cache.close()


def test_shared_pages_and_a_copy_before_writing() -> None:
    model = tiny_model("llama")
    cache, stem = PagedCache(model, 6, 4), prompt(10)
    cache.forward(torch.tensor([stem]), page_table=torch.tensor([[0, 1, 2]]), cache_lens=[0])
    cache.copy_page(2, 5)
    table, tokens = torch.tensor([[0, 1, 2], [0, 1, 5]]), torch.tensor([[20], [30]])
    logits = cache.forward(tokens, page_table=table, cache_lens=[10, 10])
    for i in range(2):
        torch.testing.assert_close(logits[i, 0], own(model, stem + tokens[i].tolist())[-1], atol=2e-4, rtol=2e-4)


def test_a_codec_and_a_chunked_prefill_keep_their_bits() -> None:
    model, row = tiny_model("gemma3_text", torch.bfloat16), prompt(40)
    cache = PagedCache(model, 20, 4, kv_codec="int8")
    whole = cache.forward(torch.tensor([row]), page_table=torch.arange(10)[None], cache_lens=[0])
    parts = [
        cache.forward(torch.tensor([row[i : i + n]]), page_table=torch.arange(10, 20)[None], cache_lens=[i]) for i, n in ((0, 17), (17, 1), (18, 22))
    ]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert cache.page_bytes < PagedCache(model, 1, 4).page_bytes


def test_pages_and_logits_may_be_changed_whatever_mode_they_were_made_in(tmp_path: Path) -> None:
    with torch.inference_mode():
        cache = PagedCache(make(tmp_path, "llama"), 2, 4)
    logits = cache.forward(torch.tensor([prompt(3)]), page_table=torch.tensor([[0]]), cache_lens=[0])
    cache.copy_page(0, 1)
    logits.div_(2)
    assert not logits.is_inference()


def test_the_seeds_worked_example() -> None:
    """10, 1025 and 320 tokens with room for 500 more in pages of 256; prefilled one by one, decoded together."""
    model = tiny_model("llama", max_position_embeddings=2048)
    cache = PagedCache(model, 13, 256)
    table = torch.tensor([[0, 1, 0, 0, 0, 0], [2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 0]])
    rows = [prompt(n) for n in (10, 1025, 320)]
    last = [
        int(cache.forward(torch.tensor([row]), page_table=table[i : i + 1], cache_lens=[0], logits_to_keep=1)[0, 0].argmax())
        for i, row in enumerate(rows)
    ]
    lens = torch.tensor([10, 1025, 320])
    for step in range(3):
        tokens = torch.tensor(last)[:, None]
        logits = cache.forward(tokens, page_table=table, cache_lens=lens + step)
        for i, row in enumerate(rows):
            row.append(last[i])
            torch.testing.assert_close(logits[i, 0], own(model, row)[-1], atol=5e-4, rtol=5e-4)
        last = logits[:, 0].argmax(dim=-1).tolist()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"input_ids": torch.tensor([5, 6])}, "input_ids"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, "input_ids"),
        ({"input_ids": torch.tensor([[5.0], [6.0]])}, "integers"),
        ({"input_ids": torch.tensor([[5], [10**6]])}, "input_ids=1000000: must be ids from 0"),
        ({"page_table": torch.tensor([[0, 1]])}, "a row for each"),
        ({"page_table": torch.tensor([[0], [2]])}, "row 0: .*2 pages from 0 to 9 for 5 tokens"),
        ({"page_table": torch.tensor([[0, 10], [2, 3]])}, "row 0"),
        ({"page_table": torch.tensor([[0, -1], [2, 3]])}, "row 0"),
        ({"page_table": torch.tensor([[0, 3], [2, 3]])}, "row 1: .*nothing else"),
        ({"input_ids": torch.ones(2, 5, dtype=torch.long), "page_table": torch.tensor([[0, 1, 1], [2, 3, 4]])}, "row 0: .*once"),
        ({"page_table": torch.tensor([[0, 0], [2, 3]])}, r"row 0: \[0, 0\].*\[0\] are written"),
        ({"page_table": torch.tensor([[3, 1], [2, 3]])}, r"row 0: \[3, 1\].*\[3\] are written"),
        ({"cache_lens": [4]}, "cache_lens"),
        ({"cache_lens": [4, -1]}, "cache_lens"),
        ({"cache_lens": [4, 10**6]}, "context"),
        ({"cache_lens": [4, 2**70]}, "cache_lens=.*64 bits"),
        ({"input_ids": torch.tensor([[5], [10**4]], dtype=torch.uint16)}, "ids from 0"),
        ({"logits_to_keep": 2}, "logits_to_keep"),
        ({"input_ids": [[5], [6]]}, "input_ids=.*tensor of integers"),
        ({"input_ids": torch.tensor([[True], [True]])}, "input_ids=.*tensor of integers"),
        ({"page_table": torch.tensor([[0.5, 1.5], [2.5, 3.5]])}, "page_table=.*tensor of integers"),
        ({"cache_lens": [4.5, 4.5]}, "cache_lens=4.5"),
        ({"cache_lens": torch.tensor([4.0, 4.0])}, "cache_lens"),
        ({"logits_to_keep": True}, "logits_to_keep=True"),
    ],
)
def test_a_wrong_table_is_refused_before_anything_is_written(changes: dict[str, Any], match: str) -> None:
    cache = PagedCache(tiny_model("llama"), 10, 4)
    cache._store.pages.zero_()
    call = {"input_ids": torch.tensor([[5], [6]]), "page_table": torch.tensor([[0, 1], [2, 3]]), "cache_lens": [4, 4], **changes}
    with pytest.raises(InvalidRequestError, match=match):
        cache.forward(call.pop("input_ids"), **call)
    assert not cache._store.pages.any()
    for target in (10, 0.5, "0"):
        with pytest.raises(InvalidRequestError, match="target="):
            cache.copy_page(0, target)  # type: ignore[arg-type]
