from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from scbin._errors import ScbinInputError
from scbin.tl._perturb_nulls import matched_genes, median, spread
from scbin.tl._perturb_stats import average, benjamini_hochberg, gene_statistics, summarise

FIRST = ["gene", "n_cells", "n_donors", "shift", "effect_size", "ci_low", "ci_high", "p_value", "fdr", "exact"]


def made(values: np.ndarray, stored: np.ndarray | None = None) -> sparse.csr_matrix:
    """CSR in which zeros are kept where something is stored."""
    rows, columns = np.nonzero(np.ones_like(values, dtype=bool) if stored is None else stored)
    return sparse.csr_matrix((values[rows, columns], (rows, columns)), shape=values.shape)


def simulated(seed: int, *, n_donors: int = 6, gene_sd: float = 1.0, n_genes: int = 300, magnitude: bool = False):
    """Shifts in which no gene is special: each has an effect from one and the same normal distribution."""
    rng = np.random.default_rng(seed)
    donors = np.repeat(np.arange(n_donors), rng.integers(8, 30, n_donors))
    stored = rng.random((len(donors), n_genes)) < rng.uniform(0.3, 1, n_genes)
    values = gene_sd * rng.normal(size=n_genes) + 0.5 * rng.normal(size=(n_donors, n_genes))[donors]
    values = values + 2 * rng.normal(size=n_donors)[donors][:, None] + rng.normal(size=stored.shape)
    expression = made(rng.poisson(3, stored.shape) * stored)
    values = np.exp(0.3 * values) if magnitude else values
    return made(values, stored), expression, np.array([f"donor{d}" for d in donors], dtype=object)


def names_of(matrix: sparse.csr_matrix) -> list[str]:
    return [f"G{i}" for i in range(matrix.shape[1])]


# ---- means and their errors -----------------------------------------------------------------------------------------


