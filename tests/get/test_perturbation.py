"""Tables of perturbations."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scbin
from scbin._errors import ScbinInputError

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
