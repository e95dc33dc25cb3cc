"""Weights packed ahead: they are what packing makes, it uses them, what it does not want is gone, and nothing that fails there fails the command."""

from __future__ import annotations

import ctypes
import json
import mmap
import struct
import subprocess
import sys
import threading
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire.errors import UnsupportedModelError
from quire.tensors import ahead
from quire.tensors.ahead import Ahead, made_ahead
from quire.tensors.memory import mapped
from quire.tensors.models.load import load_model
from quire.tensors.models.packing import _stored, _Weight
from quire.tensors.packed import PackedLayout, PackedWeight
from quire.tensors.products import ReferenceProducts
from tests.tensors.checkpoints import make

pytest.importorskip("quire.tensors.native", reason="the native kernels are not built")

from quire.tensors.foreseen import foreseen
from quire.tensors.native_products import NativeProducts

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells which files are in memory")
AREAS: list[mmap.mmap] = []
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 700, "tie_word_embeddings": True}


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    AREAS.clear()
    monkeypatch.setattr(ahead, "LEAST", 1)
    monkeypatch.setattr(ahead, "SLICE", 100_000)  # most weights are cut, none into equal parts


def checkpoint(folder: Path, family: str = "qwen3", **changes: Any) -> Path:
    return Path(make(folder, family, torch.bfloat16, **(WIDE | changes)))


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is resident is asked of these areas alone: a huge page may reach into them from the memory beside, and bring it all back."""

    def in_small_pages(num_bytes: int) -> mmap.mmap:
        memory = mapped(num_bytes)
        with suppress(OSError):  # a system without huge ones
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        return memory

    monkeypatch.setattr(ahead, "mapped", in_small_pages)


def packing(folder: Path, quantization: str = "none", spare: int = 2**40) -> AbstractContextManager[None]:
    return made_ahead(str(folder), dtype="auto", quantization=quantization, spare_bytes=lambda: spare)


def made() -> Ahead:
    """The thread's work, done."""
    now = ahead._now
    assert now is not None
    now._thread.join()
    return now


def weights(folder: Path, quantization: str = "none", products: Any = None) -> dict[str, PackedWeight]:
    """Packed weights of the model, loaded, by name."""
    products = products or NativeProducts(2)
    model = load_model(str(folder), dtype="auto", trust_remote_code=False, revision=None, products=products, quantization=quantization)
    modules = model.transformers_model.modules()
    found = [weight for module in modules for weight in module._parameters.values() if isinstance(weight, PackedWeight)]
    return {weight.weight_name: weight for weight in found}


def same_bytes(a: PackedWeight, b: PackedWeight) -> bool:
    return torch.equal(a.packed[: a.num_bytes], b.packed[: b.num_bytes])


def area(now: Ahead) -> range:
    """Where what it makes lies; nothing else will lie there before the test ends."""
    assert now._memory is not None
    AREAS.append(now._memory)
    first = ctypes.addressof(ctypes.c_char.from_buffer(now._memory))
    return range(first, first + len(now._memory))


def resident(inside: range) -> int:
    """Bytes of these addresses that are in memory."""
    first, last = inside.start // mmap.PAGESIZE, -(-inside.stop // mmap.PAGESIZE)
    with Path("/proc/self/pagemap").open("rb") as file:
        file.seek(8 * first)
        pages = struct.unpack(f"{last - first}Q", file.read(8 * (last - first)))
    return mmap.PAGESIZE * sum(page >> 63 for page in pages)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "mixtral", "phi3"])
@pytest.mark.parametrize("tied", [True, False])
def test_it_is_what_packing_makes(family: str, quantization: str, tied: bool, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, family, n_embd=256, n_inner=700, tie_word_embeddings=tied)
    expected = weights(folder, quantization)
    with packing(folder, quantization):
        inside = area(made())
        got = weights(folder, quantization)
    assert expected and got.keys() == expected.keys()
    for name, weight in got.items():
        assert weight.form == expected[name].form and same_bytes(weight, expected[name]), name
        transposed = family == "gpt2" and not ("wte" in name or "lm_head" in name)  # those are stored [K, N], which nothing foresees
        assert (weight.packed.data_ptr() in inside) != transposed, name