def test_equal_donors_give_the_t_interval_of_their_means():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(40, 5)) + rng.normal(size=5)
    donors = np.repeat(np.arange(8), 5)
    replicates = summarise(made(values), donors)
    mean, error, freedom = average(replicates.mean, replicates.variance, replicates)
    per_donor = pd.DataFrame(values).groupby(donors).mean().to_numpy()
    oracle = stats.ttest_1samp(per_donor, 0)
    np.testing.assert_allclose(mean, per_donor.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(2 * stats.t.sf(np.abs(mean / error), freedom), oracle.pvalue, rtol=1e-9)


def test_random_effects_against_the_textbook_loop():
    """DerSimonian-Laird weights with Hartung-Knapp errors, one gene and one donor at a time."""
    rng = np.random.default_rng(1)
    donors = np.repeat(np.arange(5), [3, 12, 7, 30, 5])
    values = rng.normal(size=(57, 4)) + 2 * rng.normal(size=(5, 4))[donors]
    stored = rng.random(values.shape) < 0.8
    replicates = summarise(made(values, stored), donors)
    mean, error, _ = average(replicates.mean, replicates.variance, replicates)
    for gene in range(4):
        parts = [values[(donors == d) & stored[:, gene], gene] for d in range(5)]
        pooled = sum(((part - part.mean()) ** 2).sum() for part in parts) / sum(len(part) - 1 for part in parts)
        y, v = np.array([part.mean() for part in parts]), np.array([pooled / len(part) for part in parts])
        w = 1 / v
        q = (w * (y - (w * y).sum() / w.sum()) ** 2).sum()
        tau = max(0.0, (q - 4) / (w.sum() - (w**2).sum() / w.sum()))
        w = 1 / (v + tau)
        centre = (w * y).sum() / w.sum()
        assert mean[gene] == pytest.approx(centre, rel=1e-10)
        assert error[gene] == pytest.approx(np.sqrt((w * (y - centre) ** 2).sum() / (4 * w.sum())), rel=1e-10)


def test_cells_as_replicates_are_the_usual_mean_and_error():
    values = np.random.default_rng(2).normal(size=(30, 3))
    replicates = summarise(made(values), None)
    mean, error, _ = average(replicates.mean, replicates.variance, replicates)
    np.testing.assert_allclose(mean, values.mean(axis=0))
    np.testing.assert_allclose(error, stats.sem(values), rtol=1e-10)


def test_a_stored_zero_is_a_cell_and_nothing_stored_is_none():
    values = np.array([[0.0, 1.0], [2.0, 5.0], [4.0, 9.0]])
    stored = np.array([[True, True], [True, False], [False, True]])
    replicates = summarise(made(values, stored), None)
    assert replicates.n_cells.tolist() == [[2, 2]]
    assert replicates.mean.tolist() == [[1.0, 5.0]]
    table = gene_statistics(made(values, stored), names=["A", "B"], expression=made(values))
    assert table["n_cells"].tolist() == [2, 2]
    assert table["shift"].tolist() == [1.0, 5.0]


def test_donors_count_once_however_many_cells_they_have():
    """One donor with 500 cells that all say 1, and seven others that scatter about 0."""
    rng = np.random.default_rng(3)
    donors = np.concatenate([np.zeros(500), np.repeat(np.arange(1, 8), 5)]).astype(int)
    values = np.where(donors == 0, 1.0, 0.0)[:, None] + 0.01 * rng.normal(size=(535, 20))
    by_donor = gene_statistics(made(values), names=names_of(values), expression=made(values), donors=donors)
    by_cell = gene_statistics(made(values), names=names_of(values), expression=made(values))
    assert (by_donor["replicates"] == "donors").all() and (by_cell["replicates"] == "cells").all()
    assert by_donor["shift"].max() < 0.2 and by_cell["shift"].min() > 0.9
    assert (by_donor["n_donors"] == 8).all() and (by_cell["n_donors"] == 0).all()
    assert (by_donor["shift_low"] < 0).all() and (by_cell["shift_low"] > 0).all()


def test_cells_of_unknown_donors_are_left_out():
    values = np.random.default_rng(4).normal(size=(12, 8))
    donors = np.array(["a"] * 4 + ["b"] * 4 + ["unknown", "", None, np.nan], dtype=object)
    table = gene_statistics(made(values), names=names_of(values), expression=made(values), donors=donors)

    assert (table["n_cells"] == 8).all() and (table["n_donors"] == 2).all()
    with pytest.raises(ScbinInputError, match="P52"):
        gene_statistics(made(values), names=names_of(values), expression=made(values), donors=["unknown"] * 12)


# ---- null genes -----------------------------------------------------------------------------------------------------


def test_matched_genes_are_alike_and_never_the_gene_itself():
    rng = np.random.default_rng(5)
    expression = sparse.csr_matrix(rng.poisson(np.geomspace(0.02, 20, 200), (150, 200)))
    tested = rng.random(200) < 0.9
    others = matched_genes(expression, tested, n_null=20)
    assert not (others == np.arange(200)[:, None]).any()
    assert (others[~tested] == -1).all() and tested[others[tested]].all()
    assert all(len(set(row)) == 20 for row in others[tested])
    mean = np.asarray(expression.mean(axis=0)).ravel()
    rank = stats.rankdata(mean)
    away = np.abs(rank[others] - rank[:, None])[tested]
    assert np.median(away) < 25  # of 200


def test_equal_genes_are_drawn_at_random_by_seed():
    expression = sparse.csr_matrix((10, 300))
    tested = np.ones(300, dtype=bool)
    first, second = (matched_genes(expression, tested, n_null=10, seed=seed) for seed in (0, 1))
    assert (first != second).any()
    np.testing.assert_array_equal(first, matched_genes(expression, tested, n_null=10, seed=0))
    assert not (first == np.arange(300)[:, None]).any()


def test_chosen_null_genes_are_the_reference_without_the_gene_itself():
    rng = np.random.default_rng(6)
    values = rng.normal(size=(200, 40)) - 5.0
    values[:, :10] += 4.0
    names = names_of(values)
    table = gene_statistics(made(values), names=names, expression=made(values), null=names[:10])
    assert table["n_null"].tolist() == [9] * 10 + [10] * 30
    means = values.mean(axis=0)
    expected = (means[39] - np.median(means[:10])) / (
        1.4826 * np.median(np.abs((means[:10] - _without_self(means)) - np.median(means[:10] - _without_self(means))))
    )
    assert table["effect_size"].iloc[39] == pytest.approx(expected, rel=1e-6)
    assert (table["fdr"][10:] < 1e-3).all() and (table["fdr"][:10] > 0.05).all()
    with pytest.raises(ScbinInputError, match=r"P51.*'NONE'"):
        gene_statistics(made(values), names=names, expression=made(values), null=["G0", "NONE"])
    with pytest.raises(ScbinInputError, match="P50"):
        gene_statistics(made(values), names=names, expression=made(values), null="all")


def _without_self(means: np.ndarray) -> np.ndarray:
    return np.array([np.median(np.delete(means[:10], i)) for i in range(10)])


def test_hits_among_the_null_genes_do_not_hide_each_other():
    rng = np.random.default_rng(7)
    values = rng.normal(scale=0.1, size=(100, 200)) + rng.normal(scale=0.2, size=200)
    hits = np.arange(0, 200, 10)
    values[:, hits] += 3.0
    expression = sparse.csr_matrix(rng.poisson(2, values.shape))
    table = gene_statistics(made(values), names=names_of(values), expression=expression, donors=np.arange(100) % 5)
    assert (table["fdr"][hits] < 0.01).all()
    assert (table["fdr"].drop(hits) < 0.05).sum() <= 3
    assert table["effect_size"][hits].min() > 8
    assert (table["shift"][hits] > table["null_high"][hits]).all()


def test_median_and_spread_without_missing_values():
    rng = np.random.default_rng(8)
    values = rng.normal(size=(6, 31))
    values[rng.random(values.shape) < 0.3] = np.nan
    values[5] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_allclose(median(values), np.nanmedian(values, axis=1))
    oracle = [stats.median_abs_deviation(row[np.isfinite(row)], scale=1 / 1.4826) for row in values[:5]]
    np.testing.assert_allclose(spread(values)[:5], oracle, rtol=1e-9)
    assert np.isnan(spread(values)[5])
    assert spread(np.array([[0.0, 0, 0, 0, 6]]))[0] == pytest.approx(np.std([0, 0, 0, 0, 6], ddof=1))


# ---- p values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gene_sd", "n_donors", "use_donors", "magnitude"),
    [
        pytest.param(1.0, 6, True, False, id="genes_differ"),
        pytest.param(0.0, 6, True, False, id="only_noise"),
        pytest.param(1.0, 3, True, False, id="three_donors"),
        pytest.param(1.0, 6, False, False, id="cells"),
        pytest.param(1.0, 6, True, True, id="lengths"),
    ],
)
def test_p_values_are_uniform_where_no_gene_is_special(gene_sd, n_donors, use_donors, magnitude):
    p_values, ranks, n_false = [], [], 0
    for seed in range(5):
        shifts, expression, donors = simulated(seed, gene_sd=gene_sd, n_donors=n_donors, magnitude=magnitude)
        table = gene_statistics(
            shifts, names=names_of(shifts), expression=expression, donors=donors if use_donors else None
        )
        p_values.append(table["p_value"])
        ranks.append(table["permutation_p_value"])
        n_false += int((table["fdr"] < 0.05).sum())
    p_values, ranks = np.concatenate(p_values), np.concatenate(ranks)
    assert stats.kstest(p_values, "uniform").statistic < 0.1
    assert np.mean(p_values < 0.05) < 0.08 and np.mean(p_values < 0.005) < 0.015
    assert np.mean(ranks <= 0.05) == pytest.approx(0.05, abs=0.025)
    assert n_false <= 5


