"""Memory for packed weights, touched on an idle core while torch and transformers are imported, which takes one core seconds.

A command says what it will load (`made_ahead`), packing takes what was made (`take`). What is not taken is given back at once. It is made only
where loading makes no copies of its own, so that the peak is not higher: a local folder of safetensors of the dtype that is served, without experts.
Nothing that fails here fails a command. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import mmap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from quire.tensors.memory import mapped

POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14, which Python's mmap does not name
SLICE = 16 * 2**20  # what a taker waits for at most
ITEM_BYTES = {"BF16": ("bfloat16", 2), "F16": ("float16", 2), "F32": ("float32", 4)}
LEAST = 64 * 2**20  # less is not worth a thread

_now: Ahead | None = None


class Ahead:
    """An area of `num_bytes` that a thread touches, slice by slice, as far as `touched` bytes."""

    def __init__(self, num_bytes: int, touched: int) -> None:
        self.memory = mapped(num_bytes)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._touch, args=(touched,), name="quire-ahead", daemon=True)
        self._thread.start()

    def _touch(self, touched: int) -> None:
        with contextlib.suppress(Exception):  # then packing touches it, as it would have done
            madvise = ctypes.CDLL(None).madvise  # lets go of the interpreter's lock, as mmap's own does not
            held = ctypes.c_char.from_buffer(self.memory)
            for offset in range(0, touched, SLICE):
                size = min(SLICE, touched - offset)
                if self._stop.is_set() or madvise(ctypes.c_void_p(ctypes.addressof(held) + offset), ctypes.c_size_t(size), POPULATE_WRITE):
                    return

    def end(self, used: int) -> None:
        """Touch no more, and give back all behind the first `used` bytes."""
        self._stop.set()
        self._thread.join()
        first = -(-used // mmap.PAGESIZE) * mmap.PAGESIZE
        if first < len(self.memory):
            self.memory.madvise(mmap.MADV_DONTNEED, first, len(self.memory) - first)


@contextlib.contextmanager
def made_ahead(source: str, *, dtype: str, quantization: str, spare_bytes: Callable[[], int]) -> Iterator[None]:
    """Inside, memory is made for packing the model in the folder `source`, if `spare_bytes()` allows; what was not taken is gone afterwards."""
    global _now
    with contextlib.suppress(Exception):  # a folder that cannot be read is refused by name later
        num_bytes, touched = foreseen(Path(source).expanduser(), dtype, quantization)
        if hasattr(mmap, "MADV_HUGEPAGE") and touched >= LEAST and num_bytes <= spare_bytes():
            _now = Ahead(num_bytes + num_bytes // 4, touched)  # panels are padded: what is never touched costs nothing
    try:
        yield
    finally:
        take(0)


def take(num_bytes: int) -> mmap.mmap | None:
    """The area made ahead, if it has `num_bytes`, once; all it has beyond them is given back."""
    global _now
    ahead, _now = _now, None
    if ahead is None:
        return None
    fits = 0 < num_bytes <= len(ahead.memory)
    ahead.end(num_bytes if fits else 0)
    return ahead.memory if fits else None


def foreseen(folder: Path, dtype: str, quantization: str) -> tuple[int, int]:
    """Bytes that packing will take of the checkpoint in `folder`, about, and how many of them may be touched before: with the largest weight as it
    lies in its file, which is read meanwhile, no more than all packed ones. Both are 0 where loading may need memory of its own."""
    shapes: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            shapes |= json.loads(file.read(int.from_bytes(file.read(8), "little")))
    shapes.pop("__metadata__", None)
    stored = {entry["dtype"] for entry in shapes.values()}
    if len(stored) != 1 or any("expert" in name for name in shapes):  # experts are put together as they are read
        return 0, 0
    name, item_bytes = ITEM_BYTES[stored.pop()]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if name != (dtype if dtype != "auto" else config.get("dtype", config.get("torch_dtype"))):
        return 0, 0  # all of it will be converted
    item = {"none": float(item_bytes), "int8": 1.0, "int4": 0.5}[quantization]
    untied = any(name.startswith("lm_head") for name in shapes)
    packed = [math.prod(e["shape"]) for name, e in shapes.items() if len(e["shape"]) == 2 and not (untied and "embed" in name)]
    num_bytes = int(item * sum(packed))
    return num_bytes, max(0, num_bytes - item_bytes * max(packed, default=0)) // mmap.PAGESIZE * mmap.PAGESIZE
