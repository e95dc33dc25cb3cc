"""The command line under a runner, on a tiny checkpoint of random weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
from typer.testing import CliRunner, Result

from quire.cli.app import app
from tests.engine.conftest import tokenizer
from tests.tensors.checkpoints import make

Quire = Callable[..., Result]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small Llama and a tokenizer."""
    folder = make(tmp_path_factory.mktemp("cli") / "llama", "llama")
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def quire(monkeypatch: pytest.MonkeyPatch) -> Iterator[Quire]:
    """quire("generate", "a prompt", ..., stdin="text"): run it in this process; what it turns off for itself is on again afterwards."""
    from transformers.utils import logging

    monkeypatch.setenv("COLUMNS", "100")
    verbosity, shown, bars = logging.get_verbosity(), warnings.showwarning, logging.is_progress_bar_enabled()
    yield lambda *args, stdin=None: CliRunner().invoke(app, list(args), input=stdin)
    logging.set_verbosity(verbosity)
    warnings.showwarning = shown
    if bars:
        logging.enable_progress_bar()