def test_benjamini_hochberg_by_formula():
    rng = np.random.default_rng(9)
    p_values = rng.random(50) ** 3
    np.testing.assert_allclose(benjamini_hochberg(p_values), stats.false_discovery_control(p_values), rtol=1e-12)
    gaps = np.insert(p_values, [3, 20], np.nan)
    known = np.isfinite(gaps)
    np.testing.assert_allclose(benjamini_hochberg(gaps)[known], stats.false_discovery_control(p_values))
    assert np.isnan(benjamini_hochberg(gaps)[~known]).all()
    assert benjamini_hochberg(np.array([np.nan])).shape == (1,)


def test_order_of_cells_and_donor_names_do_not_matter():
    shifts, expression, donors = simulated(11)
    order = np.random.default_rng(0).permutation(len(donors))
    first = gene_statistics(shifts, names=names_of(shifts), expression=expression, donors=donors)
    second = gene_statistics(
        shifts[order], names=names_of(shifts), expression=expression[order], donors=[f"z{d}" for d in donors[order]]
    )
    pd.testing.assert_frame_equal(first, second, rtol=1e-9)


# ---- what is missing ------------------------------------------------------------------------------------------------


def test_few_cells_and_donors_give_no_p_value_and_say_why():
    rng = np.random.default_rng(10)
    stored = np.ones((20, 12), dtype=bool)
    stored[:, 0] = False
    stored[1:, 1] = False
    stored[:, 2] = np.arange(20) < 5
    donors = np.repeat(["a", "b", "c", "d"], 5)
    shifts = made(rng.normal(size=stored.shape), stored)
    table = gene_statistics(shifts, names=names_of(stored), expression=made(stored.astype(float)), donors=donors)
    assert table["note"].tolist()[:3] == [
        "perturbed in no cell of a known donor",
        "one donor only: no scatter to judge by",
        "one donor only: no scatter to judge by",
    ]
    assert table["p_value"][:3].isna().all() and (table["note"][3:] == "").all()
    assert table["n_cells"].tolist()[:3] == [0, 1, 5] and np.isnan(table["shift"][0])
    few = gene_statistics(shifts[:, 3:7], names=list("ABCD"), expression=shifts[:, 3:7])
    assert few["p_value"].isna().all() and few["shift_low"].notna().all()
    assert (few["note"] == "fewer than 5 genes to compare with").all()


