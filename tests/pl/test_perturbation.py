"""Plots of perturbations: what they show, and that names can be read."""

from __future__ import annotations

import json

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import scbin
from scbin._errors import ScbinInputError
from scbin.pl._perturbation import displacements
from scbin.tl._perturb_statistics import Statistics, gene_statistics, summarise


def perturbed(*, goal: str | None = "IFN", n_genes: int = 120) -> ad.AnnData:
    """Synthetic cells in which the first five genes move cells to the goal, and the last three away from it."""
    rng = np.random.default_rng(0)
    values = 0.01 * rng.normal(size=(60, n_genes)) + 0.02 * rng.normal(size=n_genes)
    values[:, :5] += 1.2
    values[:, -3:] -= 1.2
    values = values if goal else np.abs(values)
    names = [f"G{i}" for i in range(n_genes)]
    expression = sparse.csr_matrix(rng.poisson(2, values.shape))
    exact, summary = rng.random(n_genes) < 0.5, summarise(sparse.csr_matrix(values), np.arange(60) % 6)
    how = {"limits": (-2.0, 2.0) if goal else (0.0, 2.0)}
    table = gene_statistics(summary, names, expression, Statistics("donor"), **how).assign(exact=exact)
    adata = ad.AnnData(np.zeros((2, n_genes), dtype=np.float32), var=pd.DataFrame(index=names))
    params = {"mode": "overexpress", "start": "control", "goal": goal} if goal else {"mode": "delete"}
    params["donor_key"] = "donor"
    adata.uns["scbin_perturb"] = {"table": table, "params": json.dumps(params)}
    return adata


def words(ax) -> list[str]:
    return [text.get_text() for text in ax.texts if text.get_text()]


def legend_of(ax) -> str:
    return " | ".join(text.get_text() for text in ax.get_legend().get_texts())


def boxes(ax) -> list:
    ax.figure.draw_without_rendering()
    return [text.get_window_extent() for text in ax.texts if text.get_text()]


# ---- ranking --------------------------------------------------------------------------------------------------------


def test_ranking_names_both_ends_in_order():
    ax = scbin.pl.perturbation(perturbed(), n_genes=3)
    assert set(words(ax)) >= {"G117", "G118", "G119"}
    assert len(set(words(ax)) & {f"G{i}" for i in range(5)}) == 3
    assert "control cells moved towards IFN" in ax.get_ylabel()
    assert "towards the goal: 5" in legend_of(ax) and "away from the goal: 3" in legend_of(ax)
    assert "open: screened" in legend_of(ax) and "95 % of matched genes" in legend_of(ax)
    assert ax.get_title(loc="left") == "Genes overexpressed in silico"


def test_ranking_of_lengths_names_the_longest_only():
    ax = scbin.pl.perturbation(perturbed(goal=None), n_genes=8)
    named = {f"G{i}" for i in (0, 1, 2, 3, 4, 117, 118, 119)}
    assert set(words(ax)) <= named and len(words(ax)) > 5  # those for which there is room
    assert "not significant: 120" in legend_of(ax) and "1 - cosine" in ax.get_ylabel()


def test_ranking_by_alignment():
    adata = perturbed()
    with pytest.raises(ScbinInputError, match="A06.*alignment"):
        scbin.pl.perturbation(adata, value="alignment")
    table = adata.uns["scbin_perturb"]["table"]
    adata.uns["scbin_perturb"]["table"] = table.assign(alignment=np.linspace(-0.5, 0.9, len(table)))
    ax = scbin.pl.perturbation(adata, value="alignment", n_genes=2)
    assert set(words(ax)) == {"G119", "G118", "G0", "G1"}
    assert ax.get_xlabel() == "genes, sorted by alignment" and "cosine" in ax.get_ylabel()
    assert "95 %" not in legend_of(ax)


@pytest.mark.parametrize("plot", [scbin.pl.perturbation, scbin.pl.perturbation_volcano])
@pytest.mark.parametrize("size", [(6.4, 4.2), (3.0, 2.4)])
def test_names_do_not_lie_on_each_other(plot, size):
    ax = plt.subplots(figsize=size, layout="constrained")[1]
    assert plot(perturbed(), n_genes=8, ax=ax) is ax
    found = boxes(ax)
    assert all(not a.overlaps(b) for i, a in enumerate(found) for b in found[i + 1 :])


