"""Scores beside baselines, from predictions written by hand and from small models."""

from __future__ import annotations

import json
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

import scbin
from scbin._errors import ScbinInputError, ScbinInputWarning
from scbin.tl._expression import log_normalised


@pytest.fixture
def predicted(toy):
    """The toy cells with predictions that are right but for every tenth cell, and a split."""
    names = sorted(toy.obs["cell_type"].cat.categories)
    codes = toy.obs["cell_type"].astype(str).map(names.index).to_numpy()
    given = np.where(np.arange(60) % 10 == 0, (codes + 1) % 3, codes)
    probability = np.full((60, 3), 0.1)
    probability[np.arange(60), given] = 0.8
    toy.obs["scbin_cell_type"] = pd.Categorical.from_codes(given, names)
    toy.obsm["scbin_cell_type_probability"] = probability.astype(np.float32)
    toy.uns["scbin"] = {"predict": json.dumps({"cell_type": {"classes": names, "model": "m"}}), "model_id": "m"}
    toy.obs["scbin_split"] = pd.Categorical(np.array(["train", "validation", "test"])[np.arange(60) // 3 % 3])
    return toy


def test_scores_are_those_of_the_test_cells(predicted):
    table = scbin.tl.evaluate(predicted)
    assert list(table.index) == ["scbin", "majority class", "logistic regression", "PCA + kNN"]
    test = (predicted.obs["scbin_split"] == "test").to_numpy()
    truth, given = predicted.obs["cell_type"].astype(str), predicted.obs["scbin_cell_type"].astype(str)
    assert table.loc["scbin", "macro_f1"] == pytest.approx(f1_score(truth[test], given[test], average="macro"))
    assert (table["n_cells"] == test.sum()).all()
    assert table.loc["majority class", "accuracy"] == pytest.approx(1 / 3, abs=0.1)


def test_logistic_regression_learns_from_training_cells_alone(predicted):
    table = scbin.tl.evaluate(predicted, baselines="logistic regression")
    test = (predicted.obs["scbin_split"] == "test").to_numpy()
    counts = predicted.X.toarray()
    log1p = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    truth = predicted.obs["cell_type"].astype(str).to_numpy()
    expected = LogisticRegression(max_iter=2000).fit(log1p[~test], truth[~test]).predict(log1p[test])
    assert table.loc["logistic regression", "macro_f1"] == pytest.approx(
        f1_score(truth[test], expected, average="macro"), abs=1e-6
    )


def test_test_labels_teach_nothing(predicted):
    """Labels of test cells move scores, never what the simple methods answer."""
    before = scbin.tl.evaluate(predicted, baselines="PCA + kNN").loc["PCA + kNN"]
    test = (predicted.obs["scbin_split"] == "test").to_numpy()
    predicted.obs["cell_type"] = predicted.obs["cell_type"].astype(str)
    right = before["accuracy"]
    assert right > 0.9
    cycle = {"B cell": "T cell", "T cell": "monocyte", "monocyte": "B cell"}
    predicted.obs.loc[test, "cell_type"] = predicted.obs.loc[test, "cell_type"].map(cycle)
    assert scbin.tl.evaluate(predicted, baselines="PCA + kNN").loc["PCA + kNN", "accuracy"] < 0.1


def test_without_a_split_all_cells_are_scored_with_a_warning(predicted):
    del predicted.obs["scbin_split"]
    with pytest.warns(ScbinInputWarning, match="E16"):
        table = scbin.tl.evaluate(predicted)
    assert (table["n_cells"] == 60).all()
    assert table.loc["logistic regression", "accuracy"] > 0.9
    predicted.obs["donor"] = np.arange(60) // 15
    with pytest.warns(ScbinInputWarning, match="E16"):
        table = scbin.tl.evaluate(predicted, split_key="donor")
    assert table["scored_on"].iloc[0] == "60 cells, 4 folds by donor"


def test_reference_teaches_the_simple_methods(predicted, toy):
    reference = toy[:, ::-1].copy()
    reference.var_names = [*reference.var_names[:-5], *"abcde"]
    predicted.obs["truth"] = predicted.obs.pop("cell_type")  # the reference has its labels under the name of the target
    table = scbin.tl.evaluate(predicted, reference=reference, truth_key="truth")
    assert table.loc["logistic regression", "accuracy"] > 0.9
    reference.var_names = [f"other{i}" for i in range(40)]
    with pytest.raises(ScbinInputError, match="E23"):
        scbin.tl.evaluate(predicted, reference=reference, truth_key="truth")


def test_tables_are_kept_and_survive_writing(predicted, tmp_path):
    table = scbin.tl.evaluate(predicted)
    predicted.obs["age"] = np.arange(60.0)
    predicted.obs["scbin_age"] = (np.arange(60) + np.random.default_rng(0).normal(size=60)).astype(np.float32)
    predicted.uns["scbin"]["predict"] = json.dumps({"cell_type": {"classes": []}, "age": {"kind": "number"}})
    numbers = scbin.tl.evaluate(predicted, target="age")
    assert list(numbers.index) == ["scbin", "mean", "ridge on genes", "ridge on PCA"]
    assert numbers.loc["scbin", "r2"] > 0.99 > 0.2 > numbers.loc["mean", "r2"]
    again = scbin.tl.evaluate(predicted, target="cell_type")
    pd.testing.assert_frame_equal(table, again)
    predicted.write_h5ad(tmp_path / "a.h5ad")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr and anndata remark on formats to come
        predicted.write_zarr(tmp_path / "a.zarr")
        from_zarr = ad.read_zarr(tmp_path / "a.zarr")
    for read in (ad.read_h5ad(tmp_path / "a.h5ad"), from_zarr):
        pd.testing.assert_frame_equal(scbin.get.evaluate_df(read, "cell_type"), table, check_index_type=False)
    assert set(scbin.get.evaluate_df(predicted)["target"]) == {"cell_type", "age"}
    with pytest.raises(ScbinInputError, match=r"E15.*'sex'"):
        scbin.get.evaluate_df(predicted, "sex")


def test_gaps_are_predicted_less_true(predicted):
    adata = ad.AnnData(np.ones((4, 2)))
    adata.obs["years"], adata.obs["scbin_age"] = [30.0, 40.0, np.nan, 50.0], [33.0, np.nan, 1.0, 47.0]
    table = scbin.get.gap_df(adata, "age", truth_key="years")
    assert list(table.index) == ["0", "1", "3"]
    np.testing.assert_array_equal(table["gap"], [3, np.nan, -3])
    np.testing.assert_array_equal(table["z"], [1, np.nan, -1])
    with pytest.raises(ScbinInputError, match="E41"):
        scbin.get.gap_df(predicted, "cell_type")


def test_only_its_slot_changes(predicted, untouched):
    watch = untouched(predicted)
    scbin.tl.evaluate(predicted)
    watch.check(uns=["evaluate"])


def test_errors_write_nothing(predicted, untouched, trained):
    watch = untouched(predicted)
    bare = predicted.copy()
    del bare.obs["cell_type"]
    with pytest.raises(ScbinInputError, match=r"E10.*truth_key"):
        scbin.tl.evaluate(bare, target="cell_type")
    for arguments, code in (
        ({"target": "cell_type", "baselines": ["guess"]}, "E19"),
        ({"target": "cell_type", "f1": "micro"}, "E21"),
        ({"target": "cell_type", "split_key": "nothing"}, "I35"),
    ):
        with pytest.raises(ScbinInputError, match=code):
            scbin.tl.evaluate(predicted, **arguments)
    with pytest.raises(ScbinInputError, match=r"E22.*'cell_type', 'sex'|E22.*'sex', 'cell_type'"):
        scbin.tl.evaluate(predicted, trained[1])
    with pytest.raises(ScbinInputError, match=r"E22.*finetune"):
        scbin.tl.evaluate(predicted, trained[1], target="age")
    watch.check()


def test_hidden_genes_beside_their_frequencies(trained):
    adata, model = trained
    adata = adata.copy()
    table = scbin.tl.evaluate(adata, model, target="genes", gene_mask_prob=0.4, progress=False)
    assert list(table.index) == ["scbin", "most frequent bin", "most frequent bin per gene", "mean bin per gene"]
    assert table["n_genes"].nunique() == 1 and (table["n_genes"] > 4).all()
    # frequencies are the best constant answer on cells they were counted on, and a good one on others
    assert table.loc["most frequent bin per gene", "exact"] >= table.loc["mean bin per gene", "exact"] - 0.1
    order = np.random.default_rng(0).permutation(60)
    other = adata[order].copy()
    side = pd.Series(np.where(np.arange(60) % 2, "train", "test"), index=adata.obs_names)
    adata.obs["side"], other.obs["side"] = side, side.reindex(other.obs_names)
    with pytest.warns(ScbinInputWarning, match="E42"):
        tables = [
            scbin.tl.evaluate(each, model, target="genes", split_key="side", progress=False) for each in (adata, other)
        ]
    pd.testing.assert_frame_equal(*tables, atol=1e-5)


def test_log_normalised_reads_counts_and_logs(toy):
    counts = toy.X.toarray()
    expected = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    np.testing.assert_allclose(log_normalised(toy).toarray(), expected, rtol=1e-5)
    logs = toy.copy()
    logs.X = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4).astype(np.float32)
    np.testing.assert_allclose(log_normalised(logs).toarray(), expected, rtol=1e-5)
