"""The convex start against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import f1_score

from scbin.train import linear
from scbin.train.linear import Features, choose_classes, choose_numbers, fit_linear


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    classes = np.repeat([0, 1, 2], [60, 30, 10])
    z = rng.normal(size=(100, 4)) + np.eye(4)[:3][classes]
    x = sp.random(100, 30, 0.3, random_state=0, format="csr")
    return Features(z, x), classes


@pytest.mark.parametrize("few", [0, 1000])
def test_classes_are_those_of_a_logistic_regression(data, monkeypatch, few):
    features, classes = data
    monkeypatch.setattr(linear, "_FEW_CELLS", few)
    monkeypatch.setattr(linear, "_TOLERANCE", 1e-7)
    beside = np.c_[features.z * np.sqrt(0.5), features.x.toarray() * np.sqrt(2.0)]
    sklearn = LogisticRegression(C=1.0, tol=1e-8, max_iter=5000).fit(beside, classes)
    ours = fit_linear(features, np.eye(3)[classes], (0.5, 2.0))(features)
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
    np.testing.assert_allclose(fit_linear(features, numbers, (1.0, 1.0))(features)[:, 0], expected, atol=5e-3)


def test_weights_of_cells_are_as_repeating_them(data):
    features, classes = data
    rows = np.r_[np.arange(100), np.arange(90, 100)]
    weights = np.where(np.arange(100) >= 90, 2.0, 1.0)
    weighted = fit_linear(features, np.eye(3)[classes], (1.0, 1.0), cell_weights=weights)(features)
    repeated = fit_linear(features[rows], np.eye(3)[classes[rows]], (1.0, 1.0))(features)
    np.testing.assert_allclose(weighted, repeated, atol=2e-2)


def test_rare_classes_are_favoured_where_that_helps_and_only_there(data):
    features, classes = data
    folds = np.arange(100) % 4
    free = choose_classes(features, classes, 3, folds)
    plain = choose_classes(features, classes, 3, folds, rebalance=0.0)
    scores = [f1_score(classes, choice.outputs.argmax(1), average="macro") for choice in (plain, free)]
    assert scores[1] >= scores[0] and plain.prior_share == 0
    assert free.prior_share == 0 or scores[1] >= scores[0] + 0.005


def test_a_class_that_a_fold_has_not_seen_breaks_nothing(data):
    features, classes = data
    classes = classes.copy()
    classes[0] = 3
    choice = choose_classes(features, classes, 4, np.arange(100) % 4)
    assert np.isfinite(choice.outputs).all() and np.isfinite(choice.loss)


def test_numbers_are_judged_on_cells_that_were_not_fitted(data):
    features, _ = data
    noise = np.random.default_rng(2).normal(size=100)
    assert choose_numbers(features, noise, np.arange(100) % 4).loss > 0.8 * noise.var()
