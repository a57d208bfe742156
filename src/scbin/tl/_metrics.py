"""Scores of predictions by scikit-learn: arrays in, numbers by name out."""

from __future__ import annotations

import numpy as np
from scipy.stats import pearsonr
from sklearn import metrics

_LEAST = float(np.finfo(np.float32).eps)  # what a float32 probability resolves; a class never given would cost infinity


def class_scores(truth: np.ndarray, predicted: np.ndarray, probability: np.ndarray | None = None) -> dict[str, float]:
    """Score predicted classes (cells,), -1 where there is none, given the probability of every class (cells, classes).

    Means over classes are over those that occur in `truth`; that of the recall is the balanced accuracy. A cell without a
    prediction counts as wrong; scores of probabilities leave it out.
    """
    how = {"labels": np.unique(truth), "average": "macro", "zero_division": 0}
    _, recall, f1, _ = metrics.precision_recall_fscore_support(truth, predicted, **how)
    scores = {"n_cells": len(truth), "accuracy": np.mean(truth == predicted), "macro_recall": recall, "macro_f1": f1}
    if probability is not None:
        known = np.isfinite(probability).all(axis=1)
        truth, probability = truth[known], np.asarray(probability, dtype=np.float64)[known]
        likely = probability[np.arange(len(truth)), truth]
        classes = [k for k in np.unique(truth) if (truth != k).any()]
        areas = [metrics.roc_auc_score(truth == k, probability[:, k]) for k in classes]
        scores["roc_auc"] = np.mean(areas) if areas else np.nan
        scores["log_loss"] = -np.log(np.maximum(likely, _LEAST)).mean() if len(truth) else np.nan
    return {name: float(score) for name, score in scores.items()}


def number_scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Score predicted numbers (cells,): mean absolute error, R2 and Pearson's r; cells without a prediction are left out."""
    known = np.isfinite(predicted)
    truth, predicted = truth[known], predicted[known]
    varies, correlates = (len(truth) > 1 and np.ptp(of) > 1e-9 * np.abs(of).max() for of in (truth, predicted))
    return {
        "n_cells": float(len(truth)),
        "mae": float(metrics.mean_absolute_error(truth, predicted)) if len(truth) else np.nan,
        "r2": float(metrics.r2_score(truth, predicted)) if varies else np.nan,
        "pearson": float(pearsonr(truth, predicted).statistic) if varies and correlates else np.nan,
    }


def gene_scores(truth: np.ndarray, predicted: np.ndarray, log_probability: np.ndarray) -> dict[str, float]:
    """Score predicted levels (bins or counts) of masked genes: how often they are exact, or within one of the truth."""
    off = np.abs(truth - predicted)
    return {
        "n_genes": float(len(truth)),
        "exact": float(np.mean(off == 0)),
        "within_one": float(np.mean(off <= 1)),
        "macro_f1": class_scores(truth, predicted)["macro_f1"],
        "log_loss": float(-np.maximum(log_probability, np.log(_LEAST)).mean()),
    }
