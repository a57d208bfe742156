"""Statistics of shifts against scipy and textbook loops, and p values that are uniform where there is nothing to find."""

from __future__ import annotations

import json
from math import comb

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

import scbin
from scbin._errors import ScbinInputError
from scbin.tl._perturb_statistics import (
    Statistics,
    false_discovery_rates,
    fit_null,
    mixture,
    null_genes,
    pair_statistics,
    permutation_p_values,
    permuted_labels,
    permuted_means,
    summarise,
    vs_null,
)
from scbin.tl._perturb_statistics import gene_statistics as statistics_of


def gene_statistics(shifts, *, names, expression, donors=None, statistics=None, limits=None):
    """The table of shifts of cells."""
    judged = statistics or Statistics(donor_key=None if donors is None else "donor")
    limits = limits or ((-2.0, 2.0) if np.nanmin(shifts.data) < 0 else (0.0, 2.0))
    return statistics_of(summarise(shifts, donors), names, expression, judged, limits=limits)


COLUMNS = ["gene", "n_cells", "n_donors", "shift", "shift_low", "shift_high", "effect_size", "ci_low", "ci_high"]
COLUMNS += ["p_value", "fdr", "null_low", "null_high"]


def made(values: np.ndarray, stored: np.ndarray | None = None) -> sparse.csr_matrix:
    """CSR in which zeros are kept where something is stored."""
    rows, columns = np.nonzero(np.ones_like(values, dtype=bool) if stored is None else stored)
    return sparse.csr_matrix((values[rows, columns], (rows, columns)), shape=values.shape)


def names_of(matrix) -> list[str]:
    return [f"G{i}" for i in range(matrix.shape[1])]


def simulated(seed: int, *, n_donors: int = 6, tail: float = 1000, n_genes: int = 300, lengths: bool = False):
    """Shifts in which no gene is special: each has an effect from one and the same distribution, light- or heavy-tailed."""
    rng = np.random.default_rng(seed)
    donors = np.repeat(np.arange(n_donors), rng.integers(8, 30, n_donors))
    stored = rng.random((len(donors), n_genes)) < rng.uniform(0.3, 1, n_genes)
    values = rng.standard_t(tail, n_genes) + 0.5 * rng.normal(size=(n_donors, n_genes))[donors]
    values = values + 2 * rng.normal(size=n_donors)[donors][:, None] + rng.normal(size=stored.shape)
    expression = made(rng.poisson(3, stored.shape) * stored)
    values = np.exp(0.3 * values) if lengths else values
    return (
        made(values / np.abs(values).max(), stored),
        expression,
        np.array([f"donor{d}" for d in donors], dtype=object),
    )


# ---- means and their errors -----------------------------------------------------------------------------------------


def test_equal_donors_give_the_t_interval_of_their_means():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(40, 5)) + rng.normal(size=5)
    donors = np.repeat(np.arange(8), 5)
    how = {"expression": made(values), "donors": donors, "limits": (-np.inf, np.inf)}
    table = gene_statistics(made(values), names=list("ABCDE"), **how)
    per_donor = pd.DataFrame(values).groupby(donors).mean().to_numpy()
    np.testing.assert_allclose(table["shift"], per_donor.mean(axis=0), rtol=1e-12)
    truth = stats.ttest_1samp(per_donor, 0).confidence_interval()
    np.testing.assert_allclose(table[["shift_low", "shift_high"]].T, [truth.low, truth.high], rtol=1e-9)


def test_a_stored_zero_is_a_cell_and_nothing_stored_is_none():
    values = np.array([[0.0, 0.1], [0.2, 0.5], [0.4, np.nan], [0.0, 0.9]])
    stored = np.array([[True, True], [True, False], [False, True], [False, True]])
    table = gene_statistics(made(values, stored), names=["A", "B"], expression=made(np.ones((4, 2))))
    assert table["n_cells"].tolist() == [2, 2] and table["shift"].tolist() == pytest.approx([0.1, 0.5])


