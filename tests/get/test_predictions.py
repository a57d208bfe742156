"""Predictions beside the truth, and the tables made of them."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scbin._errors import ScbinInputError
from scbin.get.predictions import predicted_targets, read_predicted, true_values


@pytest.fixture
def adata():
    """Eight cells with predictions of a class and of a number."""
    obs = pd.DataFrame(
        {
            "cell_type": ["A", "A", "B", "B", "C", "unknown", "B", None],
            "scbin_cell_type": pd.Categorical(["A", "B", "B", "B", "A", "A", None, "B"], categories=["A", "B"]),
            "age": [30.0, 40.0, 50.0, np.nan, 20.0, 10.0, 15.0, 60.0],
            "scbin_age": [33.0, 40.0, 47.0, 1.0, 20.0, np.nan, 15.0, 60.0],
        },
        index=[f"c{i}" for i in range(8)],
    )
    adata = ad.AnnData(np.ones((8, 2)), obs=obs)
    p = np.tile([0.6, 0.4], (8, 1))
    p[6] = np.nan
    adata.obsm["scbin_cell_type_probability"] = p
    return adata


def test_classes_beside_the_truth(adata):
    found = read_predicted(adata, "cell_type")
    assert found.cells.tolist() == [0, 1, 2, 3, 4, 6] and found.classes == ("A", "B", "C")
    assert found.truth.tolist() == [0, 0, 1, 1, 2, 1] and found.predicted.tolist() == [0, 1, 1, 1, 0, -1]
    assert found.probability.shape == (6, 3) and (found.probability[:5, 2] == 0).all()
    assert np.isnan(found.probability[5]).all()


def test_subsets_keep_the_classes_of_the_model(adata):
    adata.uns["scbin"] = {"predict": json.dumps({"cell_type": {"classes": ["A", "B"], "kind": "class"}})}
    part = adata[adata.obs["scbin_cell_type"] == "B"].copy()
    part.obs["scbin_cell_type"] = part.obs["scbin_cell_type"].cat.remove_unused_categories()
    assert read_predicted(part, "cell_type").classes[:2] == ("A", "B")
    assert predicted_targets(part) == ["cell_type"]


def test_test_cells_where_there_are_any(adata):
    assert len(read_predicted(adata, "cell_type").cells) == 6
    adata.obs["scbin_split"] = pd.Categorical(["train", "test"] * 4)
    assert read_predicted(adata, "cell_type").cells.tolist() == [1, 3]
    assert len(read_predicted(adata, "cell_type", cells="all").cells) == 6


def test_what_is_not_there_is_said(adata):
    with pytest.raises(ScbinInputError, match="A06.*'tissue' was not predicted"):
        read_predicted(adata, "tissue")
    adata.var["scbin_tf"] = "yes"
    adata.uns["scbin"] = {"predict": json.dumps({"tf": {"column": "scbin_tf", "kind": "gene"}})}
    with pytest.raises(ScbinInputError, match="A06.*'tf' was not predicted for these cells"):
        read_predicted(adata, "tf")
    adata.obs["nobody"] = "unknown"
    with pytest.raises(ScbinInputError, match="L01"):
        read_predicted(adata, "cell_type", truth_key="nobody")
    del adata.obs["cell_type"]
    with pytest.raises(ScbinInputError, match="A06.*'cell_type' is not a column"):
        read_predicted(adata, "cell_type")
    with pytest.raises(ScbinInputError, match="A02"):
        read_predicted(adata, "age", cells="some")


def test_ages_are_cut_as_the_model_knows_them():
    column = pd.Series(["15-year-old human stage", "34-year-old stage", "20-40", "adult stage"])
    found = true_values(column, "age", "class", ("<20", "20-40"), 20)
    assert found.values[:3].tolist() == [0, 1, 1] and np.isnan(found.values[3]) and found.classes == ("<20", "20-40")
