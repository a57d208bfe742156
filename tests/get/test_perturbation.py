"""Tables of perturbations, in our columns and in Geneformer's."""

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
    assert scbin.get.perturb_df(adata, sort_by="p_value", min_cells=0)["gene"].tolist() == ["C", "A", "D", "B"]
    assert scbin.get.perturb_df(adata, sort_by="gene", min_cells=0)["gene"].tolist() == GENES
    assert scbin.get.perturb_df(adata, sort_by=None, min_cells=7)["gene"].tolist() == ["C", "D"]
    frame["shift"] = 0
    assert table["shift"][2] == 0.3


def test_sorted_by_what_was_asked(table):
    """By alignment where there is a goal, else by effect size; genes of few cells, extreme by chance, are left out."""
    aligned = table.assign(alignment=[0.1, 0.99, 0.2, 0.7])
    assert scbin.get.perturb_df(cells(aligned, goal="b"))["gene"].tolist() == ["D", "C", "A"]
    table.loc[1, ["shift", "effect_size", "n_cells"]] = [9.0, 99.0, 2]
    assert scbin.get.perturb_df(cells(table))["gene"].tolist() == ["C", "A", "D"]
    assert scbin.get.perturb_df(cells(table), min_cells=2)["gene"].iloc[0] == "B"


def test_another_key_and_groups(table):
    both = pd.concat([table.assign(group="T cell"), table.assign(group="B/NK", shift=0.0)], ignore_index=True)
    adata = cells(both)
    adata.uns["mine"] = adata.uns.pop("scbin_perturb")
    frame = scbin.get.perturb_df(adata, key="mine", group="B/NK")
    assert len(frame) == 3 and (frame["shift"] == 0).all()
    with pytest.raises(ScbinInputError, match=r"A06.*'T cell', 'B/NK'"):
        scbin.get.perturb_df(adata, key="mine", group="monocyte")
    with pytest.raises(ScbinInputError, match=r"A06.*tl\.perturb"):
        scbin.get.perturb_df(adata)


@pytest.mark.parametrize(
    "wrong, code",
    [({"group": "T"}, "A06"), ({"sort_by": "nothing"}, "A06"), ({"style": "seed"}, "A02"), ({"min_cells": 1.5}, "A01")],
)
def test_what_is_not_there_is_named(table, wrong, code):
    with pytest.raises(ScbinInputError, match=code):
        scbin.get.perturb_df(cells(table), **wrong)


def test_geneformer_goal_state(table):
    table["shift_to_start"] = -0.1  # of no interest there
    table["shift_to_alternative"] = [0.0, np.nan, 0.1, 0.2]
    table["p_value_alternative"] = 0.5
    table["fdr_alternative"] = 0.9
    frame = scbin.get.perturb_df(cells(table, state_key="s", start="a", goal="b"), style="geneformer")
    assert list(frame.columns) == [
        *("Gene", "Gene_name", "Ensembl_ID", "Shift_to_goal_end", "Shift_to_alt_end_alternative"),
        *("Goal_end_vs_random_pval", "Alt_end_vs_random_pval_alternative", "Goal_end_FDR", "Alt_end_FDR_alternative"),
        *("N_Detections", "Sig"),
    ]
    assert frame["Gene"].tolist() == ["C", "A", "D"]
    assert frame["Sig"].tolist() == [1, 0, 0]
    assert frame.iloc[0][["Gene_name", "Ensembl_ID"]].tolist() == ["symC", "ENSG2"]
    assert frame["Shift_to_goal_end"][0] == 0.3


def test_geneformer_reports_cosines_without_a_goal(table):
    frame = scbin.get.perturb_df(cells(table), style="geneformer")
    assert frame["Test_avg_shift"].tolist() == pytest.approx([0.7, 0.9, 1.2])
    assert frame["N_Detections"].tolist() == [9, 6, 7]
    with pytest.raises(ScbinInputError, match=r"A03.*expression"):
        scbin.get.perturb_df(cells(table, level="expression"), style="geneformer")


def test_geneformer_gene_lists_have_shifts_only():
    table = pd.DataFrame({"gene": ["A,C"], "n_cells": [40], "shift": [0.5]})
    frame = scbin.get.perturb_df(cells(table, goal="b"), style="geneformer")
    assert frame.iloc[0].tolist() == ["A,C", "symA,symC", "ENSG0,ENSG2", 0.5, 40]


def test_geneformer_mixture_and_null(table):
    mixed = table[["gene", "n_cells", "shift"]].assign(
        impact=[True, False, True, False], impact_share=[0.6, np.nan, 1.0, 0.0]
    )
    frame = scbin.get.perturb_df(cells(mixed), style="geneformer")
    assert list(frame.columns[3:]) == ["Test_avg_shift", "Impact_component", "Impact_component_percent", "N_Detections"]
    assert frame["Gene"].tolist() == ["C", "A", "D"] and frame["Impact_component_percent"][0] == 100
    compared = table.assign(null_shift=0.05, difference=table["shift"] - 0.05, n_cells_null=3)
    frame = scbin.get.perturb_df(cells(compared), style="geneformer", min_cells=0)
    assert list(frame.columns[3:]) == [
        *("Test_avg_shift", "Null_avg_shift", "Test_vs_null_avg_shift", "Test_vs_null_pval", "Test_vs_null_FDR"),
        *("N_Detections_test", "N_Detections_null", "Sig"),
    ]


def test_geneformer_pairs_in_cosines():
    anchor, gene, both = 0.2, 0.3, 0.6
    shifts = {"anchor_shift": anchor, "gene_shift": gene, "sum_of_shifts": anchor + gene}
    shifts |= {"shift": both, "combined_minus_sum": both - anchor - gene}
    table = pd.DataFrame({"gene": ["A,B"], "n_cells": [8], **shifts})
    row = scbin.get.perturb_df(cells(table), style="geneformer").iloc[0]
    a, t, c = 1 - anchor, 1 - gene, 1 - both
    assert row["Sum_of_indiv_shifts"] == pytest.approx(1 - ((1 - a) + (1 - t)))
    assert row["Combo_minus_sum_shift"] == pytest.approx(c - row["Sum_of_indiv_shifts"])
    assert (row["Anchor_name"], row["Gene_name"]) == ("symA", "symB")


def test_geneformer_affected_genes():
    table = pd.DataFrame({"perturbed": "A", "affected": ["cell", "B", "C"], "shift": [0.1, 0.2, 0.3]})
    table = table.assign(sd=[0.01, 0.02, 0.03], n_cells=[30, 40, 50])
    frame = scbin.get.perturb_df(cells(table), style="geneformer", sort_by=None)
    assert frame["Affected"].tolist() == ["cell", "B", "C"]
    assert frame["Cosine_sim_mean"].tolist() == pytest.approx([0.9, 0.8, 0.7])
    assert frame["Affected_Ensembl_ID"].tolist() == ["cell", "ENSG1", "ENSG2"]
