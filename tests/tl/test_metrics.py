"""Scores and probes against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from scipy.stats import pearsonr
from sklearn import metrics
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, r2_score, roc_auc_score

from scbin.tl._labels import balanced_weights
from scbin.tl._metrics import class_scores, number_scores
from scbin.tl._probe import Scaler, fit_probe, fitted_temperature, losses_of


@pytest.fixture
def guesses():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 200)
    probability = rng.dirichlet(np.ones(4), 200)
    probability[np.arange(200), truth] += 0.4
    return truth, probability / probability.sum(1, keepdims=True)


@pytest.fixture(scope="module")
def data():
    """Counts of three classes, of which the first is rare."""
    rng = np.random.default_rng(0)
    codes = rng.choice(3, 150, p=[0.1, 0.3, 0.6])
    rates = np.full((3, 30), 0.3)
    for k in range(3):
        rates[k, 5 * k : 5 * k + 5] = 1.2
    return sparse.csr_matrix(np.log1p(rng.poisson(rates[codes])).astype(np.float32)), codes


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_classes_against_scikit_learn(guesses):
    truth, probability = guesses
    given = probability.argmax(1)
    scores = class_scores(truth, given, probability)
    assert scores["accuracy"] == metrics.accuracy_score(truth, given)
    assert scores["macro_recall"] == pytest.approx(metrics.balanced_accuracy_score(truth, given))
    assert scores["macro_f1"] == pytest.approx(metrics.f1_score(truth, given, average="macro"))
    assert scores["roc_auc"] == pytest.approx(roc_auc_score(truth, probability, multi_class="ovr"))
    assert scores["log_loss"] == pytest.approx(log_loss(truth, probability))


def test_averages_are_over_true_classes_and_no_prediction_is_wrong(guesses):
    truth, probability = guesses
    wide = np.hstack([probability, np.zeros((200, 2))])
    first, second = (class_scores(truth, probability.argmax(1), each) for each in (wide, probability))
    assert first == pytest.approx(second)
    given = np.where(np.arange(200) < 50, -1, truth)
    assert class_scores(truth, given)["accuracy"] == 0.75
    missing = np.where(np.arange(200)[:, None] < 50, np.nan, probability)
    assert class_scores(truth, given, missing)["log_loss"] == pytest.approx(log_loss(truth[50:], probability[50:]))
    assert np.isnan(class_scores(truth, given, np.full((200, 4), np.nan))["roc_auc"])


def test_numbers_against_scikit_learn():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=50)
    given = truth + rng.normal(size=50)
    given[3] = np.nan
    kept = np.delete(np.arange(50), 3)
    scores = number_scores(truth, given)
    assert scores["mae"] == pytest.approx(metrics.mean_absolute_error(truth[kept], given[kept]))
    assert scores["r2"] == pytest.approx(r2_score(truth[kept], given[kept]))
    assert scores["pearson"] == pytest.approx(pearsonr(truth[kept], given[kept]).statistic)
    assert np.isnan(number_scores(truth, np.full(50, 0.1))["pearson"])


def test_a_temperature_undoes_what_sharpened_the_outputs(guesses):
    truth, _ = guesses
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(3000, 4))
    truth = np.array([rng.choice(4, p=np.exp(row) / np.exp(row).sum()) for row in logits])
    assert fitted_temperature(3 * logits, truth) == pytest.approx(3, rel=0.1)
    assert fitted_temperature(3 * logits[:9], truth[:9]) == 1


# ---- probes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [2, 3])
def test_classes_are_those_of_a_logistic_regression(data, n_classes):
    x, codes = data[0].toarray().astype(np.float64), np.minimum(data[1], n_classes - 1)
    weights = balanced_weights(codes, n_classes)
    theirs = LogisticRegression(C=0.1, class_weight="balanced", tol=1e-8, max_iter=2000).fit(x, codes)
    ours = fit_probe(x, codes, n_classes, class_weights=weights, strength=0.1)
    outputs = ours.outputs(x)
    p = np.exp(outputs - np.logaddexp.reduce(outputs, axis=1, keepdims=True))
    np.testing.assert_allclose(p, theirs.predict_proba(x), atol=2e-3)


def test_the_strength_is_chosen_by_cells_that_were_not_fitted(data):
    rng = np.random.default_rng(0)
    x, codes = data[0].toarray(), data[1]
    noise = rng.normal(size=(150, 300)).astype(np.float32)
    assert fit_probe(noise, codes, 3).strength <= 1e-3  # nothing to learn
    found = fit_probe(x, codes, 3)
    losses = [losses_of(each.held_out, each.truth, 3).mean() for each in (found, fit_probe(noise, codes, 3))]
    assert found.strength >= 0.01 and losses[0] < losses[1] - 0.2
    donors = np.array([f"d{k}" for k in np.arange(150) // 15])
    per_donor = np.repeat(rng.normal(size=(10, 40)), 15, axis=0).astype(np.float32)  # tells donors, not classes, apart
    by_donor = rng.permutation(10) % 2
    found = fit_probe(per_donor, by_donor[np.arange(150) // 15], 2, donors=donors)
    assert losses_of(found.held_out, found.truth, 2).mean() > 0.5


def test_a_class_that_few_cells_have_breaks_nothing(data):
    x, codes = data[0].toarray(), data[1].copy()
    codes[:149] = 0
    codes[149] = 2
    found = fit_probe(x, codes, 4)
    outputs = found.outputs(x)
    assert outputs.shape == (150, 4) and np.isfinite(outputs).all()
    assert (outputs[:, [1, 3]].max(1) < outputs[:, 0]).all()


def test_numbers_are_those_of_a_ridge_regression(data):
    x = data[0].toarray().astype(np.float64)
    y = x[:, 0] - x[:, 5] + np.random.default_rng(0).normal(0, 0.1, 150)
    found = fit_probe(x, y, 0)
    np.testing.assert_allclose(found.outputs(x)[:, 0], Ridge(found.strength).fit(x, y).predict(x), atol=1e-6)
    assert np.square(found.held_out[:, 0] - y).mean() < 0.2 * y.var()
    assert fit_probe(x, y - x[:, 0] + x[:, 5] + np.random.default_rng(1).normal(size=150), 0).strength >= 1e3


def test_the_scaler_brings_features_to_one_spread(data):
    rng = np.random.default_rng(0)
    z = rng.normal(3, [0.1, 5, 0], (150, 3)).astype(np.float32)
    features = Scaler.fit(z, data[0]).features(z, data[0], 2.0)
    np.testing.assert_allclose(features[:, :2].std(0), 2, rtol=1e-3)
    np.testing.assert_allclose(features[:, 3:].std(0), 1, rtol=0.05)
    assert (features[:, 2] == 0).all() and features.shape == (150, 33)
    assert Scaler.fit(z, data[0]).features(z, None, 1.0).shape == (150, 3)
