"""Scores of predictions by scikit-learn: arrays in, numbers by name out."""

from __future__ import annotations

import numpy as np
from scipy.stats import pearsonr
from sklearn.metrics import mean_absolute_error, precision_recall_fscore_support, r2_score, roc_auc_score

N_BINS, HIGH = 15, 8
_LEAST = float(np.finfo(np.float32).eps)  # what a float32 probability resolves; a class never given would cost infinity


def class_scores(
    truth: np.ndarray, predicted: np.ndarray, probability: np.ndarray | None = None, fold: np.ndarray | None = None
) -> dict[str, float]:
    """Score predicted classes.

    Means over classes are over those that occur in `truth`. A cell without a prediction counts as wrong; scores of probabilities
    leave it out.

    Parameters
    ----------
    truth
        Class of each cell, from 0 (cells,).
    predicted
        Predicted class, -1 where there is none (cells,).
    probability
        Probability of every class (cells, classes), NaN rows where there is none.
    fold
        The fold that predicted each cell (cells,), in a cross-validation: pairs for the ROC AUC are then of one fold.
    """
    scores = {"n_cells": float(len(truth)), "accuracy": float(np.mean(truth == predicted)), **_macro(truth, predicted)}
    if probability is None:
        return scores
    known = np.isfinite(probability).all(axis=1)
    truth, probability = truth[known], np.asarray(probability, dtype=np.float64)[known]
    if not len(truth):
        return scores | dict.fromkeys(("roc_auc", "calibration_error", "brier", "log_loss"), np.nan)
    onehot = np.eye(probability.shape[1])[truth]
    return scores | {
        "roc_auc": roc_auc(truth, probability, None if fold is None else fold[known]),
        "calibration_error": calibration_error(probability.max(axis=1), probability.argmax(axis=1) == truth),
        "brier": float(((probability - onehot) ** 2).sum(axis=1).mean()),
        "log_loss": float(-np.log(np.maximum(probability[np.arange(len(truth)), truth], _LEAST)).mean()),
    }


def _macro(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Return means over the true classes; that of the recall is the balanced accuracy."""
    found = precision_recall_fscore_support(truth, predicted, labels=np.unique(truth), average="macro", zero_division=0)
    return dict(zip(("macro_precision", "macro_recall", "macro_f1"), map(float, found[:3]), strict=True))


def roc_auc(truth: np.ndarray, probability: np.ndarray, fold: np.ndarray | None = None) -> float:
    """Return the mean area under the one-vs-rest ROC curves over classes, within folds, weighted by their pairs of cells."""
    fold = np.zeros(len(truth), dtype=np.int64) if fold is None else fold
    means = []
    for k in np.unique(truth):
        parts = [(truth[fold == number] == k, probability[fold == number, k]) for number in np.unique(fold)]
        parts = [(positive, score) for positive, score in parts if 0 < positive.sum() < len(positive)]
        if parts:
            pairs = [int(positive.sum()) * int((~positive).sum()) for positive, _ in parts]
            means.append(np.average([roc_auc_score(*part) for part in parts], weights=pairs))
    return float(np.mean(means)) if means else float("nan")


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the expected calibration error of the predicted class, in bins of equal width :cite:p:`guo2017`."""
    gaps, _ = np.histogram(confidence, np.linspace(0, 1, N_BINS + 1), weights=right - confidence)
    return float(np.abs(gaps).sum() / len(right))


def number_scores(truth: np.ndarray, predicted: np.ndarray, fold: np.ndarray | None = None) -> dict[str, float]:
    """Score predicted numbers: mean absolute error, R2 and Pearson's r; cells without a prediction are left out.

    A method that predicts one number for all cells of a `fold` has no correlation.
    """
    known = np.isfinite(predicted)
    truth, predicted = truth[known], predicted[known]
    fold = np.zeros(len(truth), dtype=np.int64) if fold is None else fold[known]
    varies = len(truth) > 1 and np.ptp(truth) > 0
    least = 1e-12 * max(1.0, float(np.abs(predicted).max(initial=0.0)))
    correlates = varies and any(np.ptp(predicted[fold == number]) > least for number in np.unique(fold))
    return {
        "n_cells": float(len(truth)),
        "mae": float(mean_absolute_error(truth, predicted)) if len(truth) else float("nan"),
        "r2": float(r2_score(truth, predicted)) if varies else float("nan"),
        "pearson": float(pearsonr(truth, predicted).statistic) if correlates else float("nan"),
    }


def gene_scores(truth: np.ndarray, predicted: np.ndarray, log_probability: np.ndarray) -> dict[str, float]:
    """Score predicted levels (bins or counts) of masked genes; `high` are levels above 8, as in Bioformers' table."""
    off, scores = np.abs(truth - predicted), {"n_genes": float(len(truth))}
    chosen = {"": truth >= 0, "zero_": truth == 0, "one_": truth == 1, "nonzero_": truth > 0, "high_": truth > HIGH}
    for name, rows in chosen.items():
        scores[f"{name}exact"] = float(np.mean(off[rows] == 0)) if rows.any() else float("nan")
        scores[f"{name}within_one"] = float(np.mean(off[rows] <= 1)) if rows.any() else float("nan")
    return scores | _macro(truth, predicted) | {"log_loss": float(-np.maximum(log_probability, np.log(_LEAST)).mean())}
