from __future__ import annotations

import numpy as np
import pytest

import scbin


@pytest.fixture(scope="module")
def judged():
    adata = scbin.datasets.perturbseq(15, 1200, 100, n_modules=3, seed=1)
    scbin.tl.fit_perturbations(adata, batch_key="batch")
    scbin.tl.evaluate_perturbations(adata)
    return adata


def test_response_has_a_dot_for_each_gene_but_the_target(judged):
    ax = scbin.pl.perturbation_response(judged, "GENE2", n_genes=4)
    assert len(ax.collections[0].get_offsets()) == 99 and ax.get_title(loc="left") == "GENE2"
    names = [text.get_text() for text in ax.texts]
    assert len(names) == 5 and "GENE2" not in names and names[0].startswith("r ")
    with pytest.raises(scbin.ScbinInputError, match="A06.*'GENE99'"):
        scbin.pl.perturbation_response(judged, "GENE99")


@pytest.mark.parametrize("metric", ["pearson", "retrieval", "relative_mse"])
def test_scores_have_a_row_for_each_method(judged, metric):
    ax = scbin.pl.perturbation_scores(judged, metric=metric)
    table = scbin.get.perturbations_df(judged, "evaluated", reproducible=True)
    rows = [label.get_text() for label in ax.get_yticklabels()]
    assert set(rows) == set(table["method"])
    means = table.groupby("method")[metric].mean()[rows].to_numpy()
    assert (np.diff(means) <= 1e-12).all() if metric == "relative_mse" else (np.diff(means) >= -1e-12).all()
    assert ("ceiling" in [text.get_text() for text in ax.texts]) == (metric == "pearson")


def test_pairs_are_shown_apart():
    adata = scbin.datasets.perturbseq(15, 3000, 100, n_modules=3, n_pairs=8, seed=1)
    scbin.tl.fit_perturbations(adata, batch_key="batch")
    scbin.tl.evaluate_perturbations(adata)
    ax = scbin.pl.perturbation_scores(adata)
    table = scbin.get.perturbations_df(adata, "evaluated", reproducible=True)
    methods = {kind: set(part["method"]) for kind, part in table.groupby("n_targets")}
    rows = [label.get_text() for label in ax.get_yticklabels()]
    n = len(methods[2])
    assert set(rows[:n]) == methods[2] and set(rows[n:]) == methods[1]
    assert "additive" in rows[:n] and "additive" not in rows[n:]


def test_retrieval_has_a_curve_for_each_method(judged):
    ax = scbin.pl.perturbation_retrieval(judged)
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert "scbin" in names and "no change" not in names
    for line in ax.lines[1:]:
        assert line.get_ydata()[-1] == 1 and (np.diff(line.get_ydata()) >= 0).all()


def test_refused(judged, toy):
    with pytest.raises(scbin.ScbinInputError, match="P02.*'pearson'"):
        scbin.pl.perturbation_scores(judged, metric="r2")
    with pytest.raises(scbin.ScbinInputError, match=r"A06.*evaluate_perturbations"):
        scbin.pl.perturbation_retrieval(toy)
