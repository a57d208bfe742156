from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from scbin.tl._metrics import (
    calibration_error,
    classification_scores,
    masked_gene_scores,
    probability_scores,
    ranked_gene_scores,
    regression_scores,
    roc_auc,
)


@pytest.fixture(scope="module")
def guesses():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 300)
    logits = rng.normal(size=(300, 4)) + 1.5 * np.eye(4)[truth]
    probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return truth, probability.argmax(axis=1), probability


def test_classes_against_scikit_learn(guesses):
    truth, predicted, probability = guesses
    scores = classification_scores(truth, predicted, probability)
    expected = {
        "accuracy": metrics.accuracy_score(truth, predicted),
        "balanced_accuracy": metrics.balanced_accuracy_score(truth, predicted),
        "macro_precision": metrics.precision_score(truth, predicted, average="macro"),
        "macro_recall": metrics.recall_score(truth, predicted, average="macro"),
        "macro_f1": metrics.f1_score(truth, predicted, average="macro"),
        "roc_auc": metrics.roc_auc_score(truth, probability, multi_class="ovr"),
        "log_loss": metrics.log_loss(truth, probability),
    }
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value), name
    brier = np.mean([((p - np.eye(4)[t]) ** 2).sum() for p, t in zip(probability, truth, strict=True)])
    assert scores["brier"] == pytest.approx(brier)


def test_averages_go_over_true_classes_alone(guesses):
    truth, predicted, _ = guesses
    truth, predicted = truth[truth < 2], predicted[truth < 2]
    expected = metrics.f1_score(truth, predicted, labels=[0, 1], average="macro")
    assert classification_scores(truth, predicted)["macro_f1"] == pytest.approx(expected)


def test_seed_f1_is_that_of_the_macro_averages(guesses):
    truth, predicted, _ = guesses
    scores = classification_scores(truth, predicted, f1="seed")
    p, r = scores["macro_precision"], scores["macro_recall"]
    assert scores["macro_f1"] == pytest.approx(2 * p * r / (p + r))


def test_cell_without_prediction_counts_as_wrong():
    scores = classification_scores(np.array([0, 0, 1, 1]), np.array([0, -1, 1, 1]))
    assert scores["accuracy"] == 0.75
    assert scores["macro_recall"] == pytest.approx((0.5 + 1) / 2)


def test_calibration_error_against_a_loop(guesses):
    truth, _, probability = guesses
    confidence, right = probability.max(axis=1), probability.argmax(axis=1) == truth
    error = 0.0
    for k in range(15):
        here = (confidence >= k / 15) & ((confidence < (k + 1) / 15) | (k == 14))
        if here.any():
            error += here.mean() * abs(right[here].mean() - confidence[here].mean())
    assert calibration_error(confidence, right) == pytest.approx(error)
    assert calibration_error(np.ones(5), np.ones(5)) == 0
    assert calibration_error(np.ones(5), np.zeros(5)) == 1


def test_classes_that_cannot_be_told():
    probability = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.5, 0.5, 0.0]])
    scores = probability_scores(np.array([0, 1, 2]), probability)  # class 2 was never learned
    assert np.isfinite(scores["log_loss"])
    assert np.isnan(roc_auc(np.array([1, 1]), probability[:2]))
    assert np.isnan(probability_scores(np.array([0]), np.full((1, 3), np.nan))["brier"])


def test_numbers_against_scikit_learn():
    rng = np.random.default_rng(1)
    truth = rng.normal(size=50)
    predicted = truth + rng.normal(size=50)
    scores = regression_scores(truth, np.append(predicted[:-1], np.nan))
    truth, predicted = truth[:-1], predicted[:-1]
    assert scores["n_cells"] == 49
    assert scores["mae"] == pytest.approx(metrics.mean_absolute_error(truth, predicted))
    assert scores["r2"] == pytest.approx(metrics.r2_score(truth, predicted))
    assert scores["pearson"] == pytest.approx(np.corrcoef(truth, predicted)[0, 1])
    constant = regression_scores(truth, np.full(49, truth.mean()))
    assert constant["r2"] == pytest.approx(0, abs=1e-12)
    assert np.isnan(constant["pearson"])


def test_masked_genes_against_a_loop():
    rng = np.random.default_rng(2)
    truth, predicted = rng.integers(0, 13, 400), rng.integers(0, 13, 400)
    predicted[::2] = truth[::2]
    scores = masked_gene_scores(truth, predicted)
    pairs = list(zip(truth.tolist(), predicted.tolist(), strict=True))

    def share(condition, among):
        chosen = [pair for pair in pairs if among(pair)]
        return sum(condition(pair) for pair in chosen) / len(chosen)

    assert scores["exact"] == share(lambda p: p[0] == p[1], lambda p: True)
    assert scores["within_one"] == share(lambda p: abs(p[0] - p[1]) <= 1, lambda p: True)
    assert scores["zero_exact"] == share(lambda p: p[1] == 0, lambda p: p[0] == 0)
    assert scores["one_as_zero"] == share(lambda p: p[1] == 0, lambda p: p[0] == 1)
    assert scores["nonzero_within_two"] == share(lambda p: abs(p[0] - p[1]) <= 2, lambda p: p[0] > 0)
    assert scores["high_within_one"] == share(lambda p: abs(p[0] - p[1]) <= 1, lambda p: p[0] > 8)
    assert np.isnan(masked_gene_scores(np.ones(3), np.ones(3))["high_exact"])


def test_ranked_genes():
    scores = ranked_gene_scores(np.array([3, 4, 5, 6]), np.array([3, 4, 5, 0]), np.log([0.5, 0.5, 0.5, 0.5]))
    assert scores == {"n_genes": 4.0, "exact": 0.75, "log_loss": pytest.approx(np.log(2))}


def test_area_in_a_cross_validation_goes_over_pairs_within_folds():
    rng = np.random.default_rng(0)
    truth, fold = rng.integers(0, 3, 90), rng.integers(0, 4, 90)
    probability = rng.dirichlet(np.ones(3), 90)
    areas = []
    for k in range(3):
        wins = [
            float(probability[i, k] > probability[j, k])
            for i in range(90)
            for j in range(90)
            if truth[i] == k != truth[j] and fold[i] == fold[j]
        ]
        areas.append(np.mean(wins))
    assert roc_auc(truth, probability, fold) == pytest.approx(np.mean(areas))
    assert roc_auc(truth, probability, np.zeros(90)) == pytest.approx(roc_auc(truth, probability))
    # shares of the other folds: they know nothing, but pooled they are lower where the class is held out
    shares = np.array([[np.mean(truth[fold != f] == k) for k in range(3)] for f in fold])
    assert roc_auc(truth, shares) < 0.5 and roc_auc(truth, shares, fold) == 0.5
    assert np.isnan(roc_auc(truth, probability, truth))


def test_the_means_of_folds_correlate_with_nothing():
    truth, fold = np.arange(30.0), np.arange(30) // 6
    means = np.array([truth[fold != f].mean() for f in fold])
    assert np.isnan(regression_scores(truth, means, fold)["pearson"])
    assert regression_scores(truth, truth + means, fold)["pearson"] == pytest.approx(
        np.corrcoef(truth, truth + means)[0, 1]
    )
