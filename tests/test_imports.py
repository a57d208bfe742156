"""The package keeps its shape: imports point down, there are no circles, importing stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "scbin"
FILES = sorted(SRC.rglob("*.py"))

BASE = {"_keys", "_errors", "_arguments", "_session"}
FACE = {"pp", "tl", "pl", "get", "datasets", "cli", "_adata", "_docs"}
# which subpackages and files each may import, beside itself and BASE
BELOW = {
    "_errors": set(),
    "_keys": set(),
    "_arguments": {"_errors"},
    "_session": set(),
    "_docs": set(),
    "tokens": set(),
    "nn": {"tokens"},
    "io": {"tokens", "nn"},
    "train": {"tokens", "nn", "io"},
    "model": {"tokens", "nn", "io", "train"},
    "_adata": {"tokens"},
    **{room: {"tokens", "nn", "io", "train", "model"} | FACE for room in ("pp", "tl", "pl", "get", "datasets", "cli")},
    "__main__": {"cli"},
    "__init__": {"tokens", "nn", "io", "train", "model"} | FACE,
}
HEAVY = {"torch", "transformers"}
WITHOUT_TORCH = {"pl", "get", "pp", "datasets", "tokens", "_adata", "_docs"} | BASE
WITHOUT_ANNDATA = {"tokens", "nn", "io", "train"}


def room_of(path: Path) -> str:
    return path.relative_to(SRC).with_suffix("").parts[0]


def named(path: Path) -> str:
    return str(path.relative_to(SRC))


def imported(path: Path, *, for_types: bool, in_functions: bool = True) -> set[str]:
    """Absolute names of all modules that a file imports."""
    names: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not for_types:
            continue
        if isinstance(node, ast.FunctionDef) and not in_functions:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        pending += ast.iter_child_nodes(node)
    return names


def rooms_imported(path: Path) -> set[str]:
    names = (name.split(".") for name in imported(path, for_types=False))
    rooms = {parts[1] for parts in names if parts[0] == "scbin" and len(parts) > 1}
    return {room for room in rooms if (SRC / room).is_dir() or (SRC / f"{room}.py").is_file()}


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_point_down(path: Path):
    room = room_of(path)
    allowed = BELOW[room] | {room} | (set() if room in BASE else BASE)
    upward = rooms_imported(path) - allowed
    assert not upward, f"{named(path)} ({room}) imports {sorted(upward)}; it may import {sorted(allowed)}"


def test_no_circles():
    """Modules, not only subpackages, can be put in an order in which each imports earlier ones only."""
    names = {
        ".".join(("scbin", *path.relative_to(SRC).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in FILES
    }
    edges = {}
    for name, path in names.items():
        found = imported(path, for_types=False, in_functions=False)
        targets = {target if target in names else target.rpartition(".")[0] for target in found}
        # a subpackage imports its modules; that these import it is no circle of their own making
        edges[name] = {target for target in targets & set(names) if names[target].name != "__init__.py"} - {name}
        edges[name] = set() if path.name == "__init__.py" else edges[name]
    while edges:
        free = {name for name, targets in edges.items() if not targets & set(edges)}
        assert free, f"these import each other in a circle: {sorted(edges)}"
        edges = {name: targets for name, targets in edges.items() if name not in free}


@pytest.mark.parametrize("path", FILES, ids=named)
def test_what_rooms_do_without(path: Path):
    if room_of(path) in WITHOUT_TORCH:
        assert not {name.split(".")[0] for name in imported(path, for_types=False, in_functions=False)} & HEAVY
    if room_of(path) in WITHOUT_ANNDATA and named(path) != "io/corpus.py":  # which is about AnnData files
        assert not {name.split(".")[0] for name in imported(path, for_types=True)} & {"anndata", "scanpy"}


@pytest.mark.parametrize("path", FILES, ids=named)
def test_files_are_one_subject(path: Path):
    assert len(path.read_text().splitlines()) <= 900


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