@pytest.mark.parametrize("plot", [scbin.pl.perturbation, scbin.pl.perturbation_volcano])
def test_chosen_genes(plot):
    adata = perturbed()
    assert {"G50", "G2"} <= set(words(plot(adata, genes=["G50", "G2"])))
    with pytest.raises(ScbinInputError, match=r"A06.*'TP53'"):
        plot(adata, genes=["TP53"])


def test_axes_say_what_was_read_off():
    adata = perturbed()
    said = {
        "change of P(sex = male)": {"level": "phenotype", "state_key": "sex", "goal": "male"},
        "change of predicted sex": {"level": "phenotype", "state_key": "sex", "goal": None},
    }
    for text, params in said.items():
        adata.uns["scbin_perturb"]["params"] = json.dumps(params)
        assert scbin.pl.perturbation(adata).get_ylabel() == text


def test_few_genes_without_statistics():
    adata = ad.AnnData(np.zeros((2, 3), dtype=np.float32))
    table = pd.DataFrame({"gene": ["A", "$B_1$", "C"], "n_cells": 9, "shift": [0.1, 0.3, np.nan]})
    adata.uns["scbin_perturb"] = {"table": table, "params": "{}"}
    ax = scbin.pl.perturbation(adata)
    ax.figure.draw_without_rendering()
    assert sorted(words(ax)) == ["$B_1$", "A"]
    with pytest.raises(ScbinInputError, match=r"A06.*'effect_size'"):
        scbin.pl.perturbation_volcano(adata)
    table["shift"] = np.nan
    with pytest.raises(ScbinInputError, match="A06"):
        scbin.pl.perturbation(adata)


# ---- volcano --------------------------------------------------------------------------------------------------------


def test_volcano_shows_effect_p_value_and_line():
    adata = perturbed()
    ax = scbin.pl.perturbation_volcano(adata)
    table = scbin.get.perturb_df(adata)
    points = np.concatenate([dots.get_offsets() for dots in ax.collections])
    expected = np.column_stack([table["effect_size"], -np.log10(table["p_value"])])
    assert {tuple(row) for row in points.round(6)} == {tuple(row) for row in expected.round(6)}
    assert "donors as replicates" in ax.get_ylabel() and "FDR 0.05" in words(ax)
    named = set(words(ax)) - {"FDR 0.05"}
    assert named <= set(table["gene"][table["fdr"] < 0.05])

    params = json.dumps({"mode": "delete", "level": "expression"})
    affected = table.rename(columns={"gene": "affected"}).assign(perturbed="TF")
    adata.uns["scbin_perturb_of"] = {"table": affected, "params": params}
    ax = scbin.pl.perturbation_volcano(adata, key="scbin_perturb_of")
    assert "more: 5" in legend_of(ax) and "less: 3" in legend_of(ax)
    assert "log counts" in scbin.pl.perturbation(adata, key="scbin_perturb_of").get_ylabel()

    adata.uns["scbin_perturb"]["table"].loc[0, "p_value"] = 0.0
    assert np.isfinite(scbin.pl.perturbation_volcano(adata).get_ylim()).all()


# ---- map ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def flat():
    """Cells spread evenly over a square; the map is the embedding itself."""
    rng = np.random.default_rng(1)
    return rng.uniform(0, 10, size=(800, 2))


def test_arrows_point_where_the_cells_go(flat):
    for shift in ([1.0, 0.0], [0.0, -0.5], [0.3, 0.3]):
        places, steps = displacements(flat, flat + shift, flat)
        inside = ((places > 2) & (places < 8)).all(axis=1)
        mean = steps[inside].mean(axis=0)
        assert mean @ shift / np.linalg.norm(mean) / np.linalg.norm(shift) > 0.98
        assert 0.4 < np.linalg.norm(mean) / np.linalg.norm(shift) < 1.2


def test_cells_that_stay_have_no_arrow_and_others_do_not_matter(flat):
    some = np.arange(800)[:, None] < 50
    places, steps = displacements(flat, np.where(some, flat, np.nan), flat)
    np.testing.assert_array_equal(places, flat[:50])
    np.testing.assert_allclose(steps, 0, atol=1e-12)
    fewer = displacements(flat, np.where(some, flat + 0.4, np.nan), flat)[1]
    np.testing.assert_allclose(fewer, displacements(flat, flat + 0.4, flat)[1][:50])


