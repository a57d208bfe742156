from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest

import scbin.get
from scbin._errors import ScbinInputError, ScbinTypeError

HISTORY = pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.0]})


def test_from_model_adata_and_table(toy):
    toy.uns["scbin"] = {"pretrain_history": HISTORY}
    for source in (toy, SimpleNamespace(history=HISTORY), HISTORY):
        pd.testing.assert_frame_equal(scbin.get.history_df(source), HISTORY)


def test_is_a_copy():
    table = scbin.get.history_df(HISTORY)
    table["loss"] = 0.0
    assert HISTORY["loss"].tolist() == [2.0, 1.0]


def test_errors(toy):
    with pytest.raises(ScbinInputError, match=r"P05.*pretrain"):
        scbin.get.history_df(toy)
    with pytest.raises(ScbinTypeError, match="P06"):
        scbin.get.history_df(3)
    with pytest.raises(ScbinInputError, match="P07"):
        scbin.get.history_df(HISTORY[["step"]])
