"""The engine on a device: on one that there is not, in a process of its own, since what makes it changes torch for good."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.backend_registration

from quire import LLM, ConfigError
from quire.config import EngineConfig
from tests.engine.conftest import Checkpoint

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).parents[2]


def test_on_a_device_that_there_is_not() -> None:
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch takes no device written in Python")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/engine/devices_families.py", "tests/engine/devices_rules.py"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"backend": "native"}, "backend='native': must be auto or triton with device='cuda'"),
        ({"backend": "reference"}, "backend='reference': must be auto or triton"),
        ({"kv_codec": "int8"}, "kv_codec='int8': must be left out with device='cuda'"),
        ({"cache_dir": "/nowhere"}, "cache_dir='/nowhere': must be left out with device='cuda'"),
        ({"compile": True}, "compile=True: must be left out with device='cuda'"),
        ({"reserve_bytes": 5}, "reserve_bytes=5: must be left out with device='cuda'"),
    ],
)
def test_what_does_not_go_with_a_device_is_refused_by_name(options: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        EngineConfig.of({"device": "cuda", **options})


@pytest.mark.parametrize("name", ["", "CUDA", "cuda:", "cuda:x", "cuda:-1", "cpu:0", 0, None])
def test_a_name_that_is_none_is_refused(name: object) -> None:
    with pytest.raises(ConfigError, match="device=.*must be cpu, or a device's name as torch has it"):
        EngineConfig.of({"device": name})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_there_is_not_is_refused_before_anything_is_loaded(checkpoint: Checkpoint) -> None:
    for name, told in (("cuda", "torch .* finds no such device"), ("cuda:1", "torch .* finds no such device"), ("tpu", "must be one of cpu, cuda")):
        with pytest.raises(ConfigError, match=f"device='{name}': {told}"):
            LLM("/no such folder", device=name)


def test_the_cpu_is_a_device_like_any_other(checkpoint: Checkpoint) -> None:
    with LLM(checkpoint("llama"), device="cpu") as llm:
        assert llm.info.device == "cpu"
