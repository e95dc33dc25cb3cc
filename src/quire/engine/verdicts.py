"""What the probe found of a checkpoint, kept on disk for the next command that loads it.

The probe (tensors/models/probe.py) goes by the weights, the code and the CPU alone, so of the same ones it finds the same. A command is a process in
which nobody has changed any code, and may take what an earlier one found: its first token comes the sooner. `LLM` probes each time, as
`quire check` does: in a process of somebody's own a function may be another than its file says. So may code that came with a checkpoint or was
compiled, and what a driver makes of a kernel: those are always probed.

  known by   the model's identity (weights, config, dtype, versions, programs), the kernels, the CPU, and the files of Quire, of its native module and
             of the model's class: names, sizes, times of change
  kept       whether exact mode had to cover the whole forward; nothing of what was refused

Nothing that fails here fails a command.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from quire.engine.kernels import Kernels
from quire.tensors.models.model import CausalModel

MAX_KEPT = 256  # files, of some twenty bytes

_kept_in: Path | None = None


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Inside, models that are opened need no probe if an earlier one passed here, and are noted if they pass theirs."""
    global _kept_in
    before = _kept_in
    with contextlib.suppress(RuntimeError):  # nobody's home
        _kept_in = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quire" / "probed"
    try:
        yield
    finally:
        _kept_in = before


@dataclass(frozen=True, slots=True)
class Verdict:
    """The file of what the probe found of one model as it is made here."""

    file: Path

    @classmethod
    def of(cls, model: CausalModel, kernels: Kernels) -> Verdict | None:
        """None where it is to be probed each time."""
        if _kept_in is None or model.owned or model.compiled or kernels.device.where.type != "cpu":
            return None
        with contextlib.suppress(OSError):
            told = json.dumps([model.identity, kernels.name, torch.backends.cpu.get_cpu_capability(), _cpu(), *_code(model)])
            return cls(_kept_in / hashlib.sha256(told.encode()).hexdigest())
        return None

    def read(self) -> bool | None:
        """Whether exact mode covers the whole forward; None if nothing is known."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return bool(json.loads(self.file.read_bytes())["everywhere"])
        return None

    def write(self, everywhere: bool) -> None:
        """Keep it; the oldest go when there are many."""
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            made = self.file.with_name(f"{self.file.name}.{os.getpid()}")
            try:
                made.write_text(json.dumps({"everywhere": everywhere}))
                made.replace(self.file)
            finally:
                made.unlink(missing_ok=True)  # of a disk that was full
            for old in sorted(self.file.parent.iterdir(), key=lambda file: file.stat().st_mtime)[:-MAX_KEPT]:
                old.unlink()


def _code(model: CausalModel) -> list[str]:
    """The files whose code runs, as they are now."""
    native, own = sys.modules.get("quire.tensors.native"), sys.modules[type(model.transformers_model).__module__].__file__
    files = [*Path(__file__).parents[1].rglob("*.py"), *([Path(own)] if own else []), *([Path(native.loaded_from())] if native is not None else [])]
    return sorted(f"{file} {status.st_size} {status.st_mtime_ns}" for file in files for status in (file.stat(),))


def _cpu() -> str:
    """The processor's name, where the system tells it so."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as told:
        return next((line for line in told if line.startswith("model name")), "")
    return ""
