"""Docstrings, codes of errors and the list of the API agree with the code."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest

import scbin
from scbin import _docs

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "scbin"
FILES = sorted(SRC.rglob("*.py"))
CODES = dict(re.findall(r"^\| ([A-Z]\d\d) \| ([^|]*) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M))
ROOMS = ("datasets", "get", "pl", "pp", "tl")
FUNCTIONS = [f"{room.__name__[6:]}.{name}" for room in (importlib.import_module(f"scbin.{name}") for name in ROOMS)
             for name in dir(room) if inspect.isfunction(getattr(room, name)) and not name.startswith("_")]  # fmt: skip
CONFIGS = ["Finetuning", "Loss", "Masking", "Network", "Statistics", "Tokenization", "Training"]
RAISERS = {name for name in scbin.__all__ if name.startswith("Scbin")} | {"warn"}


def public(name: str):
    found = scbin
    for part in name.split("."):
        found = getattr(found, part)
    return found


def sections(text: str) -> dict[str, list[str]]:
    """The lines of each section of a numpydoc docstring."""
    lines = inspect.cleandoc(text).splitlines()
    heads = [i for i in range(len(lines) - 1) if lines[i + 1] and set(lines[i + 1]) == {"-"}]
    stops = [*heads[1:], len(lines)][: len(heads)]
    return {lines[head].strip(): lines[head + 2 : stop] for head, stop in zip(heads, stops, strict=True)}


def entries(lines: list[str]) -> list[str]:
    return [line for line in lines if line and not line[0].isspace()]


# ---- docstrings --------------------------------------------------------------------------------------------------------


def test_every_public_name_is_there():
    assert set(scbin.__all__) <= set(dir(scbin))
    for name in [*FUNCTIONS, *scbin.__all__]:
        assert public(name) is not None, name
    with pytest.raises(AttributeError, match="has no attribute 'tokenize'"):
        scbin.tokenize  # noqa: B018
    assert scbin.__version__ == re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_documented(name):
    function = public(name)
    found = sections(function.__doc__)
    arguments = [
        {p.VAR_KEYWORD: "**", p.VAR_POSITIONAL: "*"}.get(p.kind, "") + p.name
        for p in inspect.signature(function).parameters.values()
    ]
    assert entries(found.get("Parameters", [])) == arguments
    assert "Returns" in found or "Yields" in found
    assert any(line.startswith(">>>") for line in found["Examples"])
    assert len(arguments) <= 17, "more belong into a configuration object"
    assert function.__doc__.splitlines()[0].endswith(".") and len(function.__doc__.splitlines()[0]) < 130


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_are_documented(name):
    kind = public(name)
    assert dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen
    found = sections(kind.__doc__)
    assert entries(found["Parameters"]) == [field.name for field in dataclasses.fields(kind) if field.init]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_everything_public_has_a_docstring_without_open_places(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body, "the file does not say what it is"
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            overload = any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list)
            nested = node.col_offset > 0 and isinstance(node, ast.FunctionDef)
            assert overload or nested or ast.get_docstring(node), f"{node.name} has no docstring"


def test_shared_entries_are_filled_in():
    for path in FILES:
        for name in re.findall(r"^[ \t]*\{([a-z_]+)\}[ \t]*$", path.read_text(), re.M):
            assert name in _docs.PARAMETERS, f"{path.name}: {{{name}}} is none of _docs.PARAMETERS"
    for name in FUNCTIONS:
        assert not _docs._PLACEHOLDER.search(public(name).__doc__), f"{name} lacks @_docs.shared"
    for text in _docs.PARAMETERS.values():
        assert "\n" not in text or max(map(len, text.splitlines())) <= 130


def test_shared_leaves_other_braces_alone():
    @_docs.shared
    def function():
        """A dict {seed}, {"a": 1}.

        Parameters
        ----------
        {seed}
        {unknown}
        """

    lines = inspect.getdoc(function).splitlines()
    assert lines[0] == 'A dict {seed}, {"a": 1}.' and lines[-1] == "{unknown}"
    assert lines[-3:-1] == ["seed", "    The same seed gives the same result."]
    assert _docs.shared(lambda: None).__doc__ is None


# ---- codes -------------------------------------------------------------------------------------------------------------


def calls_of_errors(path: Path) -> list[ast.Call]:
    """All places where one of scbin's errors or warnings is made."""
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call) and node.args)
    return [call for call in calls if getattr(call.func, "id", None) in RAISERS]


def test_every_code_is_a_kind_of_fault_and_every_kind_is_used():
    texts: set[str] = set()
    for path in FILES:
        for call in calls_of_errors(path):
            code = call.args[0]
            if isinstance(code, ast.Constant):
                assert code.value in CODES, f"{path.relative_to(SRC)}, line {call.lineno}: {code.value!r}"
        if path.name != "_errors.py":
            texts |= {
                str(node.value) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)
            }
    assert set(CODES) <= texts, f"nothing raises {sorted(set(CODES) - texts)}"


def test_docs_list_every_public_name():
    api = (ROOT / "docs" / "api.md").read_text()
    listed = set(re.findall(r"^   ([\w.]+)$", api, re.M))
    assert set(FUNCTIONS) | (set(scbin.__all__) - set(ROOMS)) <= listed
    for name in listed:
        module, _, attribute = name.rpartition(".")
        if name not in FUNCTIONS and module:
            assert hasattr(importlib.import_module(f"scbin.{module}"), attribute), name


def test_dependencies_are_in_the_constraints():
    names = re.findall(r'^    "([A-Za-z0-9_.-]+)[><=\[]', (ROOT / "pyproject.toml").read_text(), re.M)
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().split()}
    assert {name.lower().replace("_", "-") for name in names} <= pinned