def test_donors_count_once_however_many_cells_they_have():
    """One donor with 500 cells that all say 0.5, and seven others that scatter about 0."""
    rng = np.random.default_rng(3)
    donors = np.concatenate([np.zeros(500), np.repeat(np.arange(1, 8), 5)]).astype(int)
    values = np.where(donors == 0, 0.5, 0.0)[:, None] + 0.01 * rng.normal(size=(535, 20))
    by_donor = gene_statistics(made(values), names=names_of(values), expression=made(values), donors=donors)
    by_cell = gene_statistics(made(values), names=names_of(values), expression=made(values))
    assert by_donor["shift"].max() < 0.1 and by_cell["shift"].min() > 0.45
    assert (by_donor["n_donors"] == 8).all() and (by_cell["n_donors"] == 0).all()
    assert (by_donor["shift_low"] < 0).all() and (by_cell["shift_low"] > 0).all()


def test_cells_of_unknown_donors_are_left_out():
    values = 0.1 * np.random.default_rng(4).normal(size=(12, 8))
    donors = np.array(["a"] * 4 + ["b"] * 4 + ["unknown", "", None, np.nan], dtype=object)
    table = gene_statistics(made(values), names=names_of(values), expression=made(values), donors=donors)
    assert (table["n_cells"] == 8).all() and (table["n_donors"] == 2).all()
    with pytest.raises(ScbinInputError, match="P02"):
        gene_statistics(made(values), names=names_of(values), expression=made(values), donors=["unknown"] * 12)


@pytest.mark.parametrize("limits", [(0.0, 2.0), (-2.0, 2.0), (-1.0, 1.0), (0.0, np.inf)])
def test_intervals_stay_within_the_limits(limits):
    """Even of three cells that scatter from one limit to the other, and narrow ones are those of scipy."""
    rng = np.random.default_rng(0)
    low, high = max(limits[0], -2.0), min(limits[1], 2.0)
    wide = rng.uniform(low, high, size=(3, 20))
    wide[:, :3] = [low, high, low]
    table = gene_statistics(made(wide), names=names_of(wide), expression=made(np.ones((3, 20))), limits=limits)
    assert (table["shift_low"] >= limits[0]).all() and (table["shift_high"] <= limits[1]).all()
    assert (table["shift_low"] <= table["shift"]).all() and (table["shift"] <= table["shift_high"]).all()
    narrow = 0.5 + 1e-4 * rng.normal(size=(30, 20))
    table = gene_statistics(made(narrow), names=names_of(narrow), expression=made(np.ones((30, 20))), limits=limits)
    truth = stats.ttest_1samp(narrow, 0).confidence_interval()
    np.testing.assert_allclose(table["shift_low"], truth.low, atol=1e-8)
    np.testing.assert_allclose(table["shift_high"], truth.high, atol=1e-8)


# ---- null genes -----------------------------------------------------------------------------------------------------


def test_matched_genes_are_alike_and_never_the_gene_itself():
    rng = np.random.default_rng(5)
    expression = sparse.csr_matrix(rng.poisson(np.geomspace(0.02, 20, 600), (150, 600)))
    tested = rng.random(600) < 0.9
    others = null_genes(np.arange(600), tested, expression, "matched", seed=0)
    assert not (others == np.arange(600)[:, None]).any() and others.shape[1] == 100
    assert (others[~tested] == -1).all() and tested[others[tested]].all()
    assert all(len(set(row)) == 100 for row in others[tested])
    rank = stats.rankdata(np.asarray(expression.mean(axis=0)).ravel())
    assert np.median(np.abs(rank[others] - rank[:, None])[tested]) < 60
    again = null_genes(np.arange(600), tested, expression, "matched", seed=0)
    np.testing.assert_array_equal(others, again)


