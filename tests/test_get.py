"""`get`: what scbin left in an AnnData, as tables."""

from __future__ import annotations

import json
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scbin
from scbin._errors import ScbinInputError
from scbin.get import predicted_targets, read_predicted, true_values

# ---- tokens, history, scores, networks -------------------------------------------------------------------------------


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


# ---- predictions beside the truth ------------------------------------------------------------------------------------


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
    p = np.where((obs["scbin_cell_type"] == "B").to_numpy()[:, None], [0.4, 0.6], [0.6, 0.4])
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


# ---- in silico perturbations -----------------------------------------------------------------------------------------


GENES = ["A", "B", "C", "D"]


def cells(table: pd.DataFrame, **params) -> ad.AnnData:
    names = {"ensembl_id": [f"ENSG{i}" for i in range(4)], "gene_symbol": [f"sym{g}" for g in GENES]}
    var = pd.DataFrame(names, index=GENES)
    adata = ad.AnnData(np.zeros((3, 4), dtype=np.float32), var=var)
    adata.uns["scbin_perturb"] = {"table": table, "params": json.dumps(params)}
    return adata


@pytest.fixture
def table():
    shifts = {"shift": [0.1, np.nan, 0.3, -0.2], "effect_size": [1.0, np.nan, 3.0, -2.0]}
    judged = {"p_value": [0.04, np.nan, 0.001, 0.5], "fdr": [0.06, np.nan, 0.003, 0.5]}
    return pd.DataFrame({"gene": GENES, "n_cells": [6, 0, 9, 7], "n_donors": 0, **shifts, **judged, "exact": True})


def test_sorted_copies(table):
    adata = cells(table)
    frame = scbin.get.perturb_df(adata)
    assert frame["gene"].tolist() == ["C", "A", "D"]
    assert frame.index.tolist() == [0, 1, 2]
    assert scbin.get.perturb_df(adata, min_cells=0)["gene"].tolist() == ["C", "A", "D", "B"]
    frame["shift"] = 0
    assert table["shift"][2] == 0.3


def test_sorted_by_what_was_asked(table):
    """By alignment where there is a goal, else by effect size; genes of few cells, extreme by chance, are left out."""
    aligned = table.assign(alignment=[0.1, 0.99, 0.2, 0.7])
    assert scbin.get.perturb_df(cells(aligned, goal="b"))["gene"].tolist() == ["D", "C", "A"]
    table.loc[1, ["shift", "effect_size", "n_cells"]] = [9.0, 99.0, 2]
    assert scbin.get.perturb_df(cells(table))["gene"].tolist() == ["C", "A", "D"]
    assert scbin.get.perturb_df(cells(table), min_cells=2)["gene"].iloc[0] == "B"


def test_another_key(table):
    adata = cells(table)
    adata.uns["mine"] = adata.uns.pop("scbin_perturb")
    assert len(scbin.get.perturb_df(adata, key="mine")) == 3
    with pytest.raises(ScbinInputError, match=r"A06.*tl\.perturb"):
        scbin.get.perturb_df(adata)
    with pytest.raises(ScbinInputError, match="A01"):
        scbin.get.perturb_df(adata, key="mine", min_cells=1.5)


@pytest.mark.parametrize("kind", ["gene", "goal", "impact", "difference", "pairs", "affected"])
def test_under_the_names_of_geneformer(table, kind):
    params = {"goal": "b"} if kind == "goal" else {}
    if kind == "goal":
        table = table.assign(shift_to_start=-0.1, **{"shift_to_a c": 0.2, "p_value_a c": 0.5, "fdr_a c": 0.9})
        expected = {
            "Shift_to_goal_end": 0.3,
            "Goal_end_vs_random_pval": 0.001,
            "Goal_end_FDR": 0.003,
            "N_Detections": 9,
        }
        expected |= {"Shift_to_alt_end_a c": 0.2, "Alt_end_vs_random_pval_a c": 0.5, "Alt_end_FDR_a c": 0.9, "Sig": 1}
    elif kind == "difference":
        table = table.assign(null_shift=0.05, difference=table["shift"] - 0.05, n_cells_null=3)
        expected = {"Test_avg_shift": 0.3, "Null_avg_shift": 0.05, "Test_vs_null_avg_shift": 0.25, "Sig": 1}
        expected |= {
            "Test_vs_null_pval": 0.001,
            "Test_vs_null_FDR": 0.003,
            "N_Detections_test": 9,
            "N_Detections_null": 3,
        }
    elif kind == "impact":
        table = table.assign(impact=[True, False, True, False], impact_share=[0.6, np.nan, 1.0, 0.0])
        expected = {"Test_avg_shift": 0.7, "Impact_component": 1, "Impact_component_percent": 100, "N_Detections": 9}
    elif kind == "pairs":
        shifts = {"anchor_shift": 0.2, "gene_shift": 0.3, "shift": 0.6, "combined_minus_sum": 0.1}
        table = pd.DataFrame({"gene": ["A,C"], "n_cells": [9], **shifts})
        expected = {"Anchor": "A", "Anchor_name": "A", "Anchor_Ensembl_ID": "ENSG0", "Anchor_shift": 0.8}
        expected |= {"Test_token_shift": 0.7, "Sum_of_indiv_shifts": 1 - ((1 - 0.8) + (1 - 0.7)), "Combo_shift": 0.4}
        expected |= {"Combo_minus_sum_shift": 0.4 - (1 - ((1 - 0.8) + (1 - 0.7))), "N_Detections": 9}
    elif kind == "affected":
        table = pd.DataFrame({"perturbed": ["B,D"], "affected": ["C"], "n_cells": [9], "shift": [0.3]})
        expected = {"Perturbed": "B,D", "Gene_name": "B,D", "Ensembl_ID": "ENSG1,ENSG3", "Affected": "C"}
        expected |= {
            "Affected_gene_name": "C",
            "Affected_Ensembl_ID": "ENSG2",
            "Cosine_sim_mean": 0.7,
            "N_Detections": 9,
        }
    else:
        expected = {"Test_avg_shift": 0.7, "N_Detections": 9}
    if kind != "affected":
        expected |= {"Gene": "C", "Gene_name": "C", "Ensembl_ID": "ENSG2"}
    row = scbin.get.perturb_df(cells(table, **params), style="geneformer").iloc[0].to_dict()
    assert row == {name: value if isinstance(value, str) else pytest.approx(value) for name, value in expected.items()}
    with pytest.raises(ScbinInputError, match=r"A03.*expression"):
        scbin.get.perturb_df(cells(table, level="expression"), style="geneformer")
