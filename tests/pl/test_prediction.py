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
from scbin.get import read_predicted
from scbin.pl import calibration, confusion, prediction, roc
from scbin.pl._prediction import NO_CLASS

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


def texts(labels):
    return [label.get_text() for label in labels]


def test_the_truth_of_predictions_under_another_name(adata):
    cells = adata.copy()
    cells.obs["mine"] = cells.obs["scbin_cell_type"]
    cells.obsm["mine_probability"] = cells.obsm["scbin_cell_type_probability"]
    entry = {"column": "mine", "asked": "cell_type", "classes": list(cells.obs["mine"].cat.categories)}
    cells.uns["scbin"] = {"predict": json.dumps({"mine": entry})}
    assert prediction(cells, "mine").get_ylabel() == "Cells by cell_type"
    del cells.obs["cell_type"]
    assert prediction(cells, "mine").get_ylabel() == "Cells by mine"


@pytest.mark.parametrize("name", PLOTS)
@pytest.mark.parametrize("n_classes", [2, 4, 20])
def test_every_plot_draws(name, n_classes):
    names = NAMES[:n_classes] if n_classes < 5 else [f"type {k}" for k in range(n_classes)]
    cells = predicted_cells(names)
    PLOTS[name](cells, "cell_type").figure.canvas.draw()
    own = plt.subplots()[1]
    assert PLOTS[name](cells, "cell_type", ax=own) is own


def test_confusion_against_scikit_learn(adata):
    ax = confusion(adata, "cell_type")
    found = read_predicted(adata, "cell_type")
    given = np.where(found.predicted < 0, 4, found.predicted)
    shown = ax.images[0].get_array()
    np.testing.assert_allclose(shown, confusion_matrix(found.truth, given, labels=range(5), normalize="true"))
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
    ax = roc(adata, "cell_type")
    found = read_predicted(adata, "cell_type")
    labels = texts(ax.get_legend().get_texts())
    for k, label in enumerate(labels):
        area = roc_auc_score(found.truth == k, found.probability[:, k])
        assert label.startswith(f"{area:.3f} ") and f"(n={(found.truth == k).sum()})" in label
    assert ax.get_xlabel() == "False positive rate" and ax.get_ylabel() == "True positive rate"


def test_calibration_against_scikit_learn(adata):
    ax = calibration(adata, "cell_type")
    found = read_predicted(adata, "cell_type")
    right = found.probability.argmax(1) == found.truth
    true, mean = calibration_curve(right, found.probability.max(1), n_bins=10)
    lines = [line.get_xydata() for line in ax.lines if len(line.get_xdata()) == len(true)]
    assert any(np.allclose(line, np.column_stack([mean, true])) for line in lines)
    assert len(ax.patches) == 10 and ax.get_xlabel() == "Mean predicted probability"


def test_prediction_has_a_band_of_each_class_right_and_sure_cells_first(adata):
    found = read_predicted(adata, "cell_type")
    ax = prediction(adata, "cell_type")
    for k, image in enumerate(ax.images):
        own = found.truth == k
        band, columns = image.get_array()[:, ::24], image.get_array().shape[1]
        assert band.shape == (own.sum(), 4) and columns == 96 and image.get_extent()[2:] == [k + 0.5, k - 0.5]
        right = found.predicted[own] == k
        first = band[: right.sum()]
        np.testing.assert_allclose(first[:, k], np.sort(found.probability[own][right, k])[::-1])
        np.testing.assert_allclose(np.sort(band[:, k]), np.sort(found.probability[own][:, k]))
    assert ax.get_ylabel() == "Cells by cell_type" and texts(ax.get_xticklabels())[1] == "T"
    cells = adata.copy()
    del cells.obs["cell_type"]
    assert prediction(cells, "cell_type").get_ylabel() == "Cells by scbin_cell_type"
    with pytest.raises(ScbinInputError, match="A06"):
        confusion(cells, "cell_type")


def test_errors(adata):
    cells = adata.copy()
    with pytest.raises(ScbinInputError, match="L01"):
        roc(cells[cells.obs["cell_type"] == "T"].copy(), "cell_type")
    del cells.obsm["scbin_cell_type_probability"]
    for plot in (roc, calibration, prediction):
        with pytest.raises(ScbinInputError, match="A06"):
            plot(cells, "cell_type")
    cells.obs["age"] = cells.obs["scbin_age"] = 1.0
    for plot in PLOTS.values():
        with pytest.raises(ScbinInputError, match="A03.*scatter"):
            plot(cells, "age")
    assert plt.get_fignums() == []  # nothing was opened in vain
