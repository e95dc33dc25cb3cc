"""Commands take what an earlier one's probe found, of the same weights, code and CPU alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.config import EngineConfig
from quire.engine import build, verdicts
from quire.engine.verdicts import remembered
from quire.errors import ProbeMismatchError
from quire.tensors.models.model import CausalModel
from tests.cli.conftest import Quire, quire
from tests.engine.conftest import Checkpoint
from tests.tensors.test_models import EXPERTS

__all__ = ["quire"]
Probes = Callable[..., tuple[int, bool]]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where they are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "quire" / "probed"


@pytest.fixture
def probes(kept: Path, monkeypatch: pytest.MonkeyPatch) -> Probes:
    """probes(folder, ...): how often opening it so in a command probes, and whether exact mode covers its forward then."""
    asked: list[bool] = []
    probe = build.probe
    monkeypatch.setattr(build, "probe", lambda *args: (asked.append(True), probe(*args))[1])

    def opened(folder: str, **config: Any) -> tuple[int, bool]:
        asked.clear()
        with remembered():
            built = build.build_engine(folder, EngineConfig(num_threads=1, max_model_len=64, **config))
        built.close()
        return len(asked), built.model.everywhere

    return opened


@pytest.fixture
def copied(checkpoint: Checkpoint, tmp_path: Path) -> str:
    return str(shutil.copytree(checkpoint(), tmp_path / "llama"))


@pytest.mark.parametrize(("family", "changes", "everywhere"), [("llama", {}, False), ("qwen2_moe", EXPERTS, True)])
def test_what_was_found_is_found_again(probes: Probes, checkpoint: Checkpoint, family: str, changes: dict[str, Any], everywhere: bool) -> None:
    folder = checkpoint(family, **changes)
    assert [probes(folder), probes(folder)] == [(1, everywhere), (0, everywhere)]
    with LLM(folder, num_threads=1) as probed:
        expected = probed.generate([[5, 6, 7], [8, 9]], SamplingParams(max_tokens=6, temperature=0, logprobs=1))
    with remembered(), LLM(folder, num_threads=1) as known:
        outputs = known.generate([[5, 6, 7], [8, 9]], SamplingParams(max_tokens=6, temperature=0, logprobs=1))
    assert [output.outputs for output in outputs] == [output.outputs for output in expected]


def refused(*_: object) -> None:
    raise ProbeMismatchError("no longer")


def edit_a_weight(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    status = file.stat()
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def edit_the_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))


@pytest.mark.parametrize("edit", [edit_a_weight, edit_the_config, lambda folder: os.utime(folder / "model.safetensors", (1, 1))])
def test_another_checkpoint_is_probed(probes: Probes, copied: str, edit: Callable[[Path], None]) -> None:
    assert [probes(copied)[0], probes(copied)[0]] == [1, 0]
    edit(Path(copied))
    assert [probes(copied)[0], probes(copied)[0]] == [1, 0]


def test_other_options_are_probed(probes: Probes, copied: str) -> None:
    options: tuple[dict[str, Any], ...] = ({}, {"dtype": "bfloat16"}, {"quantization": "int8"}, {"backend": "reference"})
    assert [probes(copied, **option)[0] for option in (*options, *options)] == [1, 1, 1, 1, 0, 0, 0, 0]


def test_other_code_and_another_cpu_are_probed(probes: Probes, copied: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "quire"
    (package / "engine").mkdir(parents=True)
    monkeypatch.setattr(verdicts, "__file__", str(package / "engine" / "verdicts.py"))
    (package / "errors.py").write_text("one = 1")
    assert [probes(copied)[0], probes(copied)[0]] == [1, 0]
    (package / "errors.py").write_text("two = 2, 2")
    assert [probes(copied)[0], probes(copied)[0]] == [1, 0]
    monkeypatch.setattr(verdicts, "_cpu", lambda: "model name: another")
    assert [probes(copied)[0], probes(copied)[0]] == [1, 0]


CODE = """
from transformers import LlamaForCausalLM
class Own(LlamaForCausalLM):
    pass
"""


def test_own_code_and_compiled_layers_are_always_probed(probes: Probes, copied: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CausalModel, "compile", lambda model: setattr(model, "compiled", True))  # which takes a minute
    assert [probes(copied, compile=True)[0] for _ in range(2)] == [1, 1]
    config = json.loads((Path(copied) / "config.json").read_text())
    (Path(copied) / "own.py").write_text(CODE)
    (Path(copied) / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "own.Own"}}))
    assert [probes(copied, trust_remote_code=True)[0] for _ in range(2)] == [1, 1]


def test_llm_always_probes(probes: Probes, copied: str, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probes(copied)
    monkeypatch.setattr(build, "probe", refused)
    with pytest.raises(ProbeMismatchError):
        LLM(copied, num_threads=1, max_model_len=64)
    edit_the_config(Path(copied))
    for _ in range(2):
        with pytest.raises(ProbeMismatchError):
            probes(copied)
    assert len(list(kept.iterdir())) == 1


def test_what_cannot_be_kept_or_read_is_probed(probes: Probes, copied: str, kept: Path) -> None:
    kept.parent.mkdir(parents=True)
    kept.write_text("no folder")
    assert [probes(copied)[0], probes(copied)[0]] == [1, 1]
    kept.unlink()
    assert [probes(copied)[0], probes(copied)[0]] == [1, 0]
    (file,) = kept.iterdir()
    for told in ("{", "[]", "{}"):
        file.write_text(told)
        assert [probes(copied)[0], probes(copied)[0]] == [1, 0]


def test_few_are_kept(probes: Probes, copied: str, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "MAX_KEPT", 2)
    kept.mkdir(parents=True)
    for age in range(3):
        (kept / str(age)).write_text("{}")
        os.utime(kept / str(age), (age, age))
    probes(copied)
    names = {file.name for file in kept.iterdir()}
    assert len(names) == 2 and "2" in names


def test_commands_remember_and_check_does_not(probes: Probes, copied: str, quire: Quire, monkeypatch: pytest.MonkeyPatch) -> None:
    def generated() -> str:
        done = quire("generate", "the quick", "--model", copied, "--max-tokens", "4", "--temperature", "0", "--num-threads", "1")
        assert done.exit_code == 0, done.stderr
        return done.stdout

    first = generated()
    monkeypatch.setattr(build, "probe", refused)
    assert generated() == first
    checked = quire("check", copied, "--num-threads", "1")
    assert checked.exit_code == 1 and "no longer" in checked.stdout