def test_checkpoints_of_several_files_and_the_rest_of_the_area(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    expected = weights(folder)
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"model-{number % 3}.safetensors" for number, name in enumerate(sorted(stored))}
    for file in set(names.values()):
        save_file({name: stored[name] for name in names if names[name] == file}, folder / file, {"format": "pt"})
    save_file({"more.weight": torch.ones(999, 256, dtype=torch.bfloat16)}, folder / "model-1.safetensors.other", {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with packing(folder):
        inside = area(made())
        got = weights(folder)
    assert all(same_bytes(weight, expected[name]) and weight.packed.data_ptr() in inside for name, weight in got.items())


def test_what_packing_does_not_want_is_gone(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    with packing(folder, "int8"):  # of the weights that int4 keeps in int8, the head, the place stays
        inside = area(made())
        before = resident(inside)
        got = weights(folder, "int4")
        assert len([weight for weight in got.values() if weight.packed.data_ptr() in inside]) == 1
        head = got["model.embed_tokens.weight"]
        assert resident(inside) <= head.packed.nbytes + 8192 < before
    assert ahead._now is None
    assert same_bytes(head, weights(folder, "int4")["model.embed_tokens.weight"])  # it outlives the command's loading


@pytest.mark.parametrize("case", ["refused", "raises", "other products", "other file"])
def test_what_nobody_wants_is_gone(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path)
    inside = range(0)

    def run() -> None:
        nonlocal inside
        with packing(folder, "int8"):
            inside = area(made())
            assert resident(inside) > 500_000
            if case == "raises":
                raise OSError
            if case == "refused":
                config = json.loads((folder / "config.json").read_text())
                (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}))
            if case == "other file":  # the same names, shapes and places, other numbers
                stored = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
                save_file(stored, folder / "new", {"format": "pt"})
                (folder / "new").replace(folder / "model.safetensors")
            got = weights(folder, "int8", ReferenceProducts() if case == "other products" else None)
            assert not [weight for weight in got.values() if weight.packed.data_ptr() in inside]

    if case in ("refused", "raises"):
        with pytest.raises(UnsupportedModelError if case == "refused" else OSError):
            run()
    else:
        run()
    assert ahead._now is None and resident(inside) < 500_000
    assert not [thread for thread in threading.enumerate() if thread.name == "quire-ahead"]


def test_whoever_comes_first_packs_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path)
    expected = weights(folder)
    pack, begun, go = Ahead._pack, threading.Event(), threading.Event()
    packed: list[object] = []

    def slow(self: Ahead, weight: Any, *args: Any) -> bool:
        if len(packed) == 5:
            begun.set()
            go.wait(60)
        packed.append(weight)
        return pack(self, weight, *args)

    monkeypatch.setattr(Ahead, "_pack", slow)
    monkeypatch.setattr(Ahead, "end", lambda self, wanted, end=Ahead.end: (self._stop.set(), go.set(), end(self, wanted))[-1])
    with packing(folder):
        assert begun.wait(60) and ahead._now is not None
        inside = area(ahead._now)
        got = weights(folder)
    assert len([weight for weight in got.values() if weight.packed.data_ptr() in inside]) == 5
    assert all(same_bytes(weight, expected[name]) for name, weight in got.items())


def test_files_leave_memory_as_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path)
    held = []

    class Looking(ahead.FileMappings):
        def __init__(self) -> None:
            super().__init__()
            self.find = super().holding

        def holding(self, first: int, num_bytes: int) -> Any:
            held.append(range(first, first + num_bytes))
            return self.find(first, num_bytes)

    monkeypatch.setattr(ahead, "FileMappings", Looking)
    pack = Ahead._pack
    most = []
    monkeypatch.setattr(Ahead, "_pack", lambda self, *args: (pack(self, *args), most.append(resident(held[0])))[0])
    with packing(folder):
        made()
    assert len(most) > 10 and max(most) < len(held[0]) / 3  # more is mapped than what is touched


@pytest.mark.parametrize("fails", ["address", "memory", "kernels"])
def test_a_failure_in_the_thread_is_none_of_the_command(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(fails)

    folder = checkpoint(tmp_path)
    expected = weights(folder)
    name = {"address": "_address", "memory": "mapped"}.get(fails)
    with monkeypatch.context() as patch:
        patch.setattr(*(ahead, name) if name else (Ahead, "_pack"), fail)
        with packing(folder):
            assert not made()._made
            got = weights(folder)
    assert all(same_bytes(weight, expected[name]) for name, weight in got.items())


@pytest.mark.parametrize("case", ["no folder", "hub id", "no memory", "converted", "no weights", "broken", "a file"])
def test_nothing_is_made(case: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    source = {"no folder": folder / "none", "hub id": Path("owner/name"), "a file": folder / "config.json"}.get(case, folder)
    if case == "broken":
        (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    elif case == "no weights":
        (folder / "model.safetensors").unlink()
    dtype = "float32" if case == "converted" else "auto"
    with made_ahead(str(source), dtype=dtype, quantization="none", spare_bytes=lambda: 1000 if case == "no memory" else 2**40):
        assert ahead._now is None or made()._memory is None
    assert ahead._now is None


def test_experts_and_embeddings_are_not_foreseen(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "mixtral", tie_word_embeddings=False)
    ((path, found),) = foreseen(folder, "auto", "int4")
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(path).items() if tensor.dim() == 2}
    wanted = [shape for name, shape in shapes.items() if "expert" not in name and "embed" not in name]
    assert sorted((weight.n, weight.k) for weight in found) == sorted(wanted) and len(wanted) < len(shapes)
    assert [weight.offset for weight in found] == sorted(weight.offset for weight in found)


def test_the_thread_needs_no_torch_and_has_its_library_loaded(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    code = f"""
import sys
from quire.tensors import ahead
ahead.LEAST = 1
with ahead.made_ahead({str(folder)!r}, dtype="auto", quantization="none", spare_bytes=lambda: 2**40):
    now = ahead._now
    now._thread.join()
    assert now._made and "torch" not in sys.modules and "libtorch_cpu" in open("/proc/self/maps").read()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_a_mapping_is_known_by_its_file_and_where_it_begins_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4 * mmap.PAGESIZE))
    with (tmp_path / "file").open("rb") as file:
        memory = mmap.mmap(file.fileno(), mmap.PAGESIZE, access=mmap.ACCESS_COPY, offset=2 * mmap.PAGESIZE)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    held = ahead.FileMappings().holding(first + 10, 100)
    assert held is not None and held.file.endswith(f" {(tmp_path / 'file').stat().st_ino}")
    assert held.first == first and held.offset == 2 * mmap.PAGESIZE
    weight = torch.frombuffer(memory, dtype=torch.float32, count=64, offset=128).view(8, 8)
    stored = _stored(_Weight(weight, "weight", False), PackedLayout(8, 8, torch.float32, "none"), NativeProducts(1), ahead.FileMappings())
    assert stored is not None and stored[0] == held.file and stored[1].offset == 2 * mmap.PAGESIZE + 128
    assert ahead.FileMappings().holding(first + 10, 2**40) is None
    anonymous = torch.zeros(10**7)
    assert ahead.FileMappings().holding(anonymous.data_ptr(), anonymous.nbytes) is None
