from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest

from scbin import _arguments
from scbin._errors import ScbinInputError, ScbinTypeError, count

if TYPE_CHECKING:
    import os


@_arguments.checked
def whole(size: int, other: int = 0) -> int:
    return size


@_arguments.checked
def maybe_whole(size: int | None, kind: Literal["a", "b"] | float = "a") -> int | None:
    return size


@_arguments.checked
def number(size: float, other: float = 0) -> float:
    return size


@_arguments.checked
def flag(size: bool, other: bool = False) -> bool:
    return size


@_arguments.checked
def text(size: str, other: str = "") -> str:
    return size


@_arguments.checked
def path(size: str | os.PathLike[str], other: str | os.PathLike[str] = "") -> str | os.PathLike[str]:
    return size


@dataclass(frozen=True)
class Config:
    size: int = 1
    other: int = 0

    def __post_init__(self):
        _arguments.check_fields(self)


WHOLE = ([0, -3, np.int16(2)], [1.0, 1.5, "1", True, [1], np.float32(2)])


@pytest.mark.parametrize(
    ("checker", "good", "bad"),
    [
        (whole, *WHOLE),
        (Config, *WHOLE),
        (number, [0, 1.5, np.float32(2), np.int64(1), float("nan")], ["1", False, 1j, [1.0]]),
        (_arguments.numbers, [0, 1.5, np.float32(2), np.int64(1), float("nan")], ["1", False, 1j, [1.0]]),
        (flag, [True, False, np.True_], [0, 1, "yes", None]),
        (text, ["", "a"], [1, b"a", ["a"], Path("a")]),
        (path, ["a", Path("a")], [1, b"a", ["a"]]),
    ],
)
def test_types(checker, good, bad):
    for value in good:
        checker(size=value)
    for value in bad:
        with pytest.raises(ScbinTypeError, match=r"\[A01\] size is .*pass ") as caught:
            checker(other=good[0], size=value)
        assert isinstance(caught.value, TypeError) and isinstance(caught.value, ValueError)


def test_none_passes_only_where_it_is_meant():
    assert maybe_whole(None) is None
    with pytest.raises(ScbinTypeError, match="size is None; pass a whole number[.]"):
        whole(None)
    with pytest.raises(ScbinTypeError, match="or None"):
        maybe_whole("3")


def test_numbers_become_pythons_and_choices_stand_beside_kinds():
    assert type(whole(np.int64(3))) is int and type(Config(np.int64(3)).size) is int
    assert maybe_whole(1, "b") == maybe_whole(1, 0.5) == 1
    with pytest.raises(ScbinTypeError, match="kind is 'c'.*pass 'a' or 'b' or a number"):
        maybe_whole(1, "c")


def test_choices():
    allowed = {"zeros": ("drop", "keep"), "age_groups": (10, 20, None)}
    _arguments.choices(allowed, zeros="keep", age_groups=None)
    for bad in ({"zeros": "dorp"}, {"zeros": None}, {"age_groups": True}, {"age_groups": "10"}, {"zeros": ["drop"]}):
        with pytest.raises(ScbinInputError, match="A02.*choose one of"):
            _arguments.choices(allowed, **bad)
    with pytest.raises(ScbinInputError, match=r"'x{50,}[.]{3}; choose"):
        _arguments.choices(allowed, zeros="x" * 10_000)


def test_counts_agree_with_their_nouns():
    assert [count(n, "cell") for n in (0, 1, 2, 1204)] == ["0 cells", "1 cell", "2 cells", "1,204 cells"]
    assert count(1, "cell has", "cells have") == "1 cell has"
