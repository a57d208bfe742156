from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import scbin
from scbin import ScbinInputError

HISTORY = pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.0]})


def test_history_from_model_adata_and_table(toy):
    toy.uns["scbin"] = {"pretrain_history": HISTORY}
    for source in (toy, SimpleNamespace(history=HISTORY), HISTORY):
        table = scbin.get.history_df(source)
        pd.testing.assert_frame_equal(table, HISTORY)
        table["loss"] = 0.0  # a copy
    assert HISTORY["loss"].tolist() == [2.0, 1.0]


def test_history_errors(toy):
    for source in (toy, 3, HISTORY[["step"]]):
        with pytest.raises(ScbinInputError, match="A06.*pretrain"):
            scbin.get.history_df(source)


@pytest.mark.parametrize("encoding", ["bins", "binary", "rank", "gene_bins"])
def test_tokens_say_what_was_encoded(toy, encoding):
    toy.obs.loc["cell1", "sex"] = np.nan
    before = toy.copy()
    scbin.pp.tokenize(toy, encoding=encoding, phenotypes=["cell_type", "sex"])
    table = scbin.get.tokens_df(toy, "cell1")
    assert table.equals(scbin.get.tokens_df(toy, 1)) and (toy.X != before.X).nnz == 0
    row = toy.obsm["X_tokens"][1]
    assert table["position"].tolist() == sorted(row.indices) and set(table["token_id"]) == set(row.data)
    named = table.set_index("name")
    assert named.loc["cell_type", "text"] == "[B cell]" and named.loc["sex", "text"] == "[NO_SEX]"
    genes = table[table["kind"] == "gene"].set_index("name")
    x = pd.Series(toy.X[1].toarray().ravel(), index=toy.var_names)
    assert set(genes.index) == set(x.index[x > 0]) and (genes["value"] > 0).all()
    if encoding == "rank":
        assert genes["rank"].tolist() == list(range(1, len(genes) + 1)) and genes["bin"].isna().all()
        assert (np.diff(genes["value"]) <= 0).all()
    else:
        assert genes["rank"].isna().all() and genes.groupby("bin")["value"].nunique().max() == 1
        ordered = genes.loc[x[genes.index].sort_values(kind="stable").index]
        assert (np.diff(ordered["bin"]) >= 0).all() and (np.diff(ordered["value"]) >= 0).all()


def test_tokens_errors(toy):
    with pytest.raises(ScbinInputError, match="tokenize"):
        scbin.get.tokens_df(toy)
    scbin.pp.tokenize(toy, key_added="X_other")
    assert len(scbin.get.tokens_df(toy, tokens_key="X_other"))
    for cell in (60, -61, "nobody"):
        with pytest.raises(ScbinInputError, match="A06"):
            scbin.get.tokens_df(toy, cell, tokens_key="X_other")


def test_evaluations_are_read_by_target(toy):
    with pytest.raises(ScbinInputError, match="A06.*so far: nothing"):
        scbin.get.evaluate_df(toy)
    rows = {"log_loss": [0.3, 1.0], "method": ["scbin", "mean"], "target": ["a", "b"], "accuracy": [0.9, np.nan]}
    toy.uns["scbin"] = {"evaluate": pd.DataFrame(rows)}
    assert set(scbin.get.evaluate_df(toy).columns) == {"target", "accuracy", "log_loss"}
    assert list(scbin.get.evaluate_df(toy, "b").columns) == ["log_loss"]
    with pytest.raises(ScbinInputError, match="A06.*so far: 'a', 'b'"):
        scbin.get.evaluate_df(toy, "c")
