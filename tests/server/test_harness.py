"""lm-eval's `local-completions` scores through this server what transformers scores itself: the harness if it is installed, its requests if not."""

from __future__ import annotations

import json
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.server.conftest import KEY, Running

QUESTIONS = [
    {"question": "the quick brown fox jumps over", "choices": [" the lazy dog", " a lazy dog", " five boxes"], "answer": 0},
    {"question": "pack my box with five dozen", "choices": [" jugs", " liquor jugs", " liquor", " the quick brown fox"], "answer": 1},
    {"question": "x", "choices": ["yz", " "], "answer": 1},
]
TEXTS = ["the quick brown fox jumps over the lazy dog " * 6, "pack my box", "jugs \u00e9\U0001f98a jugs"]
CLOSE = 1e-4  # of a sum over at most some hundred tokens, in fp32
WINDOW = 40  # tokens of context that the harness is told there are, so that texts come in several windows


@pytest.fixture(scope="module")
def reference(model: str) -> PreTrainedModel:
    """The checkpoint as transformers runs it."""
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return loaded.eval()


@pytest.fixture(scope="module")
def hf(model: str) -> Any:
    """The checkpoint's tokenizer."""
    return AutoTokenizer.from_pretrained(model)


def scored(reference: PreTrainedModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The logprob of the continuation, and whether it is what greedy decoding gives."""
    with torch.no_grad():
        logits = reference(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
    logprobs = torch.log_softmax(logits.double(), -1)
    wanted = torch.tensor(continuation)
    return float(logprobs[torch.arange(len(wanted)), wanted].sum()), bool((logprobs.argmax(-1) == wanted).all())


def pairs(hf: Any) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) of every choice, and of every text after the prefix token, as the harness makes them."""
    made = []
    for asked in QUESTIONS:
        context = hf(asked["question"], add_special_tokens=False).input_ids
        for choice in asked["choices"]:
            made.append((context, hf(asked["question"] + choice, add_special_tokens=False).input_ids[len(context) :]))
    return made + [([hf.bos_token_id], hf(text, add_special_tokens=False).input_ids) for text in TEXTS]


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_requests_of_the_harness(server: Running, reference: PreTrainedModel, hf: Any, batch: int) -> None:
    """Sent and read as `LocalCompletionsAPI` of lm-eval 0.4.13 does (`_create_payload`, `parse_logprobs`)."""
    context = hf(TEXTS[0]).input_ids[:9]
    greedy = reference.generate(torch.tensor([context]), max_new_tokens=4, do_sample=False, pad_token_id=0)[0, 9:].tolist()
    todo, found = [*pairs(hf), (context, greedy)], list[tuple[float, bool]]()
    for at in range(0, len(todo), batch):
        part = todo[at : at + batch]
        payload = {
            "model": "tiny",
            "prompt": [context + continuation for context, continuation in part],
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        }
        choices = sorted(server.complete(**payload)["choices"], key=itemgetter("index"))
        assert len(choices) == len(part)
        for choice, (context, _) in zip(choices, part, strict=True):
            logprobs = choice["logprobs"]["token_logprobs"][len(context) : -1]
            top = choice["logprobs"]["top_logprobs"][len(context) : -1]
            found.append((sum(logprobs), all(logprob == max(named.values()) for logprob, named in zip(logprobs, top, strict=True))))
    wanted = [scored(reference, *pair) for pair in todo]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=CLOSE)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted] and found[-1][1]


def tasks(folder: Path) -> list[Any]:
    """Two made-up tasks over local files: questions with choices, and texts to be scored whole."""
    from lm_eval.api.task import ConfigurableTask

    made = []
    for name, rows, more in (
        (
            "questions",
            QUESTIONS,
            {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "target_delimiter": ""},
        ),
        ("texts", [{"text": text} for text in TEXTS], {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}),
    ):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        metrics = [{"metric": metric} for metric in (("acc",) if name == "questions" else ("bits_per_byte", "word_perplexity"))]
        config = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
        config |= {"doc_to_target": "{{answer}}", "metric_list": metrics, **more}
        made.append(ConfigurableTask(config=config))
    return made


@pytest.mark.parametrize("more", [{"batch_size": 4}, {"num_concurrent": 4, "tokenizer_backend": "remote"}], ids=str)
def test_the_harness_itself(
    server: Running, reference: PreTrainedModel, hf: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'lm-eval[api]')")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    asked = {"model": "tiny", "base_url": server.url + "/v1/completions", "auth_token": KEY, "max_length": WINDOW + 1, **more}
    asked |= {} if "tokenizer_backend" in more else {"tokenizer": model}
    found = simple_evaluate(model="local-completions", model_args=asked, tasks=tasks(tmp_path), bootstrap_iters=0, log_samples=True)
    questions, texts = (sorted(found["samples"][name], key=itemgetter("doc_id")) for name in ("questions", "texts"))

    told = [value for sample in questions for ((value, _),) in sample["resps"]]
    assert told == pytest.approx([scored(reference, *pair)[0] for pair in pairs(hf)[: len(told)]], abs=CLOSE)
    for sample, text in zip(texts, TEXTS, strict=True):
        windows = get_rolling_token_windows(hf(text, add_special_tokens=False).input_ids, hf.bos_token_id, WINDOW - 1, 1)
        parts = [scored(reference, *make_disjoint_window(window)) for window in windows]
        assert sample["resps"] == [[pytest.approx(sum(value for value, _ in parts), abs=CLOSE)]]
    assert len(parts) == 1 < len(list(get_rolling_token_windows(hf(TEXTS[0]).input_ids, hf.bos_token_id, WINDOW - 1, 1)))
    assert set(found["results"]) == {"questions", "texts"} and found["results"]["texts"]["word_perplexity,none"] > 1
