"""The convex start against scikit-learn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.linear_model import LogisticRegression, Ridge

from scbin.train import linear
from scbin.train.linear import Features, Strength, blended, fit_linear, spread_of


@pytest.mark.parametrize("few", [0, 1000])
def test_classes_are_those_of_a_logistic_regression(data, monkeypatch, few):
    features, classes = data
    monkeypatch.setattr(linear, "_FEW_CELLS", few)
    monkeypatch.setattr(linear, "_TOLERANCE", 1e-7)
    beside = np.c_[features.z * np.sqrt(0.5), features.x.toarray() * np.sqrt(2.0)]
    sklearn = LogisticRegression(C=1.0, tol=1e-8, max_iter=5000).fit(beside, classes)
    ours = fit_linear(features, np.eye(3)[classes], Strength(0.5, 2.0))(features)
    theirs = sklearn.decision_function(beside)
    centred = [out - out.mean(1, keepdims=True) for out in (ours, theirs)]
    np.testing.assert_allclose(*centred, atol=5e-3)


@pytest.mark.parametrize("few", [0, 1000])
def test_numbers_are_those_of_a_ridge_regression(data, monkeypatch, few):
    features, classes = data
    monkeypatch.setattr(linear, "_FEW_CELLS", few)
    monkeypatch.setattr(linear, "_TOLERANCE", 1e-8)
    numbers = features.z[:, 0] + classes + np.random.default_rng(1).normal(size=100)
    beside = np.c_[features.z, features.x.toarray()]
    expected = Ridge(1.0).fit(beside, numbers).predict(beside)
    np.testing.assert_allclose(fit_linear(features, numbers, Strength(1.0, 1.0))(features)[:, 0], expected, atol=5e-3)


def test_weights_of_cells_are_as_repeating_them(data):
    features, classes = data
    rows = np.r_[np.arange(100), np.arange(90, 100)]
    weights = np.where(np.arange(100) >= 90, 2.0, 1.0)
    weighted = fit_linear(features, np.eye(3)[classes], Strength(1.0, 1.0), cell_weights=weights)(features)
    repeated = fit_linear(features[rows], np.eye(3)[classes[rows]], Strength(1.0, 1.0))(features)
    np.testing.assert_allclose(weighted, repeated, atol=2e-2)


def test_genes_that_vary_much_are_held_back_and_a_part_can_say_nothing(data):
    features, classes = data
    spread = spread_of(features.x)
    dense = features.x.toarray()
    np.testing.assert_allclose(spread, np.maximum(dense.std(0) / np.median(dense.std(0)), 0.1))
    answers = np.eye(3)[classes]
    evened = fit_linear(replace(features, spread=spread), answers, Strength(0.0, 1.0, 0.5))
    by_hand = Features(np.zeros((100, 1)), sp.csr_matrix(dense / np.sqrt(spread)))
    expected = fit_linear(by_hand, answers, Strength(1.0, 1.0))(by_hand)
    assert not evened.z.any()
    np.testing.assert_allclose(evened(features), expected, atol=5e-3)


def test_a_blend_answers_the_weighted_sum(data):
    features, classes = data
    fits = [fit_linear(features, np.eye(3)[classes], Strength(*pair)) for pair in ((1.0, 0.1), (0.1, 1.0))]
    both = blended([(fits[0], 0.3), (fits[1], 0.9)])
    np.testing.assert_allclose(both(features), 0.3 * fits[0](features) + 0.9 * fits[1](features))
