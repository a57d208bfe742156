"""The mathematics of measured perturbations against plain loops, numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats

from scbin.tl._responses import (
    MEAN,
    RIDGE,
    SINGLES,
    ZERO,
    choose,
    combine,
    correlations,
    halves,
    kernels,
    narrow,
    pair_kernels,
    predict,
    reproducibility,
    response_features,
    smoother,
    sum_cells,
    without_own,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def noise(rng, n_groups=6, n=400, genes=60):
    values = sparse.csr_matrix(rng.normal(size=(n, genes)) @ (np.eye(genes) + 0.3 * rng.normal(size=(genes, genes))))
    group, stratum = rng.integers(-1, n_groups, n), rng.integers(2, size=n)
    return values, group, stratum


def test_changes_are_means_against_the_controls_of_the_stratum(rng):
    values, group, stratum = noise(rng)
    sums, dense = sum_cells(values, group, stratum, None, 0), values.toarray()
    centred = dense - np.stack([dense[(group < 0) & (stratum == s)].mean(axis=0) for s in (0, 1)])[stratum]
    expected = np.stack([centred[group == g].mean(axis=0) for g in range(6)])
    np.testing.assert_allclose(sums.changes(), expected, atol=1e-4)
    assert sums.cells.sum() == (group >= 0).sum() and sums.control_cells.sum() == (group < 0).sum()
    per_block = sums.cells.sum(axis=1)
    assert (per_block.max(axis=1) - per_block.min(axis=1) <= 1).all()  # dealt out evenly


def test_donors_are_never_divided(rng):
    values, group, stratum = noise(rng)
    donor = rng.integers(3, size=400)
    sums = sum_cells(values, group, 3 * stratum + donor, donor, 0)
    assert sums.cells.shape == (6, 6, 3)
    assert ((sums.cells > 0).any(axis=0).sum(axis=1) == 1).all()  # a stratum of a donor lies in one block


def test_halves_are_different_and_halves():
    for n in range(2, 9):
        ways = halves(n, 0)
        assert (ways.sum(axis=1) == n // 2).all() and len(np.unique(np.vstack([ways, ~ways]), axis=0)) == 2 * len(ways)


def test_p_values_of_noise_are_uniform_and_effects_are_found(rng):
    own, p = np.zeros((6, 60), dtype=bool), []
    for seed in range(10):
        r, p_value = reproducibility(sum_cells(*noise(rng), None, seed), own, seed)
        p += list(p_value)
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    values, group, stratum = noise(rng)
    shifted = sparse.csr_matrix(values.toarray() + (group == 2)[:, None] * rng.normal(size=60))
    r, p_value = reproducibility(sum_cells(shifted, group, stratum, None, 0), own, 0)
    assert r[2] > 0.5 and p_value[2] < 1e-3 and np.delete(p_value, 2).min() > 1e-3


def test_correlations_are_those_of_scipy(rng):
    a, b = rng.normal(size=(2, 4, 30))
    b[1, :5] = np.nan
    found = correlations(a, b)
    for i in range(4):
        known = np.isfinite(b[i])
        assert found[i] == pytest.approx(stats.pearsonr(a[i, known], b[i, known])[0])
    assert np.isnan(correlations(a, np.full((4, 30), np.nan))).all() and (correlations(0 * a, b) == 0).all()


@pytest.mark.parametrize("rule", [("ridge", 0.3), ("ridge", 2.0), ("nearby", 0.5), MEAN, ZERO], ids=str)
def test_leaving_one_out_in_closed_form_is_leaving_one_out(rng, rule):
    features, changes, train = rng.normal(size=(9, 4)), rng.normal(size=(9, 20)), np.arange(9)
    kernel = features @ features.T
    left_out = smoother(kernel, rule, train, train) @ changes
    for i in train:
        others = train[train != i]
        np.testing.assert_allclose(left_out[i], (smoother(kernel, rule, others, np.array([i])) @ changes[others])[0])
    if rule in (MEAN, ZERO):
        expected = (changes.sum(axis=0) - changes) / 8 if rule == MEAN else np.zeros((9, 20))
        np.testing.assert_allclose(left_out, expected, atol=1e-12)


def test_ridge_is_ridge_of_sklearn(rng):
    from sklearn.linear_model import Ridge

    features, changes = rng.normal(size=(9, 4)), rng.normal(size=(9, 20))
    expected = Ridge(0.7).fit(features[:6], changes[:6]).predict(features[6:])
    rows = smoother(features @ features.T, ("ridge", 0.7), np.arange(6), np.arange(6, 9))
    np.testing.assert_allclose(rows @ changes[:6], expected)


def test_features_that_say_nothing_leave_the_mean_and_those_that_do_are_used(rng):
    changes = np.repeat(rng.normal(size=(3, 50)), 8, axis=0) + 0.5 * rng.normal(size=(24, 50))
    told = np.repeat(np.eye(3), 8, axis=0) + 0.1 * rng.normal(size=(24, 3))
    features, weight, every = {"told": told, "noise": rng.normal(size=(24, 5))}, np.ones(24), np.arange(24)
    alike = kernels(features)
    for rules in (RIDGE, SINGLES):
        assert choose({"noise": alike["noise"]}, rules, changes, changes, weight) == ("", MEAN)
        assert choose(alike, rules, changes, changes, weight)[0] in ("told", "all")
    predicted = predict(features, changes, weight, every[1:], every[1:], every[:1])
    assert np.corrcoef(predicted[0], changes[0])[0, 1] > 0.7


def test_targets_without_features_get_the_mean(rng):
    block = rng.normal(size=(6, 3))
    block[5] = np.nan
    alike, changes = kernels({"a": narrow(block)}), rng.normal(size=(6, 4))
    rows = smoother(alike["a"], ("ridge", 1e9), np.arange(5), np.array([5]))
    np.testing.assert_allclose(rows, 0.2, atol=1e-6)
    assert np.isfinite(changes).all()


def test_genes_that_the_same_perturbations_move_have_like_features(rng):
    modules = np.repeat(np.arange(3), 20)
    changes = rng.normal(size=(15, 3)) @ np.eye(3)[modules].T + 0.1 * rng.normal(size=(15, 60))
    found = response_features(changes, np.array([0, 1, 20, -1]))
    assert np.isnan(found[3]).all() and np.linalg.norm(found[0] - found[1]) < 0.5 * np.linalg.norm(found[0] - found[2])


def test_synergy_is_learned_and_few_pairs_are_sums(rng):
    modules = np.arange(12) % 3
    single = np.eye(3)[modules] @ rng.normal(size=(3, 40))
    pairs = np.array([(a, b) for a in range(12) for b in range(a)])
    beyond = rng.normal(size=(3, 3, 40))
    base = single[pairs].sum(axis=1)
    measured = base + (beyond + beyond.swapaxes(0, 1))[modules[pairs[:, 0]], modules[pairs[:, 1]]]
    alike, every = pair_kernels(single, len(single), pairs), np.arange(len(pairs))
    test = np.sort(rng.permutation(every)[:20])
    train = np.setdiff1d(every, test)
    predicted = combine(base, measured[train], np.ones(len(train)), alike, train, test)
    assert ((predicted - measured[test]) ** 2).mean() < 0.2 * ((base[test] - measured[test]) ** 2).mean()
    np.testing.assert_array_equal(combine(base, measured[:2], np.ones(2), alike, every[:2], test), base[test])


def test_own_genes_are_filled_with_the_mean_of_the_others():
    changes = np.array([[-9.0, 1.0], [2.0, 3.0], [4.0, -9.0]])
    own = np.array([[True, False], [False, False], [False, True]])
    np.testing.assert_array_equal(without_own(changes, own), [[3.0, 1.0], [2.0, 3.0], [4.0, 2.0]])


def test_narrow_keeps_likeness(rng):
    block = np.vstack([np.full((1, 300), np.nan), rng.normal(size=(80, 20)) @ rng.normal(size=(20, 300))])
    small = narrow(block)
    centred = block[1:] - block[1:].mean(axis=0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    assert small.shape == (81, 50) and np.isnan(small[0]).all()
    np.testing.assert_allclose(small[1:] @ small[1:].T, centred @ centred.T, atol=1e-8)
