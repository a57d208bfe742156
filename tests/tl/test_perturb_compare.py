from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats

from scbin._errors import ScbinInputError
from scbin.tl._perturb_compare import aggregate, mixture, pair_statistics, vs_null


def made(values: np.ndarray, stored: np.ndarray | None = None) -> sparse.csr_matrix:
    rows, columns = np.nonzero(np.ones_like(values, dtype=bool) if stored is None else stored)
    return sparse.csr_matrix((values[rows, columns], (rows, columns)), shape=values.shape)


# ---- against null cells ---------------------------------------------------------------------------------------------


def test_vs_null_over_cells_is_the_rank_sum_test():
    rng = np.random.default_rng(0)
    test, null = rng.normal(0.3, 1, (25, 4)), rng.normal(size=(40, 4))
    stored = rng.random(test.shape) < 0.7
    stored[:, 3] = False
    table = vs_null(made(test, stored), made(null), names=list("ABCD"))
    for gene in range(3):
        oracle = stats.ranksums(test[stored[:, gene], gene], null[:, gene])
        assert table["p_value"][gene] == pytest.approx(oracle.pvalue)
        assert table["difference"][gene] == pytest.approx(test[stored[:, gene], gene].mean() - null[:, gene].mean())
    assert np.isnan(table["p_value"][3]) and np.isnan(table["fdr"][3]) and table["n_cells"][3] == 0
    np.testing.assert_allclose(table["fdr"][:3], stats.false_discovery_control(table["p_value"][:3]))


def test_vs_null_over_donors_is_welch_on_their_means():
    rng = np.random.default_rng(1)
    test, null = rng.normal(1, 1, (30, 3)), rng.normal(size=(28, 3))
    donors, others = np.repeat(np.arange(6), 5), np.repeat(np.arange(4), 7)
    table = vs_null(made(test), made(null), names=list("ABC"), test_donors=donors, null_donors=others)
    means = [np.array([x[d == k].mean(axis=0) for k in np.unique(d)]) for x, d in ((test, donors), (null, others))]
    np.testing.assert_allclose(table["p_value"], stats.ttest_ind(*means, equal_var=False).pvalue, rtol=1e-9)
    one = vs_null(made(test), made(null), names=list("ABC"), test_donors=donors, null_donors=np.zeros(28))
    assert one["p_value"].isna().all()
    with pytest.raises(ScbinInputError, match="P55"):
        vs_null(made(test), made(null), names=list("ABC"), test_donors=donors)
    with pytest.raises(ScbinInputError, match="P53"):
        vs_null(made(test), made(null[:, :2]), names=list("ABC"))


# ---- mixture --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_the_impact_component_is_the_one_that_moves_cells(seed):
    """Whichever component the fit numbers first, and however small the shifts are."""
    rng = np.random.default_rng(seed)
    values = 1e-4 * np.abs(rng.normal(1, 0.1, (50, 60)))
    values[:, ::6] += 1e-3
    table = mixture(made(values), names=[f"G{i}" for i in range(60)], seed=seed)
    assert table["impact"].tolist() == [i % 6 == 0 for i in range(60)]
    assert (table["impact_share"][table["impact"]] > 0.95).all()
    assert (table["impact_share"][~table["impact"]] < 0.05).all()


def test_mixture_with_missing_genes_and_too_few():
    rng = np.random.default_rng(0)
    values = rng.random((10, 8))
    values[:, :3] += 5
    stored = np.ones(values.shape, dtype=bool)
    stored[:, 7] = False
    table = mixture(made(values, stored), names=list("ABCDEFGH"))
    assert table["impact"].tolist() == [True] * 3 + [False] * 5
    assert np.isnan(table["impact_share"][7]) and table["n_cells"][7] == 0
    for few in (values[:, :3], np.ones((4, 9))):
        with pytest.raises(ScbinInputError, match="P56"):
            mixture(made(few), names=[str(i) for i in range(few.shape[1])])


# ---- gene by gene ---------------------------------------------------------------------------------------------------


def test_aggregate_against_a_loop():
    rng = np.random.default_rng(2)
    perturbed, affected = rng.choice(list("AB"), 200), rng.choice(["X", "Y", "cell"], 200)
    values = rng.normal(size=200)
    values[:5] = np.nan
    table = aggregate(values, perturbed, affected)
    assert len(table) == 6
    for row in table.itertuples():
        own = values[(perturbed == row.perturbed) & (affected == row.affected)]
        own = own[np.isfinite(own)]
        assert (row.shift, row.sd, row.n_cells) == (pytest.approx(own.mean()), pytest.approx(own.std()), len(own))


# ---- pairs ----------------------------------------------------------------------------------------------------------


def test_pairs_against_a_paired_t_test():
    rng = np.random.default_rng(3)
    single = rng.normal(size=(40, 3))
    pairs = [(0, 1), (0, 2)]
    combined = np.column_stack([single[:, 0] + single[:, 1], single[:, 0] + single[:, 2] + 1.0])
    combined += 0.3 * rng.normal(size=combined.shape)
    stored = rng.random(single.shape) < 0.8
    table = pair_statistics(made(single, stored), made(combined), pairs, names=list("ABC"))
    assert table["anchor"].tolist() == ["A", "A"] and table["gene"].tolist() == ["B", "C"]
    for k, (a, b) in enumerate(pairs):
        use = stored[:, a] & stored[:, b]
        excess = (combined[:, k] - single[:, a] - single[:, b])[use]
        assert table["n_cells"][k] == use.sum()
        assert table["combined_minus_sum"][k] == pytest.approx(excess.mean())
        assert table["p_value"][k] == pytest.approx(stats.ttest_1samp(excess, 0).pvalue)
        low, high = stats.ttest_1samp(excess, 0).confidence_interval()
        assert (table["ci_low"][k], table["ci_high"][k]) == (pytest.approx(low), pytest.approx(high))
    np.testing.assert_allclose(table["combined_shift"] - table["sum_of_shifts"], table["combined_minus_sum"], rtol=1e-9)
    assert table["fdr"][1] < 1e-6 < table["fdr"][0]


def test_pairs_over_donors_add_up_and_need_two():
    rng = np.random.default_rng(4)
    single, combined = rng.normal(size=(30, 2)), rng.normal(size=(30, 1))
    donors = rng.integers(0, 5, 30)
    table = pair_statistics(made(single), made(combined), [(1, 0)], names=["A", "B"], donors=donors)
    row = table.iloc[0]
    assert row["n_donors"] == 5 and row["replicates"] == "donors"
    assert row["anchor_shift"] + row["gene_shift"] == pytest.approx(row["sum_of_shifts"])
    assert row["combined_shift"] - row["sum_of_shifts"] == pytest.approx(row["combined_minus_sum"])
    alone = pair_statistics(made(single), made(combined), [(1, 0)], names=["A", "B"], donors=np.zeros(30))
    assert np.isnan(alone["p_value"][0]) and np.isfinite(alone["combined_shift"][0])
    with pytest.raises(ScbinInputError, match="P53"):
        pair_statistics(made(single), made(combined), [(0, 1), (1, 0)], names=["A", "B"])
