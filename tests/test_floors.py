"""The floors of the house, read from the imports: they go down only, also inside functions and under TYPE_CHECKING."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "quire"
FLOORS = {
    **dict.fromkeys(("errors", "config", "params", "request", "outputs", "structured"), 0),
    "policy": 1,
    "tensors": 2,
    "text": 2,
    "engine": 3,
    "faces": 4,
    "server": 4,
    "cli": 4,
}
APART = {("tensors", "text"), ("text", "tensors"), ("server", "cli")}  # on one floor: the first never imports the second
STANDARD_LIBRARY_ONLY = {0, 1}
MAX_LINES = 330


def rooms() -> list[tuple[Path, str]]:
    """Every source file with the room it is in; the package's own doors (__init__, __main__) stand above all floors."""
    files = sorted(SOURCE.rglob("*.py"))
    return [(f, f.relative_to(SOURCE).parts[0].removesuffix(".py")) for f in files if not f.relative_to(SOURCE).parts[0].startswith("__")]


def imports(path: Path) -> set[str]:
    """Every module imported anywhere in a file, dotted and absolute."""
    return imported_by(ast.walk(ast.parse(path.read_text())))


def imported_by(nodes: Iterable[ast.AST]) -> set[str]:
    """Every module that these import."""
    found = set[str]()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import of {node.module}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return found


@pytest.mark.parametrize(("path", "room"), rooms(), ids=lambda x: x.name if isinstance(x, Path) else x)
def test_imports_go_down(path: Path, room: str) -> None:
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "quire" and len(parts) > 1 and parts[1] in FLOORS:
            assert FLOORS[parts[1]] <= FLOORS[room], f"{path} imports {name} from a floor above"
            assert (room, parts[1]) not in APART, f"{path} imports {name} from the room beside it"
        elif parts[0] == "quire" and len(parts) > 1 and not parts[1].startswith("_"):
            assert FLOORS[room] == 4, f"{path} imports {name} through the front door"
        elif parts[0] != "quire" and FLOORS[room] in STANDARD_LIBRARY_ONLY:
            assert parts[0] in sys.stdlib_module_names, f"{path} imports {name}, which is not in the standard library"


def test_every_room_has_a_floor() -> None:
    assert {room for _, room in rooms()} <= FLOORS.keys()


def test_no_file_is_far_beyond_300_lines() -> None:
    files = [p for pattern in ("src/**/*.py", "tests/**/*.py", "bench/**/*.py", "tools/**/*.py", "csrc/*") for p in ROOT.glob(pattern)]
    long = {str(p.relative_to(ROOT)): n for p in files if p.is_file() and (n := len(p.read_text().splitlines())) > MAX_LINES}
    assert not long


def test_cuda_is_written_in_two_places_only() -> None:
    allowed = re.compile(r"tensors/(device|attention/triton\w*)\.py$")
    assert not [p for p, _ in rooms() if "cuda" in p.read_text().lower() and not allowed.search(p.as_posix())]


def test_without_the_kernels_the_engine_can_still_be_imported() -> None:
    """Only functions import what loads them, so that the reference takes over where they do not load."""
    files = {".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): path for path, _ in rooms()}
    reached, news = set[str](), ["quire.engine.llm", "quire.faces.slots", "quire.faces.pages"]
    while news:
        module = news.pop()
        reached.add(module)
        at_once = [node for node in ast.parse(files[module].read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        news += (imported_by(at_once) & files.keys()) - reached
    assert "quire.tensors.foreseen" in reached and "quire.tensors.native_library" not in reached


def test_the_web_stack_stays_in_the_server() -> None:
    web = {"fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", "jinja2", "h11"}
    assert not [path for path, room in rooms() if room != "server" and web & {name.split(".")[0] for name in imports(path)}]


def test_nothing_is_unpickled() -> None:
    unsafe = re.compile(r"\bpickle\b|\btorch\.load\b|\bmarshal\b|weights_only\s*=\s*False")
    assert not [p for p, _ in rooms() if unsafe.search(p.read_text())]


PUBLIC_BENCHES = ("live.py", "scaling.py", "serving.py", "faces.py", "svg.py")  # others look at parts of the engine, which have no public names


def test_examples_and_whole_workloads_use_public_names() -> None:
    folders = [path for folder in ("examples", "bench/speed", "bench/http") for path in (ROOT / folder).rglob("*.py")]
    for path in [*folders, *(ROOT / "bench" / name for name in PUBLIC_BENCHES)]:
        private = [name for name in imports(path) if name.startswith("quire.") and name.split(".")[1] in FLOORS]
        assert not private, f"{path} imports {private}"
