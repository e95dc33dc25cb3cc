"""`quire check`, `quire bench` and `quire demo`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from quire.cli import door
from quire.cli.demo import PROMPTS
from tests.cli.conftest import Quire
from tests.tensors.checkpoints import make

DEMO = Path(door.__file__).parent.parent / "demo_model"


def test_check_says_what_fits(quire: Quire, model: str) -> None:
    table = quire("check", model, "--cache-bytes", "4MiB")
    assert table.exit_code == 0, table.stderr
    for text in ("yes, the probe passed", "llama", "float32", "full: layers [0, 1, 2], 16 tokens a page", "2,048 tokens", "4.0 MiB"):
        assert text in table.stdout
    found = json.loads(quire("check", model, "--cache-bytes", "4MiB", "--json").stdout)
    assert found["supported"] and found["has_tokenizer"] and found["context_len"] == 2048
    assert found["bytes_per_token"] == 3 * 2 * 2 * 16 * 4  # layers, keys and values, heads, width, float32
    assert found["full_contexts"] == 4 * 2**20 // (found["bytes_per_token"] * 2048) == 2
    assert found["max_cached_tokens"] == 4 * 2**20 // (768 * 16) * 16


def test_check_counts_every_group(quire: Quire, tmp_path: Path) -> None:
    found = json.loads(quire("check", make(tmp_path / "gemma", "gemma3_text"), "--json").stdout)
    assert len(found["groups"]) > 1 and not found["has_tokenizer"]
    assert found["full_contexts"] == found["num_pages"] // found["pages_per_full_context"] >= 1


def test_check_refuses_with_the_reason(quire: Quire, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}))
    table = quire("check", str(tmp_path))
    assert table.exit_code == 1 and "no" in table.stdout and "t5" in table.stdout
    said = json.loads(quire("check", str(tmp_path), "--json").stdout)
    assert not said["supported"] and "t5" in said["reason"] and said["error"] == "UnsupportedModelError"


def test_check_of_nothing_is_a_bad_request(quire: Quire) -> None:
    result = quire("check", "./nowhere")
    assert (result.exit_code, result.stdout) == (2, "") and "./nowhere" in result.stderr


def test_bench(quire: Quire, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = quire("bench", "--model", model, "--max-model-len", "128")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["one_stream"]["requests"] == 1 and told["16_ragged"]["requests"] == 16
    assert all(told[name]["new_tokens_per_s"] > 0 and told[name]["first_token_s"] > 0 for name in ("one_stream", "16_ragged"))
    assert "…" not in result.stdout  # the table fits
    assert "bench/" in result.stdout and "16 ragged" in result.stdout
    # and alone with --json; with the smallest of contexts
    json.loads(quire("bench", "--model", model, "--json", "--max-model-len", "16").stdout)


def demo_model(model: str) -> list[str]:
    return [] if (DEMO / "config.json").is_file() else ["--model", model]


def test_demo_streams_and_shows_receipts(quire: Quire, model: str) -> None:
    result = quire("demo", *demo_model(model), "--max-tokens", "12")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    last = {label: max(i for i, line in enumerate(lines) if line.strip().startswith(f"{label} │")) for label in PROMPTS}
    first = {label: min(i for i, line in enumerate(lines) if line.strip().startswith(f"{label} │")) for label in PROMPTS}
    assert max(first.values()) < max(last.values())
    rows = {label: re.search(rf"^ {label} +(\d+) +(\d+) +(\d+) +(\d+) ", result.stdout, re.MULTILINE) for label in PROMPTS}
    counts = {label: [int(n) for n in row.groups()] for label, row in rows.items() if row is not None}
    assert set(counts) == set(PROMPTS)
    assert counts["scene 2"][1] >= 32  # the scene of the first was in the cache
    assert sum(new for *_, new in counts.values()) == 60
    assert f"{len(PROMPTS)} requests, 60 new tokens" in lines[-1]


def test_demo_shrinks_to_a_small_context(quire: Quire, model: str) -> None:
    result = quire("demo", *demo_model(model), "--max-model-len", "64")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"^ scene 2 +\d+ +\d+ +\d+ +3\d ", result.stdout, re.MULTILINE), result.stdout
    given = quire("demo", *demo_model(model), "--max-model-len", "64", "--max-tokens", "96")
    assert given.exit_code == 2 and "at most 64 tokens together" in " ".join(given.stderr.split())


def test_demo_gives_the_same_texts_twice(quire: Quire, model: str) -> None:
    def texts() -> dict[str, str]:
        result = quire("demo", *demo_model(model), "--max-tokens", "4", "--num-threads", "1")
        assert result.exit_code == 0, result.stderr
        lines = result.stdout.splitlines()
        return {label: "".join(line for line in lines if line.strip().startswith(f"{label} │")) for label in PROMPTS}

    assert texts() == texts()


@pytest.mark.skipif(not (DEMO / "config.json").is_file(), reason="the demo checkpoint is not there yet")
def test_the_demo_checkpoint_is_the_default(quire: Quire) -> None:
    assert quire("generate", "It was", "--max-tokens", "3").exit_code == 0


def test_a_missing_demo_checkpoint_is_named(quire: Quire, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(door, "__file__", str(tmp_path / "cli" / "door.py"))
    result = quire("generate", "a prompt")
    assert result.exit_code == 2 and "name a model with --model" in result.stderr
