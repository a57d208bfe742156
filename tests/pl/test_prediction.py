"""Pictures of predictions, drawn from slots written by hand."""

from __future__ import annotations

import json

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import confusion_matrix, roc_auc_score

import scbin.pl
from scbin._errors import ScbinInputError
from scbin.get._predicted import read_predicted
from scbin.pl._confusion import count_pairs
from scbin.pl._prediction import order_cells

PICTURES = ("confusion", "roc", "calibration", "prediction")
NAMES = ["_B/cell $x$", "T", "a name that is far too long for any axis and goes on", "NK"]


def predicted_cells(names=NAMES, n=120):
    rng = np.random.default_rng(0)
    codes = np.arange(n) % len(names)
    logits = rng.normal(size=(n, len(names))) + 2 * np.eye(len(names))[codes]
    probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    given = probability.argmax(axis=1)
    given[5] = -1  # the model abstained
    obs = pd.DataFrame({"cell_type": np.array(names, dtype=object)[codes]}, index=[f"c{i}" for i in range(n)])
    obs.loc["c7", "cell_type"] = "unknown"
    adata = ad.AnnData(np.ones((n, 2), dtype=np.float32), obs=obs)
    adata.obs["scbin_cell_type"] = pd.Categorical.from_codes(given, names)
    adata.obsm["scbin_cell_type_probability"] = probability.astype(np.float32)
    adata.uns["scbin"] = {"predict": json.dumps({"cell_type": {"classes": names, "kind": "class"}})}
    return adata


@pytest.fixture(scope="module")
def adata():
    return predicted_cells()


def texts(labels):
    return [label.get_text() for label in labels]


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("n_classes", [2, 4, 20])
def test_every_picture_draws(name, n_classes):
    names = NAMES[:n_classes] if n_classes < 5 else [f"type {k}" for k in range(n_classes)]
    ax = getattr(scbin.pl, name)(predicted_cells(names), "cell_type")
    ax.figure.canvas.draw()
    own = plt.subplots()[1]
    assert getattr(scbin.pl, name)(predicted_cells(names), "cell_type", ax=own, title="mine") is own
    assert own.get_title() == "mine"
    plt.close("all")


def test_confusion_against_scikit_learn(adata):
    found = read_predicted(adata, "cell_type")
    assert len(found.cells) == 119 and 7 not in found.cells
    given = np.where(found.predicted < 0, 4, found.predicted)
    np.testing.assert_array_equal(
        np.pad(count_pairs(found), ((0, 1), (0, 0))), confusion_matrix(found.truth, given, labels=range(5))
    )
    ax = scbin.pl.confusion(adata, "cell_type", write="count")
    assert texts(ax.get_yticklabels())[1] == "T  (30)"
    assert texts(ax.get_xticklabels())[-1] == "none given"
    shares = ax.images[0].get_array()
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    assert sum(int(text.get_text()) for text in ax.texts) == 119


def test_roc_areas_against_scikit_learn(adata):
    found = read_predicted(adata, "cell_type")
    ax = scbin.pl.roc(adata, "cell_type", classes=["NK", "T"])
    for text, place in zip(texts(ax.get_legend().get_texts()), (3, 1), strict=True):
        assert text.startswith(f"{roc_auc_score(found.truth == place, found.probability[:, place]):.3f}")
    with pytest.raises(ScbinInputError, match=r"E29.*'Q'"):
        scbin.pl.roc(adata, "cell_type", classes=["Q"])


def test_calibration_counts_every_cell(adata):
    ax = scbin.pl.calibration(adata, "cell_type", n_bins=5)
    assert sum(int(text.get_text()) for text in ax.texts) == 119
    assert all(0 <= y <= 1 for y in ax.lines[-1].get_ydata())


def test_prediction_orders_by_class_then_right_then_sure(adata):
    found = read_predicted(adata, "cell_type")
    order = order_cells(found)
    truth, given = found.truth[order], found.predicted[order]
    assert (np.diff(truth) >= 0).all()
    for k in range(4):
        right = given[truth == k] == k
        assert (np.diff(right.astype(int)) <= 0).all()
        best = found.probability[order][truth == k].max(axis=1)[right]
        assert (np.diff(best) <= 0).all()


def test_prediction_without_truth(adata):
    bare = adata.copy()
    del bare.obs["cell_type"]
    assert scbin.pl.prediction(bare, "cell_type").get_ylabel() == "cells, by the class given"
    with pytest.raises(ScbinInputError, match=r"E10.*truth_key"):
        scbin.pl.confusion(bare, "cell_type")


def test_numbers_are_drawn_against_the_truth(adata):
    adata = adata.copy()
    adata.obs["age"] = np.arange(120.0)
    adata.obs["scbin_age"] = np.append(np.nan, np.arange(119) + 2.0).astype(np.float32)
    ax = scbin.pl.prediction(adata, "age")
    assert "R² 1.00" in ax.get_title()
    assert len(ax.collections[0].get_offsets()) == 119
    with pytest.raises(ScbinInputError, match="E25"):
        scbin.pl.roc(adata, "age")


def test_numbers_without_a_truth_are_not_held_against_themselves(adata):
    bare = adata.copy()
    bare.obs["scbin_age"] = np.append(np.nan, np.arange(119) + 2.0).astype(np.float32)
    ax = scbin.pl.prediction(bare, "age")
    assert "no truth" in ax.get_title() and "R²" not in ax.get_title()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted age", "cells")
    assert sum(bar.get_height() for bar in ax.patches) == 119


def test_subsets_keep_the_classes_of_the_model(adata):
    part = adata[adata.obs["scbin_cell_type"].isin(["T"]).to_numpy()].copy()
    found = read_predicted(part, "cell_type")
    assert found.classes == tuple(NAMES)
    assert (found.predicted == 1).all()
    scbin.pl.prediction(part, "cell_type").figure.canvas.draw()


def test_labels_that_the_model_never_saw(adata):
    other = adata.copy()
    other.obs.loc["c0", "cell_type"] = "new"
    found = read_predicted(other, "cell_type")
    assert found.classes == (*NAMES, "new") and found.n_known == 4
    assert found.truth[0] == 4 and found.probability[0, 4] == 0
    scbin.pl.confusion(other, "cell_type").figure.canvas.draw()


def test_only_test_cells_where_there_are_any(adata):
    adata = adata.copy()
    adata.obs["scbin_split"] = pd.Categorical(np.where(np.arange(120) < 100, "train", "test"))
    assert len(read_predicted(adata, "cell_type").cells) == 20
    assert len(read_predicted(adata, "cell_type", cells="all").cells) == 119


def test_errors(adata):
    with pytest.raises(ScbinInputError, match=r"E11.*Predicted so far: 'cell_type'"):
        scbin.pl.confusion(adata, "sex")
    with pytest.raises(ScbinInputError, match="E12"):
        scbin.pl.confusion(adata, "cell_type", cells="test")
    without = adata.copy()
    del without.obsm["scbin_cell_type_probability"]
    scbin.pl.confusion(without, "cell_type")
    with pytest.raises(ScbinInputError, match="E26"):
        scbin.pl.calibration(without, "cell_type")
    one = adata[adata.obs["cell_type"] == "T"].copy()
    with pytest.raises(ScbinInputError, match="E28"):
        scbin.pl.roc(one, "cell_type")