def test_chosen_null_genes_are_the_reference_without_the_gene_itself():
    rng = np.random.default_rng(6)
    values = 1e-3 * (rng.normal(size=(200, 40)) - 5.0)
    values[:, :10] += 4e-3
    null = Statistics(null=[f"G{i}" for i in range(10)])
    table = gene_statistics(made(values), names=names_of(values), expression=made(values), statistics=null)
    means = values.mean(axis=0)
    own = means[:10] - np.array([np.median(np.delete(means[:10], i)) for i in range(10)])
    expected = (means[39] - np.median(means[:10])) / (1.4826 * np.median(np.abs(own - np.median(own))))
    assert table["effect_size"].iloc[39] == pytest.approx(expected, rel=1e-4)
    assert table["p_value"][10:].max() < table["p_value"][:10].min()
    with pytest.raises(ScbinInputError, match=r"A06.*'NONE'"):
        wrong = Statistics(null=["G0", "NONE"])
        gene_statistics(made(values), names=names_of(values), expression=made(values), statistics=wrong)
    for wrong in ({"null": "all"}, {"confidence": 95}, {"n_permutations": -1}):
        with pytest.raises(ScbinInputError, match="A02"):
            Statistics(**wrong)


def test_hits_among_the_null_genes_do_not_hide_each_other():
    rng = np.random.default_rng(7)
    values = rng.normal(scale=0.1, size=(100, 200)) + rng.normal(scale=0.2, size=200)
    hits = np.arange(0, 200, 10)
    values[:, hits] += 3.0
    expression = sparse.csr_matrix(rng.poisson(2, values.shape))
    table = gene_statistics(made(values / 4), names=names_of(values), expression=expression, donors=np.arange(100) % 5)
    assert (table["fdr"][hits] < 0.05).all() and (table["fdr"].drop(hits) < 0.05).sum() == 0
    assert table["effect_size"][hits].min() > 8
    assert (table["shift"][hits] > table["null_high"][hits]).all()


# ---- p values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [1000, 3, 2], ids=["normal", "t3", "t2"])
@pytest.mark.parametrize("lengths", [False, True], ids=["signed", "lengths"])
@pytest.mark.parametrize("use_donors", [True, False], ids=["donors", "cells"])
def test_p_values_hold_where_no_gene_is_special_however_heavy_the_tails(tail, lengths, use_donors):
    p_values, n_false = [], []
    for seed in range(6):
        shifts, expression, donors = simulated(seed, tail=tail, lengths=lengths)
        own = donors if use_donors else None
        table = gene_statistics(shifts, names=names_of(shifts), expression=expression, donors=own)
        p_values.append(table["p_value"])
        n_false.append((table["fdr"] < 0.05).sum())
    p_values = np.concatenate(p_values)
    assert stats.kstest(p_values, "uniform").statistic < 0.06
    assert np.mean(p_values < 0.05) < 0.06 and np.mean(p_values < 0.005) < 0.008
    assert np.sum(np.array(n_false) > 0) <= 1  # of 6


def test_the_fitted_null_is_that_of_the_scores():
    rng = np.random.default_rng(0)
    for freedom in (2, 4):
        scale, tail = fit_null(0.3 * rng.standard_t(freedom, 20_000))
        assert (scale, tail) == (pytest.approx(0.3, rel=0.1), pytest.approx(freedom, rel=0.3))
    assert fit_null(rng.normal(size=20_000))[1] >= 10
    assert np.isnan(fit_null(np.zeros(9))).all()


def labelled(seed: int, kind: str):
    """Random labels of cells, donors, or samples within donors; genes that move cells along programs, some very far."""
    rng = np.random.default_rng(seed)
    deviations, donor = np.geomspace(3, 0.3, 16), np.repeat(np.arange(12), 20)
    cells = rng.normal(size=(240, 16)) * deviations
    label = np.arange(240) % 2
    if kind == "cells":
        label = rng.permutation(label)
    elif kind == "donors":
        cells, label = cells + (rng.normal(size=(12, 16)) * deviations)[donor], (rng.permutation(12) % 2)[donor]
    else:
        cells = cells + (rng.normal(size=(12, 2, 16)) * deviations)[donor, label]
        label = label ^ (rng.random(12) < 0.5)[donor]
    program = rng.normal(size=(8, 16)) * deviations
    moved = program[rng.integers(0, 8, 300)] + rng.normal(size=(300, 16)) * deviations
    parts = [cells[label == k] for k in (0, 1)]
    donors = None if kind == "cells" else [donor[label == k] for k in (0, 1)]
    return parts, donors, moved * np.abs(rng.standard_t(2, 300))[:, None]


