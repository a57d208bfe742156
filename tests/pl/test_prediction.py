"""Plots of predictions, of slots written by hand."""

from __future__ import annotations

import json

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, roc_auc_score

from scbin._errors import ScbinInputError
from scbin.get.predictions import read_predicted
from scbin.pl import calibration, confusion, prediction, roc
from scbin.pl._prediction import NO_CLASS, order_cells

PLOTS = {"confusion": confusion, "roc": roc, "calibration": calibration, "prediction": prediction}
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


@pytest.fixture
def numbered():
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"age": rng.normal(40, 10, 50)}, index=[f"c{i}" for i in range(50)])
    obs["scbin_age"] = obs["age"] + rng.normal(0, 3, 50)
    obs.loc["c4", "scbin_age"] = np.nan
    return ad.AnnData(np.ones((50, 2), dtype=np.float32), obs=obs)


def texts(labels):
    return [label.get_text() for label in labels]


@pytest.mark.parametrize("name", PLOTS)
@pytest.mark.parametrize("n_classes", [2, 4, 20])
def test_every_plot_draws(name, n_classes):
    names = NAMES[:n_classes] if n_classes < 5 else [f"type {k}" for k in range(n_classes)]
    cells = predicted_cells(names)
    PLOTS[name](cells, "cell_type").figure.canvas.draw()
    own = plt.subplots()[1]
    assert PLOTS[name](cells, "cell_type", ax=own, title="mine") is own and own.get_title() == "mine"


def test_confusion_against_scikit_learn(adata):
    ax = confusion(adata, "cell_type", normalize=None)
    found = read_predicted(adata, "cell_type")
    given = np.where(found.predicted < 0, 4, found.predicted)
    shown = ax.images[0].get_array()
    np.testing.assert_array_equal(shown, confusion_matrix(found.truth, given, labels=range(5)))
    assert texts(ax.get_xticklabels())[-1] == NO_CLASS and ax.get_xlabel() == "Predicted label"
    rows = texts(ax.get_yticklabels())
    assert rows[0] == f"_B/cell $x$ (n={(found.truth == 0).sum()})"
    assert f"accuracy {(found.truth == found.predicted).mean():.3f}" in ax.get_title()
    cells = adata.copy()
    cells.obs["scbin_split"] = np.where(np.arange(120) < 20, "test", "train")
    assert "19 cells" in confusion(cells, "cell_type").get_title()
    fractions = confusion(cells, "cell_type", cells="all").images[0].get_array()
    np.testing.assert_allclose(fractions[:4].sum(axis=1), 1)


def test_roc_areas_against_scikit_learn(adata):
    ax = roc(adata, "cell_type", classes=["T", "NK"])
    found = read_predicted(adata, "cell_type")
    labels = texts(ax.get_legend().get_texts())
    for label, k in zip(labels, (1, 3), strict=True):
        area = roc_auc_score(found.truth == k, found.probability[:, k])
        assert label.startswith(f"{area:.3f} ") and f"(n={(found.truth == k).sum()})" in label
    assert ax.get_xlabel() == "False positive rate" and ax.get_ylabel() == "True positive rate"


def test_calibration_against_scikit_learn(adata):
    ax = calibration(adata, "cell_type", n_bins=5)
    found = read_predicted(adata, "cell_type")
    right = found.probability.argmax(1) == found.truth
    true, mean = calibration_curve(right, found.probability.max(1), n_bins=5)
    lines = [line.get_xydata() for line in ax.lines if len(line.get_xdata()) == len(true)]
    assert any(np.allclose(line, np.column_stack([mean, true])) for line in lines)
    assert len(ax.patches) == 5 and ax.get_xlabel() == "Mean predicted probability"


def test_prediction_orders_by_class_then_right_then_sure(adata):
    found = read_predicted(adata, "cell_type")
    order = order_cells(found)
    truth, wrong = found.truth[order], (found.predicted != found.truth)[order]
    best = found.probability.max(axis=1)[order]
    assert (np.diff(truth) >= 0).all()
    for k in range(4):
        assert (np.diff(wrong[truth == k].astype(int)) >= 0).all()
        assert (np.diff(best[(truth == k) & ~wrong]) <= 0).all()
    assert prediction(adata, "cell_type").get_ylabel() == "Cells by true class"
    cells = adata.copy()
    del cells.obs["cell_type"]
    assert prediction(cells, "cell_type").get_ylabel() == "Cells by predicted class"
    with pytest.raises(ScbinInputError, match="A06"):
        confusion(cells, "cell_type")


def test_numbers_are_drawn_against_the_truth(numbered):
    ax = prediction(numbered, "age")
    points = ax.collections[0].get_offsets()
    known = numbered.obs["scbin_age"].notna()
    np.testing.assert_allclose(points, numbered.obs.loc[known, ["scbin_age", "age"]])
    assert ax.get_xlabel() == "Predicted age" and "R²" in ax.get_title()
    del numbered.obs["age"]
    ax = prediction(numbered, "age")
    assert sum(patch.get_height() for patch in ax.patches) == 49 and ax.get_ylabel() == "Cells"
    for plot in (confusion, roc, calibration):
        numbered.obs["age"] = 1.0
        with pytest.raises(ScbinInputError, match="A03"):
            plot(numbered, "age")


def test_errors(adata):
    cells = adata.copy()
    wrong = [
        ("A02", confusion, "normalize", "rows"),
        ("A06", roc, "classes", ["monocyte"]),
        ("A02", calibration, "n_bins", 0),
    ]
    for code, plot, name, value in wrong:
        with pytest.raises(ScbinInputError, match=code):
            plot(cells, "cell_type", **{name: value})
    with pytest.raises(ScbinInputError, match="L01"):
        roc(cells[cells.obs["cell_type"] == "T"].copy(), "cell_type")
    del cells.obsm["scbin_cell_type_probability"]
    for plot in (roc, calibration, prediction):
        with pytest.raises(ScbinInputError, match="A06"):
            plot(cells, "cell_type")
    assert plt.get_fignums() == []  # nothing was opened in vain
