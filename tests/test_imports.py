"""The package keeps its shape: arrows point down, files stay short, importing stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "scbin"
FILES = sorted(SRC.rglob("*.py"))

FACE = {"pp", "tl", "pl", "get", "datasets", "cli", "_keys", "_anndata", "_sparse"}
FACE |= {"_check_file", "_stored", "_walk_file"}
# which rooms each room may import, beside itself, _errors and _arguments
BELOW = {
    "encoding": set(),
    "data": {"encoding"},
    "nn": {"encoding", "data"},
    "train": {"encoding", "data", "nn"},
    "model": {"encoding", "data", "nn", "train"},
    **{room: {"encoding", "data", "nn", "train", "model"} | FACE for room in FACE},
    "__init__": {"encoding", "data", "nn", "train", "model"} | FACE,
    "__main__": FACE,
}
HEAVY = {"torch", "transformers"}
WITHOUT_TORCH = {"pl", "get", "datasets", "encoding", "_keys", "_errors", "_arguments", "_anndata", "_sparse"}
WITHOUT_ANNDATA = {"encoding", "data", "nn", "train"}


def room_of(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return parts[0]


def imported(path: Path, *, for_types: bool) -> set[str]:
    """Absolute names of all modules that a file imports, at its head or inside functions."""
    names = set()
    for node in _walk(ast.parse(path.read_text()), for_types=for_types):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _walk(node: ast.AST, *, for_types: bool):
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test) and not for_types:
            continue
        yield from _walk(child, for_types=for_types)


def rooms_imported(path: Path) -> set[str]:
    names = (name.split(".") for name in imported(path, for_types=False))
    rooms = {parts[1] for parts in names if parts[0] == "scbin" and len(parts) > 1}
    return {room for room in rooms if (SRC / room).is_dir() or (SRC / f"{room}.py").is_file()}


def named(path: Path) -> str:
    return str(path.relative_to(SRC))


@pytest.mark.parametrize("path", FILES, ids=named)
def test_arrows_point_down(path: Path):
    room = room_of(path)
    allowed = BELOW.get(room, set()) | {room, "_errors", "_arguments"}
    upward = rooms_imported(path) - allowed
    assert not upward, f"{named(path)} ({room}) imports {sorted(upward)}; it may import {sorted(allowed)}"


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) in WITHOUT_TORCH], ids=named)
def test_rooms_without_torch(path: Path):
    assert not {name.split(".")[0] for name in imported(path, for_types=False)} & HEAVY


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) in WITHOUT_ANNDATA], ids=named)
def test_no_anndata_below_the_face(path: Path):
    assert not {name.split(".")[0] for name in imported(path, for_types=True)} & {"anndata", "scanpy"}


@pytest.mark.parametrize("path", FILES, ids=named)
def test_files_stay_short(path: Path):
    assert len(path.read_text().splitlines()) <= 400


def test_every_room_is_known():
    assert {room_of(path) for path in FILES} <= set(BELOW) | {"_errors", "_arguments"}


@pytest.mark.parametrize(
    "code", ["import scbin", "import scbin.pp, scbin.pl, scbin.get, scbin.datasets, scbin.cli"], ids=["package", "face"]
)
def test_import_is_light(code: str):
    program = f"import sys\n{code}\nprint([name for name in {sorted(HEAVY)} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_import_changes_no_settings():
    program = (
        "import logging, random, numpy as np\n"
        "before = (len(logging.getLogger().handlers), random.getstate())\n"
        "state = np.random.get_state()[1].tolist()\n"
        "import scbin\n"
        "assert before[0] == len(logging.getLogger().handlers)\n"
        "assert before[1] == random.getstate()\n"
        "assert state == np.random.get_state()[1].tolist()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
