"""How much the linear answer believes the data: regressions of several strengths, judged on cells that they have not seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import log_softmax

from scbin.nn.prediction import calibrated, shares
from scbin.train.linear import Strength, fit_linear, n_outputs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scbin.train.linear import Features, Linear

_STRENGTHS = (
    Strength(0.1, 0.1),
    Strength(1.0, 0.1),
    Strength(1.0, 0.01),
    Strength(1.0, 0.001),
    Strength(0.1, 1.0),
    Strength(0.0, 1.0),
    Strength(0.0, 0.01),
    Strength(0.0, 0.1, 0.5),
    Strength(0.1, 0.1, 0.5),
    Strength(0.1, 0.01, 0.5),
)
_VECTOR_ALONE = tuple(Strength(variance, 0.0) for variance in (1.0, 0.1, 0.01, 10.0))
# cells of one donor share its number, so there are fewer numbers to learn from than cells, and perhaps nothing to be learned
_CAUTIOUS = (
    Strength(0.01, 0.01),
    Strength(0.001, 0.001),
    Strength(1e-4, 1e-4),
    Strength(0.0, 1e-3),
    Strength(0.0, 1e-5),
    Strength(0.0, 0.0),
)
_CAUTIOUS_VECTOR_ALONE = tuple(Strength(variance, 0.0) for variance in (1e-3, 1e-4, 1e-5, 0.0))
_MOST_PICKS, _MOST_MEMBERS = 6, 3
_LEAST_GAIN = 0.002  # in the loss, for one more pick
_PRIOR_SHARES = (0.25, 0.5, 0.75, 1.0)  # none at all gains a hundredth at best, and can cost a tenth
_CLOSE = 0.01  # of the best macro-F1
_LEAST_LOG = -8.0  # a class that a fold's fit has not seen is as good as impossible there; that must not decide
_ITERATIONS = 60  # where fits are only compared


@dataclass(frozen=True, eq=False)
class Choice:
    """What cross-validation chose, and how good that was."""

    members: tuple[tuple[Strength, float], ...]  # regressions, each with the weight of its outputs in their sum
    loss: float  # mean over the cells
    prior_share: float = 0.0  # of the log frequencies of the classes that is taken off the outputs
    temperature: float = 1.0


def choose_numbers(features: Features, numbers: np.ndarray, folds: np.ndarray) -> Choice:
    """Choose regressions of numbers (cells,) with variance 1 by their squared error; their mean alone is one of them."""
    strengths = _candidates(features) + (_CAUTIOUS_VECTOR_ALONE if features.x is None else _CAUTIOUS)
    found = [by_folds(features, numbers, [(strength, 1.0)], folds) for strength in strengths]
    parts, loss = _blend(found, lambda outputs: float(np.square(outputs[:, 0] - numbers).mean()))
    return Choice(tuple((strength, part) for strength, part in zip(strengths, parts, strict=True) if part), loss)


def choose_classes(
    features: Features,
    classes: np.ndarray,
    n_classes: int,
    folds: np.ndarray,
    *,
    class_weights: np.ndarray | None = None,
) -> Choice:
    """Choose logistic regressions of classes by their log loss, each at its best temperature.

    Parameters
    ----------
    features
        Of the cells.
    classes
        Class of each cell (cells,).
    n_classes
        Number of classes.
    folds
        Fold of each cell (cells,).
    class_weights
        Weight of each class in the loss (classes,).
    """
    cell_weights = None if class_weights is None else class_weights[classes]
    answers, rows = np.eye(n_classes)[classes], np.arange(len(classes))

    def loss_of(outputs: np.ndarray) -> float:
        return float(np.average(-log_softmax(outputs, axis=1)[rows, classes], weights=cell_weights))

    strengths, found, temperatures = _candidates(features), [], []
    for strength in strengths:
        outputs = by_folds(features, answers, [(strength, 1.0)], folds, cell_weights=cell_weights)
        temperatures.append(calibrated(outputs, classes))
        found.append(outputs / temperatures[-1])
    parts, loss = _blend(found, loss_of)
    chosen = zip(strengths, parts, temperatures, strict=True)
    return Choice(tuple((strength, part / warmth) for strength, part, warmth in chosen if part), loss)


def by_folds(
    features: Features,
    answers: np.ndarray,
    members: Sequence[tuple[Strength, float]],
    folds: np.ndarray,
    *,
    cell_weights: np.ndarray | None = None,
) -> np.ndarray:
    """Return the weighted sum of regressions' outputs (cells, outputs), for each cell by fits to the other folds.

    Outputs of classes are logs of probabilities, none of them below a floor.
    """
    total = np.zeros((len(answers), n_outputs(answers)))
    starts: dict[int, Linear] = {}
    for strength, weight in members:
        for fold in np.unique(folds):
            fit, judge = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
            weights = None if cell_weights is None else cell_weights[fit]
            starts[fold] = fit_linear(
                features[fit], answers[fit], strength, cell_weights=weights, start=starts.get(fold),
                iterations=_ITERATIONS,
            )  # fmt: skip
            outputs = starts[fold](features[judge])
            if answers.ndim == 2:
                outputs = np.maximum(log_softmax(outputs, axis=1), _LEAST_LOG)
            total[judge] += weight * outputs
    return total


def rebalanced(outputs: np.ndarray, classes: np.ndarray, prior: np.ndarray) -> float:
    """Return the share of the log frequencies that is best taken off the outputs, for the sake of macro-F1.

    A penalised regression leans towards the frequent classes, for it shrinks what speaks against them. Two estimates of macro-F1
    are averaged: the score itself, which a handful of rare cells can decide, and the score to be expected if the probabilities
    are right. Of shares that are as good to a hundredth of the score the least is taken; none at all is not
    among them, for on few cells the scores say little, and it can cost much.

    Parameters
    ----------
    outputs
        Of cells that were not fitted on (cells, classes).
    classes
        Class of each cell (cells,).
    prior
        Log frequencies of the classes (classes,).
    """
    truth = np.eye(outputs.shape[1])[classes]
    expected = shares(outputs, calibrated(outputs, classes))
    scores = []
    for share in _PRIOR_SHARES:
        given = np.eye(outputs.shape[1])[(outputs - share * prior).argmax(axis=1)]
        scores.append((_macro_f1(truth, given) + _macro_f1(expected, given)) / 2)
    close = np.flatnonzero(np.array(scores) >= max(scores) * (1 - _CLOSE))
    return _PRIOR_SHARES[int(close[0])]


def log_prior(classes: np.ndarray, n_classes: int, class_weights: np.ndarray | None = None) -> np.ndarray:
    """Return the log frequency of each class (classes,), as the weights make it; 0 where a class has no weight."""
    counts = np.maximum(np.bincount(classes, minlength=n_classes), 0.5)
    weighted = counts if class_weights is None else counts * class_weights
    return np.log(weighted / weighted.sum(), out=np.zeros(n_classes), where=weighted > 0)


def _candidates(features: Features) -> tuple[Strength, ...]:
    return _VECTOR_ALONE if features.x is None else _STRENGTHS


def _blend(found: Sequence[np.ndarray], loss_of: Callable[[np.ndarray], float]) -> tuple[list[float], float]:
    """Return the part of each method in their mean (methods,), and the loss of that mean: the best next one is added, in turn."""
    picks: list[int] = []
    total, loss = np.zeros_like(found[0]), np.inf
    for _ in range(_MOST_PICKS):
        full = len(set(picks)) == _MOST_MEMBERS
        losses = [
            np.inf if full and k not in picks else loss_of((total + outputs) / (len(picks) + 1))
            for k, outputs in enumerate(found)
        ]
        best = int(np.argmin(losses))
        if picks and losses[best] > loss * (1 - _LEAST_GAIN):
            break
        picks.append(best)
        total, loss = total + found[best], losses[best]
    return [picks.count(k) / len(picks) for k in range(len(found))], loss


def _macro_f1(truth: np.ndarray, given: np.ndarray) -> float:
    """Return the mean over the classes of 2 right / (true + given), from how much each cell is of each class (cells, classes)."""
    right, both = (truth * given).sum(axis=0), truth.sum(axis=0) + given.sum(axis=0)
    return float(np.mean(2 * right[both > 0] / both[both > 0]))