@pytest.mark.parametrize("kind", ["cells", "donors", "pairs"])
def test_false_discoveries_under_random_labels(kind):
    """p values are uniform, and as often as the level says there is any discovery: the genes of a program go together."""
    p_values, found = [], []
    for seed in range(40):
        parts, donors, moved = labelled(seed, kind)
        centre, true = np.concatenate(parts).mean(axis=0), parts[0].mean(axis=0)
        means, _, labellings = permuted_means(parts, donors, 99, seed)
        assert labellings == pytest.approx({"cells": comb(240, 120), "donors": 924, "pairs": 2**12}[kind])
        p = permutation_p_values(moved @ (true - centre), (means[:, 0] - centre) @ moved.T, labellings)
        p_values.append(p)
        found.append((false_discovery_rates(p) < 0.05).any())
    p_values = np.concatenate(p_values)
    assert stats.kstest(p_values, "uniform").statistic < 0.05
    assert np.mean(p_values < 0.05) == pytest.approx(0.05, abs=0.02)
    assert np.mean(found) < 0.15


@pytest.mark.parametrize("by_donor", [False, True])
def test_cells_that_move_away_from_themselves_do_not_go_to_a_random_goal(by_donor):
    """A deletion brings a cell nearer to the middle, so that the edited cells approach all others: their own part is taken away."""
    rng, p_values, naive, donor = np.random.default_rng(0), [], [], np.repeat(np.arange(12), 10)
    for seed in range(60):
        cells = rng.normal(size=(120, 8)) + (rng.normal(size=(12, 2, 8))[donor, np.arange(120) % 2] if by_donor else 0)
        goal = rng.permutation(120) % 2 == 0
        if by_donor:
            goal = (np.arange(120) % 2 == 0) ^ (rng.random(12) < 0.5)[donor]
        centre, parts = cells.mean(axis=0), [cells[goal], cells[~goal]]
        donors = [donor[goal], donor[~goal]] if by_donor else None
        means, kept, labellings = permuted_means(parts, donors, 100, seed)
        moves = (rng.normal(size=(40, 1, 8)) / 20 - 0.3 * (parts[1] - centre)) * rng.random((40, len(parts[1]), 1))
        moved, own = moves.mean(axis=1), (moves * (kept[:, 0] - centre)).sum(axis=2).mean(axis=1)
        observed, null = moved @ (parts[0].mean(axis=0) - centre), (means[:, 0] - centre) @ moved.T
        p_values.append(permutation_p_values(observed - own, null, labellings))
        naive.append(permutation_p_values(observed, null, labellings))
    raw, corrected = np.mean(np.array(naive) < 0.05), np.mean(np.array(p_values) < 0.05)
    assert raw > 0.14 and corrected - 0.05 < (raw - 0.05) / 2


def test_a_gene_that_goes_straight_to_the_goal_is_found():
    rng = np.random.default_rng(0)
    cells, goal = rng.normal(size=(400, 60)), np.zeros(60)
    goal[0] = 8.0
    parts = [cells[:200] + goal, cells[200:]]
    moved = rng.normal(size=(200, 60)) * np.abs(rng.standard_t(2, 200))[:, None]
    centre = np.concatenate(parts).mean(axis=0)
    moved -= np.outer(moved @ goal, goal) / (goal @ goal)  # the others go elsewhere
    moved[:10] = goal + rng.normal(size=(10, 60))
    means, _, labellings = permuted_means(parts, None, 200, 0)
    way, ways = parts[0].mean(axis=0) - centre, means[:, 0] - centre
    fdr = false_discovery_rates(permutation_p_values(moved @ way, ways @ moved.T, labellings))
    assert (fdr[:10] < 0.05).all() and (fdr[10:] < 0.05).sum() <= 5


