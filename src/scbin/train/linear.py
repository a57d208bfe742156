"""Where fine-tuning starts: the linear answer from a cell's vector and the expression of its genes, fitted convexly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
from scipy.optimize import minimize
from scipy.special import log_softmax

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# prior variances of the weights of the standardised vector and of the genes: what cross-validation chooses from
_VARIANCES = ((1.0, 0.1), (0.3, 0.3), (0.1, 0.1), (0.1, 1.0), (1.0, 0.01), (1.0, 0.001))
_VECTOR_ALONE = ((1.0, 1.0), (0.1, 1.0), (0.01, 1.0), (10.0, 1.0))
_PRIOR_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_LEAST_GAIN = 0.005  # in macro-F1, before the answers are shifted at all
_LEAST_LOG = -8.0
_FEW_CELLS = 300  # up to which it pays to work in the space that the cells span
_MAX_ITERATIONS, _FEWER_ITERATIONS, _TOLERANCE = 300, 60, 5e-5  # the fewer where strengths are only compared


@dataclass(frozen=True, eq=False)
class Features:
    """What the answer is linear in."""

    z: np.ndarray  # (cells, hidden), standardised
    x: sp.csr_matrix | None  # (cells, genes), expression of the tokens; None: the vector alone

    def __getitem__(self, rows: np.ndarray) -> Features:
        return Features(self.z[rows], None if self.x is None else self.x[rows])


@dataclass(frozen=True, eq=False)
class Linear:
    """Weights of a linear answer."""

    z: np.ndarray  # (hidden, outputs)
    x: np.ndarray | None  # (genes, outputs)
    bias: np.ndarray  # (outputs,)

    def __call__(self, features: Features) -> np.ndarray:
        """Return the outputs (cells, outputs)."""
        out = features.z @ self.z + self.bias
        return out if self.x is None or features.x is None else out + features.x @ self.x


def fit_linear(
    features: Features,
    answers: np.ndarray,
    variances: tuple[float, float],
    *,
    cell_weights: np.ndarray | None = None,
    start: Linear | None = None,
    iterations: int = _MAX_ITERATIONS,
) -> Linear:
    """Return the linear answer with the least loss plus penalty, found by L-BFGS.

    Multinomial logistic regression where `answers` are classes, ridge regression where they are numbers; the weights have
    Gaussian priors with a variance for each part (scikit-learn's `C`), the bias has none.

    Parameters
    ----------
    features
        Of the cells.
    answers
        Shares of the classes (cells, classes), one of them 1; or numbers (cells,) with mean 0 and variance 1.
    variances
        Prior variance of the weights of the vector and of the genes.
    cell_weights
        Weight of each cell in the loss (cells,). Default: 1.
    start
        Where to begin.
    iterations
        Most steps of the search.
    """
    weights = np.ones(len(answers)) if cell_weights is None else cell_weights
    columns = _Columns(features, variances)
    if len(answers) <= min(_FEW_CELLS, columns.n):
        return columns.split(*_fit_few(columns, answers, weights, iterations))
    first = np.zeros((columns.n + 1, _n_outputs(answers))) if start is None else columns.join(start)
    found = _minimise(columns.times, columns.back, first, answers, weights, iterations)
    return columns.split(found[:-1], found[-1])


class _Columns:
    """All features beside each other, each in units in which its weights have prior variance 1."""

    def __init__(self, features: Features, variances: tuple[float, float]):
        self.root = np.sqrt(variances)
        self.z, self.x = features.z * self.root[0], None
        self.n_z, self.n = self.z.shape[1], self.z.shape[1]
        if features.x is not None:
            self.x = sp.csr_matrix(features.x * self.root[1])
            self.transposed = self.x.T.tocsr()
            self.n += self.x.shape[1]

    def times(self, w: np.ndarray) -> np.ndarray:
        out: np.ndarray = self.z @ w[: self.n_z]
        return out if self.x is None else out + self.x @ w[self.n_z :]

    def back(self, slope: np.ndarray) -> np.ndarray:
        part: np.ndarray = self.z.T @ slope
        return part if self.x is None else np.concatenate([part, self.transposed @ slope])

    def split(self, w: np.ndarray, bias: np.ndarray) -> Linear:
        return Linear(
            w[: self.n_z] * self.root[0], None if self.x is None else w[self.n_z :] * self.root[1], bias
        )  # fmt: skip

    def join(self, linear: Linear) -> np.ndarray:
        parts = [linear.z / self.root[0], linear.bias[None]]
        if linear.x is not None:
            parts.insert(1, linear.x / self.root[1])
        return np.concatenate(parts)


def _fit_few(
    columns: _Columns, answers: np.ndarray, weights: np.ndarray, iterations: int
) -> tuple[np.ndarray, np.ndarray]:
    """Fit in the space that the cells span, where the best weights lie: as many unknowns as cells, not as features."""
    gram = columns.z @ columns.z.T
    if columns.x is not None:
        gram += (columns.x @ columns.transposed).toarray()
    values, vectors = np.linalg.eigh(gram)
    kept = values > values[-1] * 1e-10
    root = np.sqrt(values[kept])
    vectors = vectors[:, kept]
    cells = vectors * root
    first = np.zeros((len(root) + 1, _n_outputs(answers)))
    found = _minimise(lambda w: cells @ w, lambda slope: cells.T @ slope, first, answers, weights, iterations)
    return columns.back((vectors / root) @ found[:-1]), found[-1]


def _n_outputs(answers: np.ndarray) -> int:
    return answers.shape[1] if answers.ndim == 2 else 1


def _minimise(
    times: Callable[[np.ndarray], np.ndarray],
    back: Callable[[np.ndarray], np.ndarray],
    first: np.ndarray,
    answers: np.ndarray,
    weights: np.ndarray,
    iterations: int,
) -> np.ndarray:
    """Return the weights, the bias below them, with the least mean loss plus half their squares over the cells."""
    scale = max(float(weights.sum()), 1.0)

    def mean_loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = flat.reshape(first.shape)
        value, slope = _loss(times(w[:-1]) + w[-1], answers)
        slope *= weights[:, None]
        gradient = np.concatenate([back(slope) + w[:-1], slope.sum(0, keepdims=True)])
        return (float(weights @ value) + 0.5 * float(np.square(w[:-1]).sum())) / scale, gradient.ravel() / scale

    found = minimize(
        mean_loss, first.ravel(), jac=True, method="L-BFGS-B",
        options={"maxiter": iterations, "gtol": _TOLERANCE, "ftol": 1e-9, "maxcor": 20},
    )  # fmt: skip
    return found.x.reshape(first.shape)


def _loss(out: np.ndarray, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss of each cell (cells,) and its slope (cells, outputs)."""
    if answers.ndim == 1:
        error = out[:, 0] - answers
        return 0.5 * np.square(error), error[:, None]
    log_shares = log_softmax(out, axis=1)
    return -(answers * log_shares).sum(1), np.exp(log_shares) - answers


# ---- how much to believe the data -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Choice:
    """What cross-validation chose, and the answers it chose by."""

    variances: tuple[float, float]
    prior_share: float  # of the log frequencies of the classes that is taken off the outputs
    outputs: np.ndarray  # (cells, outputs), each by a fit that did not see the cell
    loss: float  # mean over the cells


def choose_classes(
    features: Features,
    classes: np.ndarray,
    n_classes: int,
    folds: np.ndarray,
    *,
    class_weights: np.ndarray | None = None,
    rebalance: float | None = None,
) -> Choice:
    """Choose the strengths of both penalties by log loss, and how far rare classes are favoured by macro-F1.

    A penalised regression leans towards the frequent classes, for it shrinks what speaks against them. Taking off a share of
    their log frequencies makes up for that; where it does not help, the share is 0.

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
    rebalance
        That share, where it is given.
    """
    cell_weights = None if class_weights is None else class_weights[classes]
    prior = log_prior(classes, n_classes, class_weights)
    rows = np.arange(len(classes))
    best: tuple[float, tuple[float, float], np.ndarray] | None = None
    for variances, outputs in _by_folds(features, np.eye(n_classes)[classes], folds, cell_weights):
        # a class that a fold's fit has not seen is as good as impossible there; that must not decide
        tempered = np.maximum(log_softmax(outputs, axis=1), _LEAST_LOG)
        losses = [-log_softmax(tempered - share * prior, axis=1)[rows, classes] for share in _PRIOR_SHARES]
        loss = min(float(np.average(each, weights=cell_weights)) for each in losses)
        if best is None or loss < best[0]:
            best = loss, variances, outputs
    assert best is not None
    loss, variances, outputs = best
    if rebalance is None:
        scores = [_macro_f1(classes, (outputs - share * prior).argmax(1), n_classes) for share in _PRIOR_SHARES]
        rebalance = _PRIOR_SHARES[int(np.argmax(scores))] if max(scores) >= scores[0] + _LEAST_GAIN else 0.0
    return Choice(variances, rebalance, outputs - rebalance * prior, loss)


def choose_numbers(features: Features, numbers: np.ndarray, folds: np.ndarray) -> Choice:
    """Choose the strengths of both penalties by the squared error of numbers (cells,) with variance 1."""
    best: Choice | None = None
    for variances, outputs in _by_folds(features, numbers, folds, None):
        loss = float(np.square(outputs[:, 0] - numbers).mean())
        if best is None or loss < best.loss:
            best = Choice(variances, 0.0, outputs, loss)
    assert best is not None
    return best


def log_prior(classes: np.ndarray, n_classes: int, class_weights: np.ndarray | None = None) -> np.ndarray:
    """Return the log frequency of each class (classes,), as the weights make it."""
    counts = np.maximum(np.bincount(classes, minlength=n_classes), 0.5)
    weighted = counts if class_weights is None else counts * class_weights
    shares: np.ndarray = np.log(weighted / weighted.sum())
    return shares


def _by_folds(
    features: Features, answers: np.ndarray, folds: np.ndarray, cell_weights: np.ndarray | None
) -> Iterator[tuple[tuple[float, float], np.ndarray]]:
    """Yield strengths of the penalties with the outputs (cells, outputs), each by a fit to the other folds."""
    starts: dict[int, Linear] = {}
    for variances in _VECTOR_ALONE if features.x is None else _VARIANCES:
        outputs = np.empty((len(answers), _n_outputs(answers)))
        for fold in np.unique(folds):
            fit, judge = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
            weights = None if cell_weights is None else cell_weights[fit]
            starts[fold] = fit_linear(
                features[fit],
                answers[fit],
                variances,
                cell_weights=weights,
                start=starts.get(fold),
                iterations=_FEWER_ITERATIONS,
            )
            outputs[judge] = starts[fold](features[judge])
        yield variances, outputs


def _macro_f1(true: np.ndarray, given: np.ndarray, n_classes: int) -> float:
    """Return the mean over the classes of 2 right / (true + given)."""
    right = np.bincount(true[true == given], minlength=n_classes)
    both = np.bincount(true, minlength=n_classes) + np.bincount(given, minlength=n_classes)
    return float(np.mean(2 * right[both > 0] / both[both > 0]))
