"""What happens before any model: help, version, the extra that is missing."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from typing import Any

import pytest

from quire import __version__
from quire.cli.door import waiting
from tests.cli.conftest import Quire

HEAVY = "{'torch', 'transformers', 'numpy', 'tokenizers', 'huggingface_hub'}"


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("args", [["--help"], ["generate", "--help"], ["--version"]])
def test_help_loads_no_torch(args: list[str]) -> None:
    done = python(
        f"import atexit, sys; atexit.register(lambda: print('heavy', {HEAVY} & set(sys.modules))); from quire.cli import main; main({args})"
    )
    assert done.returncode == 0, done.stderr
    assert "heavy set()" in done.stdout


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_a_missing_extra_is_named(missing: str) -> None:
    done = python(f"import sys; sys.modules[{missing!r}] = None; from quire.cli import main; main(['--help'])")
    assert done.returncode == 1
    assert done.stdout == ""
    assert f"{missing}" in done.stderr and "pip install 'quire[cli]'" in done.stderr and "Traceback" not in done.stderr


def test_another_missing_module_is_not_blamed_on_the_extra() -> None:
    done = python("import sys; sys.modules['quire.cli.lanes'] = None; from quire.cli import main; main(['--help'])")
    assert "ModuleNotFoundError" in done.stderr and "quire[cli]" not in done.stderr


def test_python_dash_m() -> None:
    done = subprocess.run([sys.executable, "-m", "quire", "--version"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"quire {__version__}\n")


ON_STDOUT, ON_STDERR = ("--help", "generate --help", "bench -h", "--version", ""), ("nonsense", "generate --nonsense", "batch /no/such answers")


@pytest.mark.parametrize(("args", "closed"), [*((args, "stdout") for args in ON_STDOUT), *((args, "stderr") for args in ON_STDERR)])
def test_a_reader_who_has_left_is_no_error_to_tell(args: str, closed: str) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as nobody:
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, closed: nobody}
        done = subprocess.run([sys.executable, "-m", "quire", *args.split()], **streams, text=True, timeout=120)
    assert (done.returncode, done.stdout or "", done.stderr or "") == (141, "", "")


def test_help_names_the_commands(quire: Quire) -> None:
    text = quire("--help").stdout
    assert all(f" {command} " in text for command in ("generate", "batch", "serve", "check", "bench", "demo"))
    assert "Exit status" in text


def test_loading_is_not_looked_through_by_the_collector() -> None:
    with waiting("."):
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() == 0
    with pytest.raises(OSError), waiting("."):
        raise OSError
    assert gc.isenabled()


def test_a_command_imports_nothing_that_it_does_not_use(quire: Quire) -> None:
    args = ["generate", "Once", "--max-tokens", "2", "--temperature", "0"]
    unused = {"torch._dynamo", "torch._inductor", "torch.distributed.tensor", "transformers.models", "sympy"}
    told = f"atexit.register(lambda: print({unused} & set(sys.modules)))"
    lean = python(f"import atexit, sys; {told}; from quire.cli import main; main({args})")
    assert lean.returncode == 0, lean.stderr
    import torch._dynamo
    import transformers.models

    assert not {type(torch._dynamo).__name__, type(transformers.models).__name__} & {"_StandIn"}  # and so they stay, in this process
    usual = quire(*args)
    assert usual.exit_code == 0, usual.stderr
    assert lean.stdout.strip() == usual.stdout.strip() + "set()"


USES = """
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
from torch._dynamo import config
assert config.suppress_errors is False
from transformers.models import GPT2Config, llama
assert llama is sys.modules["transformers.models.llama"] is sys.modules["transformers.models"].llama
from torch._dynamo._trace_wrapped_higher_order_op import trace_wrapped
from torch.fx.experimental.symbolic_shapes import ShapeEnv, guard_or_false
assert guard_or_false.__module__ == "torch.fx.experimental.symbolic_shapes"
import sympy
assert isinstance(sympy.Symbol("x"), sympy.Basic) and isinstance(sympy.Symbol("x"), held.Basic)
"""


def test_what_stood_in_gives_way_when_more_is_asked_for() -> None:
    """Inside, in a fork of the process in which it is asked for only after."""
    done = python(
        f"""
import os, sys
from contextlib import ExitStack
from quire.cli.lean import stand_ins
stack = ExitStack()
stack.enter_context(stand_ins())
import torch
from transformers import LlamaForCausalLM
import sympy as held
names = ("torch._dynamo", "transformers.models", "torch.fx.experimental.symbolic_shapes", "sympy")
torch.empty(2, 3, device="meta").normal_()
stood_in = [sys.modules[name] for name in names]
assert all(map(lambda module: type(module).__name__ == "_StandIn", stood_in))
forked = os.fork()
if not forked:
    exec({USES!r})
assert not torch.distributed.is_available()
stack.close()
assert torch.distributed.is_available()
if forked:
    exec({USES!r})
import transformers, torch._dynamo, transformers.models
now = [torch._dynamo, transformers.models, torch.fx.experimental.symbolic_shapes, sympy]
assert now == [sys.modules[name] for name in names] and not set(map(id, now)) & set(map(id, stood_in))
assert not forked or os.waitpid(forked, 0)[1] == 0, "inside"
print("after" if forked else "inside")
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["inside", "after"]


@pytest.mark.parametrize("closed", ["<&-", "<&- >&-"])
def test_what_is_closed_is_as_if_it_were_empty(closed: str) -> None:
    done = subprocess.run(["sh", "-c", f'exec "$0" -m quire generate - {closed}', sys.executable], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.splitlines()[:1]) == (2, ["error: prompt='': must be text, given as an argument, with --file, or on stdin"])
