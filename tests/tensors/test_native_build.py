"""How the kernels are built: nothing shared between instruction sets, no stray access to memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

native = pytest.importorskip("quire.tensors.native", reason="the native kernels are not built")

ROOT = Path(__file__).resolve().parents[2]
SANITISED_TESTS = (  # of more heads than a block has rows the fewest: 192 in plain kernels
    "any_head_size or wrong_arguments or nothing_to_do or (block_of_rows and 200) or large_scores or (splitting and (2-int8 or 16-bf16))"
    " or (options and 7) or (company and not fp32)"
)


TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"  # pip puts cmake and ninja beside python


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": TOOLS, **environment}, capture_output=True, text=True, timeout=600)


# Of quire.tensors.native it is what loads the kernels and chooses among them, without torch, which takes a process three seconds.
LOAD = "import quire.tensors.native_library as native; print(native.lib.isa())"


def test_a_missing_module_says_how_to_build_it() -> None:
    done = run([sys.executable, "-c", LOAD], QUIRE_NATIVE=str(ROOT / "no-such-module.so"))
    assert done.returncode != 0
    assert "NativeMissingError: Quire's native kernels could not be loaded" in done.stderr and "pip install" in done.stderr


def test_an_instruction_set_is_chosen_by_name() -> None:
    ask = [sys.executable, "-c", LOAD]
    for isa in native.isas():
        assert run(ask, QUIRE_ISA=isa).stdout.split() == [isa]
    done = run(ask, QUIRE_ISA="z80")
    known = ", ".join(native.isas())
    assert done.returncode != 0 and f"ConfigError: QUIRE_ISA=z80: instruction set 'z80' cannot run here; known: {known}" in done.stderr


def test_instruction_sets_share_no_code() -> None:
    """A weak symbol in a kernel object may be merged with the same one compiled for a CPU that has more instructions than this one."""
    objects = sorted((ROOT / "build").glob("*/CMakeFiles/kernels_*.dir/csrc/kernels.cpp.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("needs the objects of a build in place (build/*/CMakeFiles) and nm")
    for path in objects:
        listing = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        shared = [line for line in listing.splitlines() if line[17:18] in ("W", "V", "u")]
        assert not shared, f"{path}: {shared}"


@pytest.fixture(scope="module")
def sanitised() -> dict[str, str]:
    """Environment of a process that runs a debug build under AddressSanitizer; the build is kept in build/asan.

    The plain kernels alone: their loads and stores are ordinary ones, which the sanitizer sees, while it does not see masked vector ones.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or ""
    if not (ROOT / "csrc").is_dir() or shutil.which("cmake", path=TOOLS) is None or not compiler:
        pytest.skip("needs Quire's sources, cmake and g++")
    libraries = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(Path(path).is_absolute() for path in libraries):
        pytest.skip(f"{compiler} has no AddressSanitizer library")
    folder = ROOT / "build" / "asan"
    options = [
        "-DQUIRE_DEBUG=ON",
        "-DQUIRE_SANITIZE=ON",
        "-DQUIRE_ISAS=plain",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_CXX_COMPILER={compiler}",
    ]
    if shutil.which("ninja", path=TOOLS):
        options.append("-GNinja")
    for command in (["cmake", "-S", str(ROOT), "-B", str(folder), *options], ["cmake", "--build", str(folder), "--parallel", "2"]):
        done = run(command)
        assert done.returncode == 0, done.stdout + done.stderr
    (module,) = folder.glob("_native*.so")
    return {"QUIRE_NATIVE": str(module), "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}


def test_attention_under_address_sanitizer(sanitised: dict[str, str]) -> None:
    """A debug build: scratch starts as NaN, a page id out of range raises, and no access leaves its tensor."""
    check = "import quire.tensors.native as native; assert native.lib.debug and native.isas() == ['plain'], native.loaded_from(); print('ready')"
    files = ["tests/tensors/test_native_attention.py", "tests/tensors/test_native_attention_bits.py"]
    tests = [*files, "-q", "-x", "-s", "-p", "no:cacheprovider", "-k", SANITISED_TESTS]
    done = run([sys.executable, "-c", f"{check}; import pytest, sys; sys.exit(pytest.main({tests}))"], **sanitised)
    assert done.returncode == 0 and "ready" in done.stdout, done.stdout + done.stderr
    assert "AddressSanitizer" not in done.stderr, done.stderr