def test_labels_are_permuted_by_donor():
    """Donors of one state pass it on, a donor of both swaps them, and means are those of the cells."""
    rng = np.random.default_rng(0)
    donors, labels = np.array([0, 1, 2, 3, 4, 5, 5]), np.array([0, 0, 1, 0, 1, 1, 0])
    drawn = np.array([permuted_labels(donors, labels, rng) for _ in range(200)])
    assert (drawn[:, :5].sum(axis=1) == 2).all() and (drawn[:, 5] != drawn[:, 6]).all()
    assert 0.3 < drawn[:, 5].mean() < 0.7 and len(np.unique(drawn, axis=0)) == 20
    cells = [rng.normal(size=(5, 3)), rng.normal(size=(3, 3))]
    cells[0][1] = np.nan
    of = [np.array(list("aabbb")), np.array(list("aab"))]
    for mean in permuted_means(cells, of, 20, 0)[0][:, 0]:
        a, b = ((cells[0][:1], cells[1][:2]), (cells[0][2:], cells[1][2:]))
        ends = [np.concatenate([a[i], b[j]]).mean(axis=0) for i in (0, 1) for j in (0, 1)]
        assert np.isclose(ends, mean).all(axis=1).any()
    means, kept, labellings = permuted_means(cells, None, 4000, 0)
    assert means.shape == (4000, 2, 3) and kept.shape == (3, 2, 3) and round(labellings) == 35
    every = np.concatenate([cells[0][[0, 2, 3, 4]], cells[1]])
    np.testing.assert_allclose(kept[1, 0], np.delete(every, 5, axis=0).mean(axis=0))  # the goal, if this cell stays
    assert np.abs(kept[1, 1] - (every[5] + 2 * np.delete(every, 5, axis=0).mean(axis=0)) / 3).max() < 1e-9


def test_missing_p_values_are_no_tests():
    rng = np.random.default_rng(9)
    p_values = np.insert(rng.random(50) ** 3, [3, 20], np.nan)
    known = np.isfinite(p_values)
    fdr = false_discovery_rates(p_values)
    np.testing.assert_allclose(fdr[known], stats.false_discovery_control(p_values[known]))
    assert np.isnan(fdr[~known]).all() and np.isnan(false_discovery_rates(np.array([np.nan]))).all()


def test_order_of_cells_and_donor_names_do_not_matter():
    shifts, expression, donors = simulated(11)
    order = np.random.default_rng(0).permutation(len(donors))
    first = gene_statistics(shifts, names=names_of(shifts), expression=expression, donors=donors)
    renamed = [f"z{d}" for d in donors[order]]
    second = gene_statistics(shifts[order], names=names_of(shifts), expression=expression[order], donors=renamed)
    pd.testing.assert_frame_equal(first, second, rtol=1e-6)


# ---- what is missing ------------------------------------------------------------------------------------------------


def test_few_cells_and_donors_give_no_p_value():
    rng = np.random.default_rng(10)
    stored = np.ones((20, 12), dtype=bool)
    stored[:, 0] = False
    stored[1:, 1] = False
    stored[:, 2] = np.arange(20) < 5
    donors = np.repeat(["a", "b", "c", "d"], 5)
    shifts = made(0.1 * rng.normal(size=stored.shape), stored)
    table = gene_statistics(shifts, names=names_of(stored), expression=made(stored.astype(float)), donors=donors)
    assert table["p_value"][:3].isna().all() and table["p_value"][3:].notna().all()
    assert table["n_cells"].tolist()[:3] == [0, 1, 5] and np.isnan(table["shift"][0])
    few = gene_statistics(shifts[:, 3:7], names=list("ABCD"), expression=shifts[:, 3:7])
    assert few["p_value"].isna().all() and few["shift_low"].notna().all()
    flat = gene_statistics(made(np.zeros((9, 8))), names=list("ABCDEFGH"), expression=made(np.ones((9, 8))))
    assert (flat["shift"] == 0).all() and flat["p_value"].isna().all()


def test_columns_types_and_serialisation(tmp_path):
    shifts, expression, donors = simulated(13, n_genes=30)
    table = gene_statistics(shifts, names=names_of(shifts), expression=expression, donors=donors)
    assert list(table.columns) == COLUMNS
    adata = ad.AnnData(np.zeros((2, 2)), uns={"scbin_perturb": {"table": table}})
    adata.write_h5ad(tmp_path / "a.h5ad")
    again = ad.read_h5ad(tmp_path / "a.h5ad").uns["scbin_perturb"]["table"]
    pd.testing.assert_frame_equal(table, again, check_dtype=False, check_index_type=False, check_column_type=False)


