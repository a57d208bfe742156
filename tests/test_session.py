"""`session_info` names scbin, what it builds on where that is loaded, and what the caller imported."""

from __future__ import annotations

import pandas as pd  # noqa: F401  it has to be listed
import torch

import scbin
from scbin._session import versions


def test_session_info_lists_what_the_caller_imported(capsys):
    scbin.session_info(os=False)
    lines = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines() if len(line.split()) > 1)
    assert lines["scbin"] == scbin.__version__ and {"pandas", "torch", "anndata", "numpy", "Python"} <= set(lines)
    assert "_pytest" not in lines and "show" not in globals()


def test_versions_are_one_line():
    assert f"scbin {scbin.__version__}, torch {torch.__version__}" in versions() and "\n" not in versions()
