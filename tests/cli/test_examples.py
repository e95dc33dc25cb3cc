"""The examples run, and are as short as they look."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent.parent / "examples").glob("*.py"))
SAYS = {
    "offline.py": "'num_steps'",
    "stream.py": "cancelled: cancelled",
    "live_model.py": "step 2: ",
    "grpo.py": "step 2: ",
    "slots.py": "slot 1: ",
    "pages.py": "step 7: ",
    "bounded_prefill.py": "{'workspace_bytes': 1048576}: ",
    "hf_generate.py": "nats: ",
    "trl_rollouts.py": "rollout",
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(path.read_text().splitlines()) < 40
    monkeypatch.setattr(sys, "argv", [str(path), model])
    runpy.run_path(str(path), run_name="__main__")
    assert SAYS.get(path.name, "") in capsys.readouterr().out


def test_they_are_all_there() -> None:
    assert {path.name for path in EXAMPLES} >= set(SAYS)
