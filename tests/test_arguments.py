from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scbin import _arguments
from scbin._errors import ScbinInputError, ScbinTypeError, count


@pytest.mark.parametrize(
    ("checker", "good", "bad"),
    [
        (_arguments.whole_numbers, [0, -3, np.int16(2)], [1.0, 1.5, "1", True, [1], np.float32(2)]),
        (_arguments.numbers, [0, 1.5, np.float32(2), np.int64(1), float("nan")], ["1", False, 1j, [1.0]]),
        (_arguments.flags, [True, False, np.True_], [0, 1, "yes", None]),
        (_arguments.texts, ["", "a"], [1, b"a", ["a"], Path("a")]),
        (_arguments.paths, ["a", Path("a")], [1, b"a", ["a"]]),
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
    _arguments.whole_numbers(optional=True, size=None)
    with pytest.raises(ScbinTypeError, match="size is None; pass a whole number[.]"):
        _arguments.whole_numbers(size=None)
    with pytest.raises(ScbinTypeError, match="or None"):
        _arguments.texts(optional=True, size=3)


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