# ---- other statistics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_impact_component_is_the_one_that_moves_cells(seed):
    """Whichever component the fit numbers first, and however small the shifts are."""
    rng = np.random.default_rng(seed)
    values = 1e-4 * np.abs(rng.normal(1, 0.1, (50, 60)))
    values[:, ::6] += 1e-3
    stored = np.ones(values.shape, dtype=bool)
    stored[:, 59] = False
    table = mixture(made(values, stored), names=names_of(values), seed=seed)
    assert table["impact"].tolist() == [i % 6 == 0 for i in range(60)]
    assert (table["impact_share"][table["impact"]] > 0.95).all() and np.isnan(table["impact_share"][59])
    for few in (values[:, :3], np.ones((4, 9))):
        with pytest.raises(ScbinInputError, match="P02"):
            mixture(made(few), names=names_of(few))


def test_pairs_against_a_paired_t_test():
    rng = np.random.default_rng(3)
    single = rng.normal(size=(40, 3))
    pairs = np.array([(0, 1), (0, 2)])
    combined = np.column_stack([single[:, 0] + single[:, 1], single[:, 0] + single[:, 2] + 1.0])
    combined += 0.3 * rng.normal(size=combined.shape)
    stored = rng.random(single.shape) < 0.8
    table = pair_statistics(made(single, stored), made(combined), pairs)
    for k, (a, b) in enumerate(pairs):
        excess = (combined[:, k] - single[:, a] - single[:, b])[stored[:, a] & stored[:, b]]
        oracle = stats.ttest_1samp(excess, 0)
        names = ["combined_minus_sum", *(f"combined_minus_sum_{name}" for name in ("p_value", "ci_low", "ci_high"))]
        truth = [excess.mean(), oracle.pvalue, *oracle.confidence_interval()]
        assert table.loc[k, names].tolist() == pytest.approx(truth)
    donors = rng.integers(0, 5, 40)
    table = pair_statistics(made(single), made(combined), pairs, donors=donors)
    excess = pd.DataFrame(combined - single[:, [0]] - single[:, 1:]).groupby(donors).mean()
    np.testing.assert_allclose(table["combined_minus_sum_p_value"], stats.ttest_1samp(excess, 0).pvalue, rtol=1e-9)
    np.testing.assert_allclose(table["anchor_shift"], pd.DataFrame(single[:, [0, 0]]).groupby(donors).mean().mean())
    alone = pair_statistics(made(single), made(combined), pairs, donors=np.zeros(40))
    assert np.isnan(alone["combined_minus_sum_p_value"][0]) and np.isfinite(alone["combined_minus_sum"][0])


@pytest.mark.parametrize("by_donor", [False, True])
def test_null_cells_against_the_rank_sum_test(by_donor):
    rng = np.random.default_rng(0)
    shifts, is_null, donors = rng.normal(size=(60, 4)), np.arange(60) >= 25, np.arange(60) % 6
    shifts[~is_null] += 0.5
    stored = rng.random(shifts.shape) < 0.7
    stored[:25, 3] = False
    table = vs_null(made(shifts, stored), is_null, list("ABCD"), donors if by_donor else None)
    by_cell = pd.DataFrame(np.where(stored, shifts, np.nan))
    sides = [side.groupby(donors[side.index]).mean() if by_donor else side for _, side in by_cell.groupby(is_null)]
    for gene in range(3):
        test, null = (side[gene].dropna() for side in sides)
        assert table["p_value"][gene] == pytest.approx(stats.ranksums(test, null).pvalue)
        assert table["difference"][gene] == pytest.approx(test.mean() - null.mean())
    assert table[["n_cells", "n_cells_null"]].to_numpy().tolist() == [[s[:25].sum(), s[25:].sum()] for s in stored.T]
    assert np.isnan(table["p_value"][3]) and table["fdr"][:3].tolist() == list(
        false_discovery_rates(table["p_value"])[:3]
    )