@pytest.fixture
def shifted(embedded):
    rng = np.random.default_rng(2)
    embedded.obsm["X_umap_scbin"] = embedded.obsm["X_scbin"][:, :2].copy()
    embedded.obsm["X_scbin_perturbed"] = embedded.obsm["X_scbin"] + rng.normal(size=(60, 8)).astype(np.float32)
    embedded.obsm["X_scbin_perturbed"][:20] = np.nan
    return embedded


def test_map_draws_arrows_over_the_cells(shifted):
    shifted.obsm["X_scbin"] = shifted.obsm["X_scbin"][:, :2]
    shifted.obsm["X_scbin_perturbed"] = shifted.obsm["X_scbin_perturbed"][:, :2]
    ax = scbin.pl.perturbation_map(shifted, color="cell_type")
    from matplotlib.quiver import Quiver

    (quiver,) = [artist for artist in ax.collections if isinstance(artist, Quiver)]
    assert 0 < quiver.N
    assert "times the shift" in ax.get_xlabel()


def test_map_says_when_nothing_moves_and_what_is_missing(shifted):
    shifted.obsm["X_scbin"] = shifted.obsm["X_scbin"][:, :2]
    shifted.obsm["X_scbin_perturbed"] = shifted.obsm["X_scbin"].copy()
    assert "no cell moves" in scbin.pl.perturbation_map(shifted).get_xlabel()
    shifted.obsm["X_scbin_perturbed"] = np.zeros((60, 3), dtype=np.float32)
    with pytest.raises(ScbinInputError, match=r"A06.*\(60, 3\)"):
        scbin.pl.perturbation_map(shifted)
    shifted.obsm["X_mine_perturbed"] = shifted.obsm["X_scbin"].copy()
    assert "no cell moves" in scbin.pl.perturbation_map(shifted, key="mine_perturb").get_xlabel()
    del shifted.obsm["X_scbin_perturbed"]
    with pytest.raises(ScbinInputError, match=r"A06.*together"):
        scbin.pl.perturbation_map(shifted)


# ---- matrix ---------------------------------------------------------------------------------------------------------


def paired(rows) -> ad.AnnData:
    table = pd.DataFrame(rows, columns=["gene", "combined_minus_sum", "combined_minus_sum_fdr"])
    table["shift"] = 1 + table["combined_minus_sum"]
    adata = ad.AnnData(np.zeros((2, 2), dtype=np.float32))
    adata.uns["scbin_perturb"] = {"table": table, "params": json.dumps({"mode": "delete"})}
    return adata


def test_matrix_of_anchors_and_partners():
    ax = scbin.pl.perturbation_matrix(paired([("A,X", 0.3, 0.01), ("A,Y", -0.1, 0.9), ("B,X", 0.0, 0.9)]))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["A", "B"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["X", "Y"]
    values = ax.collections[0].get_array()
    np.testing.assert_allclose(np.ma.filled(values, np.nan).reshape(2, 2), [[0.3, -0.1], [0.0, np.nan]])
    np.testing.assert_array_equal(ax.collections[1].get_offsets(), [[0.5, 0.5]])
    assert ax.collections[0].get_clim() == (-0.3, 0.3)
    assert "ring: FDR < 0.05" in ax.get_xlabel()


def test_matrix_of_all_pairs_is_symmetric():
    ax = scbin.pl.perturbation_matrix(paired([("A,B", 0.3, 1.0), ("A,C", 0.1, 1.0), ("B,C", 0.2, 1.0)]), cmap="PuOr")
    values = np.ma.filled(ax.collections[0].get_array(), np.nan).reshape(3, 3)
    np.testing.assert_array_equal(values, values.T)
    assert np.isnan(np.diag(values)).all() and ax.get_xlabel() == ""
    assert ax.collections[0].get_cmap().name == "PuOr"


def test_matrix_refuses_what_cannot_be_read():
    with pytest.raises(ScbinInputError, match="A06"):
        scbin.pl.perturbation_matrix(perturbed())
