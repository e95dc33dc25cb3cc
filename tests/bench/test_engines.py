"""Checkpoints in folders, and the engines that are always there, on shapes small enough for the suite."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from bench.scaling import decode_s
from bench.speed.checkpoints import checkpoint
from bench.speed.engines.protocol import Absent, Engine, Task
from bench.speed.limits import least_tokens
from bench.speed.processes import ENGINES, OURS, task
from bench.speed.shapes import Shape
from bench.speed.workloads import Job, Workload
from transformers import AutoConfig, AutoTokenizer

from quire import LLM

SMALL = Shape("small", "gemma3_text", 700, 64, 96, layers=2, heads=2, kv_heads=1, head_dim=16, context=512, rope_theta=1e5, rms_norm_eps=1e-6)
HYBRID = replace(SMALL, window=8, full_every=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(HYBRID, tmp_path_factory.mktemp("checkpoints"))


def load(engine: str, folder: Path, workload: Workload, quantization: str = "none") -> tuple[Engine, Task]:
    given = Task(**task(workload, folder, quantization, torch.get_num_threads()))
    return import_module(f"bench.speed.engines.{ENGINES[engine]}").load(given), given


def stems(n: int = 1) -> Workload:
    """Three prompts of 24 to 27 tokens, 20 of them shared; or samples out of one."""
    jobs = tuple(Job((*range(300, 320), *range(400 + 9 * i, 404 + 9 * i + i)), 3 + i) for i in range(1 if n > 1 else 3))
    return Workload("W3", "", "batch", HYBRID, jobs, n=n, shared=20)


def test_a_checkpoint_is_written_once(folder: Path) -> None:
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert any(path.suffix == ".safetensors" for path in written)
    assert checkpoint(HYBRID, folder.parent) == folder and {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    assert checkpoint(replace(HYBRID, window=9), folder.parent) != folder
    assert not list(folder.parent.glob(".*"))  # nothing unfinished


def test_a_checkpoint_has_the_shape_and_a_word_for_every_id(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    assert (config.hidden_size, config.sliding_window, config.layer_types) == (64, 8, ["sliding_attention", "full_attention"])
    assert config.eos_token_id is None and config.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 700 and len(set(tokenizer.get_vocab().values())) == 700
    assert tokenizer.decode(tokenizer("Once upon a time").input_ids) == "Once upon a time"


@pytest.mark.parametrize("engine", OURS)
@pytest.mark.parametrize("n", [1, 2])
def test_engines_give_exactly_what_is_asked_for(engine: str, n: int, folder: Path) -> None:
    workload = stems(n)
    loaded, given = load(engine, folder, workload)
    done = loaded.run(given.prompts, given.new, given.n)
    assert done.tokens_out == workload.tokens_out == (12 if n == 1 else 6)
    assert done.first_token_s is None or (len(done.first_token_s) == len(workload.jobs) and min(done.first_token_s) > 0)
    if engine == "quire":
        assert done.first_token_s is not None
        assert done.counters["num_computed_tokens"] - least_tokens(workload) in range(20)  # the prefix once; a hit ends with a page


@pytest.mark.parametrize("engine", OURS[1:])
def test_transformers_has_no_quantization(engine: str, folder: Path) -> None:
    with pytest.raises(Absent, match="quantization=int8"):
        load(engine, folder, stems(), "int8")


def test_decoding_is_timed_on_prompts_in_the_cache(folder: Path) -> None:
    with LLM(str(folder), max_sequences=4, cache_bytes=2**22) as llm:
        prompt_s, decoding_s = decode_s(llm, [33] * 4, 5)
        assert prompt_s > 0 and decoding_s > 0
        stats = llm.stats()
        # Of the second time no prompt is computed again but the last tokens, and four tokens each are decoded.
        assert stats["num_computed_tokens"] <= 4 * 33 + 4 * (16 + 4)
