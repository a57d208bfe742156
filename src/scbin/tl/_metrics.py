"""Scores of predictions: arrays in, numbers by name out. Where scikit-learn has a score, it does the work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from scbin.get._reliability import N_BINS, reliability

if TYPE_CHECKING:
    from collections.abc import Mapping

F1 = Literal["macro", "seed"]
HIGH_BIN = 8
_LEAST = float(
    np.finfo(np.float32).eps
)  # what a float32 probability can resolve; a class never given would cost infinity


# ---- classes --------------------------------------------------------------------------------------------------------


def classification_scores(
    truth: np.ndarray,
    predicted: np.ndarray,
    probability: np.ndarray | None = None,
    *,
    f1: F1 = "macro",
    fold: np.ndarray | None = None,
) -> dict[str, float]:
    """Score the classes given to cells.

    Averages over classes go over those that occur in `truth`, so that all methods are averaged over the same ones. A cell
    without a prediction counts as wrong everywhere; scores of probabilities leave it out.

    Parameters
    ----------
    truth
        Class of each cell, 0 to classes - 1 (cells,).
    predicted
        Class given to each cell, -1 where the method gave none (cells,).
    probability
        Probability of every class for every cell (cells, classes), NaN rows where there is none.
    f1
        `"macro"`: mean of the F1 of the classes; `"seed"`: harmonic mean of macro precision and macro recall, as PerturbGene
        reports it.
    fold
        Which fold's model answered for each cell (cells,), in a cross-validation.
    """
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    truth, predicted = np.asarray(truth), np.asarray(predicted)
    classes = np.unique(truth)
    precision, recall, by_class, _ = precision_recall_fscore_support(
        truth, predicted, labels=classes, average=None, zero_division=0
    )
    precise, complete = float(precision.mean()), float(recall.mean())
    harmonic = 2 * precise * complete / (precise + complete) if precise + complete else 0.0
    scores = {
        "n_cells": float(len(truth)),
        "accuracy": float(accuracy_score(truth, predicted)),
        "balanced_accuracy": complete,
        "macro_precision": precise,
        "macro_recall": complete,
        "macro_f1": harmonic if f1 == "seed" else float(by_class.mean()),
    }
    return scores if probability is None else {**scores, **probability_scores(truth, probability, fold)}


def probability_scores(truth: np.ndarray, probability: np.ndarray, fold: np.ndarray | None = None) -> dict[str, float]:
    """Score class probabilities (cells, classes): ROC AUC, calibration error, Brier score, log loss."""
    probability = np.asarray(probability, dtype=np.float64)
    known = np.isfinite(probability).all(axis=1)
    if not known.any():
        return dict.fromkeys(("roc_auc", "calibration_error", "brier", "log_loss"), float("nan"))
    truth, probability = np.asarray(truth)[known], probability[known]
    fold = None if fold is None else fold[known]
    own = probability[np.arange(len(truth)), truth]
    onehot = np.eye(probability.shape[1])[truth]
    return {
        "roc_auc": roc_auc(truth, probability, fold),
        "calibration_error": calibration_error(probability.max(axis=1), probability.argmax(axis=1) == truth),
        "brier": float(((probability - onehot) ** 2).sum(axis=1).mean()),
        "log_loss": float(-np.log(np.clip(own, _LEAST, 1.0)).mean()),
    }


def roc_auc(truth: np.ndarray, probability: np.ndarray, fold: np.ndarray | None = None) -> float:
    """Return the mean area under the one-vs-rest ROC curves of the classes that some cells have and others have not.

    The area is the share of pairs of a cell of the class and another one that stand in the right order. In a cross-validation
    pairs within a `fold` count: models of different folds have learned other frequencies, and who answered would tell the class.
    """
    fold = np.zeros(len(truth), dtype=np.int64) if fold is None else fold
    areas = [_area(truth == k, probability[:, k], fold) for k in np.unique(truth)]
    known = [area for area in areas if area is not None]
    return float(np.mean(known)) if known else float("nan")


def _area(positive: np.ndarray, score: np.ndarray, fold: np.ndarray) -> float | None:
    from sklearn.metrics import roc_auc_score

    pairs, areas = [], []
    for number in np.unique(fold):
        here = fold == number
        n_positive = int(positive[here].sum())
        if 0 < n_positive < here.sum():
            pairs.append(n_positive * (int(here.sum()) - n_positive))
            areas.append(float(roc_auc_score(positive[here], score[here])))
    return float(np.average(areas, weights=pairs)) if pairs else None


def calibration_error(confidence: np.ndarray, right: np.ndarray, *, n_bins: int = N_BINS) -> float:
    """Return the expected calibration error of the class given, in bins of equal width :cite:p:`guo2017`."""
    return reliability(confidence, right, n_bins=n_bins).error


# ---- numbers --------------------------------------------------------------------------------------------------------


def regression_scores(truth: np.ndarray, predicted: np.ndarray, fold: np.ndarray | None = None) -> dict[str, float]:
    """Score numbers given to cells: MAE, R2 and Pearson's r; cells without a prediction are left out and counted.

    What gives all cells of a `fold` the same number correlates with nothing.
    """
    from scipy.stats import pearsonr
    from sklearn.metrics import mean_absolute_error, r2_score

    truth, predicted = np.asarray(truth, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
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


# ---- hidden genes ---------------------------------------------------------------------------------------------------


def masked_gene_scores(
    truth: np.ndarray, predicted: np.ndarray, log_probability: np.ndarray | None = None, *, high_bin: int = HIGH_BIN
) -> dict[str, float]:
    """Score the bins given to hidden genes, each against the true bin of the same gene.

    The rows of Bioformers' table. `within_one` counts what is off by one bin at most; `high` means bins above `high_bin`,
    each gene counted once; bin 0 means not expressed.

    Parameters
    ----------
    truth, predicted
        Bins (hidden genes,).
    log_probability
        Log of the probability that the true bin was given (hidden genes,).
    high_bin
        Last bin that does not count as high expression.
    """
    from sklearn.metrics import precision_recall_fscore_support

    truth, predicted = np.asarray(truth, dtype=np.int64), np.asarray(predicted, dtype=np.int64)
    off = np.abs(truth - predicted)
    zero, one, high = truth == 0, truth == 1, truth > high_bin
    precision, recall, f1, _ = precision_recall_fscore_support(
        truth, predicted, labels=np.unique(truth), average="macro", zero_division=0
    )
    scores = {
        "n_genes": float(len(truth)),
        "exact": _share(off == 0),
        "within_one": _share(off <= 1),
        "zero_exact": _share(predicted[zero] == 0),
        "one_exact": _share(predicted[one] == 1),
        "one_as_zero": _share(predicted[one] == 0),
    }
    for name, chosen in (("nonzero", ~zero), ("high", high)):
        scores[f"{name}_exact"] = _share(off[chosen] == 0)
        scores[f"{name}_within_one"] = _share(off[chosen] <= 1)
        scores[f"{name}_within_two"] = _share(off[chosen] <= 2)
    scores |= {"macro_precision": float(precision), "macro_recall": float(recall), "macro_f1": float(f1)}
    return _with_log_loss(scores, log_probability)


def ranked_gene_scores(
    truth: np.ndarray, predicted: np.ndarray, log_probability: np.ndarray | None = None
) -> dict[str, float]:
    """Score the genes given at hidden ranks: how many are the right ones."""
    scores = {"n_genes": float(len(truth)), "exact": _share(np.asarray(truth) == np.asarray(predicted))}
    return _with_log_loss(scores, log_probability)


def _with_log_loss(scores: Mapping[str, float], log_probability: np.ndarray | None) -> dict[str, float]:
    if log_probability is None:
        return {**scores, "log_loss": float("nan")}
    return {**scores, "log_loss": float(-np.maximum(log_probability, np.log(_LEAST)).mean())}


def _share(condition: np.ndarray) -> float:
    return float(np.mean(condition)) if len(condition) else float("nan")