# ---- the verb -------------------------------------------------------------------------------------------------------


@pytest.fixture
def shifted(toy):
    """The toy cells with shifts of 30 of the 40 genes in 50 of the 60 cells; the first five genes move cells far."""
    rng = np.random.default_rng(0)
    values = np.abs(rng.normal(0.02, 0.002, size=(60, 40)))
    values[:, :5] += 0.1
    stored = np.zeros((60, 40), dtype=bool)
    stored[:50, :30] = True
    toy.layers["scbin_shift"] = made(values.astype(np.float32), stored)
    table = pd.DataFrame({"gene": [f"GENE{i}" for i in range(30)], "shift": 0.0, "exact": np.arange(30) % 2 == 0})
    toy.uns["scbin_perturb"] = {"table": table, "params": json.dumps({"mode": "delete"})}
    toy.obs["donor"] = [f"d{i % 5}" for i in range(60)]
    return toy


def test_matched_with_donors_afterwards(shifted):
    before = shifted.copy()
    donors = {"donor_key": "donor"}
    shifted = shifted[shifted.obs["cell_type"] == "B cell"].copy()
    scbin.tl.perturb_statistics(shifted, statistics=donors)
    table = scbin.get.perturb_df(shifted, key="scbin_perturb_matched")
    assert (table["n_donors"] == 5).all() and (table["n_cells"] == 17).all()
    assert set(table["gene"][:5]) == {f"GENE{i}" for i in range(5)}
    exact = before.uns["scbin_perturb"]["table"].set_index("gene")["exact"]
    assert table["exact"].tolist() == exact.loc[table["gene"]].tolist()
    pd.testing.assert_frame_equal(shifted.uns["scbin_perturb"]["table"], before.uns["scbin_perturb"]["table"])
    null = Statistics(null=[f"GENE{i}" for i in range(10, 20)])
    copy = scbin.tl.perturb_statistics(before, statistics=null, copy=True)
    assert "scbin_perturb_matched" not in before.uns
    assert not np.allclose(copy.uns["scbin_perturb_matched"]["table"]["effect_size"], table["effect_size"])


def test_the_mixture_and_the_null_are_those_of_the_arrays(shifted, tmp_path):
    shifts, names = shifted.layers["scbin_shift"][:, :30], shifted.var_names[:30]
    scbin.tl.perturb_statistics(shifted, statistic="mixture")
    found = shifted.uns["scbin_perturb_mixture"]["table"]
    pd.testing.assert_frame_equal(found, mixture(shifts[:50], names=names))
    assert found["impact"].tolist() == [True] * 5 + [False] * 25
    shifted.obs["null"] = shifted.obs["cell_type"] == "B cell"
    scbin.tl.perturb_statistics(shifted, statistic="vs_null", null_key="null")
    found = shifted.uns["scbin_perturb_vs_null"]["table"]
    pd.testing.assert_frame_equal(found, vs_null(shifts[:50], shifted.obs["null"].to_numpy()[:50], names))
    assert "Test_vs_null_FDR" in scbin.get.perturb_df(shifted, key="scbin_perturb_vs_null", style="geneformer")
    shifted.write_h5ad(tmp_path / "a.h5ad")


WRONG = {
    "no_table": ({"key": "mine"}, "A06"),
    "no_donors": ({"statistics": {"donor_key": "who"}}, "A06"),
    "no_null": ({"statistic": "vs_null"}, "A03"),
    "no_null_cells": ({"statistic": "vs_null", "null_key": "cell_type"}, "P02"),
}


@pytest.mark.parametrize(("arguments", "code"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_asked(shifted, arguments, code):
    before = set(shifted.uns)
    with pytest.raises(ScbinInputError, match=code):
        scbin.tl.perturb_statistics(shifted, **arguments)
    assert set(shifted.uns) == before
    del shifted.layers["scbin_shift"]
    with pytest.raises(ScbinInputError, match="A06"):
        scbin.tl.perturb_statistics(shifted)