def test_nothing_varies():
    table = gene_statistics(made(np.zeros((9, 8))), names=list("ABCDEFGH"), expression=made(np.ones((9, 8))))
    assert (table["shift"] == 0).all() and table["p_value"].isna().all() and (table["note"] == "nothing varies").all()


def test_missing_shifts_are_not_counted():
    values = np.random.default_rng(12).normal(size=(15, 9))
    values[0] = np.nan
    table = gene_statistics(made(values), names=names_of(values), expression=made(np.ones_like(values)))
    np.testing.assert_allclose(table["shift"], values[1:].mean(axis=0))
    assert (table["n_cells"] == 14).all()


def test_columns_types_and_serialisation(tmp_path):
    import anndata as ad

    shifts, expression, donors = simulated(13, n_genes=30)
    exact = np.arange(30) < 4
    table = gene_statistics(shifts, names=names_of(shifts), expression=expression, donors=donors, exact=exact)
    assert list(table.columns[: len(FIRST)]) == FIRST
    assert table["exact"].tolist() == exact.tolist()
    assert all(table[name].dtype == np.float64 for name in ("shift", "effect_size", "p_value", "fdr", "null_low"))
    adata = ad.AnnData(np.zeros((2, 2)), uns={"scbin_perturb": {"table": table}})
    adata.write_h5ad(tmp_path / "a.h5ad")
    again = ad.read_h5ad(tmp_path / "a.h5ad").uns["scbin_perturb"]["table"]
    pd.testing.assert_frame_equal(table, again, check_dtype=False, check_index_type=False, check_column_type=False)


def test_what_does_not_fit_is_refused():
    values = made(np.ones((4, 3)))
    with pytest.raises(ScbinInputError, match="P53"):
        gene_statistics(values, names=["A"], expression=values)
    with pytest.raises(ScbinInputError, match="P53"):
        gene_statistics(values, names=list("ABC"), expression=values, donors=["a"])
    with pytest.raises(ScbinInputError, match="P54"):
        gene_statistics(values, names=list("ABC"), expression=values, level=95)
