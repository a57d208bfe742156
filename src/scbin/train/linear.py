"""Where fine-tuning starts: the linear answer from a cell's vector and the expression of its genes, fitted convexly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
from scipy.optimize import minimize
from scipy.special import log_softmax

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_FEW_CELLS = 300  # up to which it pays to work in the space that the cells span
_MAX_ITERATIONS, _TOLERANCE = 300, 5e-5
_LEAST_SPREAD = 0.1  # of the usual one: a gene that hardly varies is not made to count for more


@dataclass(frozen=True, eq=False)
class Features:
    """What the answer is linear in."""

    z: np.ndarray  # (cells, hidden), standardised
    x: sp.csr_matrix | None  # (cells, genes), expression of the tokens; None: the vector alone
    spread: np.ndarray | None = None  # (genes,), how much each gene varies beside the usual one

    def __getitem__(self, rows: np.ndarray) -> Features:
        return Features(self.z[rows], None if self.x is None else self.x[rows], self.spread)


@dataclass(frozen=True)
class Strength:
    """How much the data are believed.

    Parameters
    ----------
    vector, genes
        Prior variances (scikit-learn's `C`) of the weights of the standardised vector and of the genes; with 0 a part says
        nothing.
    evenness
        Power of its spread that a gene is divided by: 0 takes expression as it is, 1 lets all genes vary alike.
    """

    vector: float
    genes: float
    evenness: float = 0.0


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


def blended(parts: Sequence[tuple[Linear, float]]) -> Linear:
    """Return the linear answer that is the weighted sum of several."""
    x = [fit.x * weight for fit, weight in parts if fit.x is not None]
    return Linear(
        np.sum([fit.z * weight for fit, weight in parts], axis=0),
        np.sum(x, axis=0) if x else None,
        np.sum([fit.bias * weight for fit, weight in parts], axis=0),
    )


def spread_of(x: sp.csr_matrix) -> np.ndarray:
    """Return the standard deviation of each gene (genes,) in units of the median one."""
    mean = np.asarray(x.mean(axis=0)).ravel()
    deviation = np.sqrt(np.maximum(np.asarray(x.multiply(x).mean(axis=0)).ravel() - mean**2, 0))
    usual = np.median(deviation[deviation > 0]) if (deviation > 0).any() else 1.0
    return np.maximum(deviation / usual, _LEAST_SPREAD)


def fit_linear(
    features: Features,
    answers: np.ndarray,
    strength: Strength,
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
    strength
        Of the priors.
    cell_weights
        Weight of each cell in the loss (cells,). Default: 1.
    start
        Where to begin.
    iterations
        Most steps of the search.
    """
    weights = np.ones(len(answers)) if cell_weights is None else cell_weights
    columns = _Columns(features, strength)
    if len(answers) <= min(_FEW_CELLS, columns.n):
        return columns.split(*_fit_few(columns, answers, weights, iterations))
    first = np.zeros((columns.n + 1, n_outputs(answers))) if start is None else columns.join(start)
    found = _minimise(columns.times, columns.back, first, answers, weights, iterations)
    return columns.split(found[:-1], found[-1])


class _Columns:
    """All features beside each other, each in units in which its weights have prior variance 1."""

    def __init__(self, features: Features, strength: Strength):
        self.root_z = np.sqrt(strength.vector)
        self.z, self.x = features.z * self.root_z, None
        self.n_z, self.n = self.z.shape[1], self.z.shape[1]
        if features.x is not None:
            spread = np.ones(features.x.shape[1]) if features.spread is None else features.spread
            self.root_x = np.sqrt(strength.genes) * spread[:, None] ** -strength.evenness  # (genes, 1)
            self.x = sp.csr_matrix(features.x.multiply(self.root_x.T))
            self.transposed = self.x.T.tocsr()
            self.n += self.x.shape[1]

    def times(self, w: np.ndarray) -> np.ndarray:
        out: np.ndarray = self.z @ w[: self.n_z]
        return out if self.x is None else out + self.x @ w[self.n_z :]

    def back(self, slope: np.ndarray) -> np.ndarray:
        part: np.ndarray = self.z.T @ slope
        return part if self.x is None else np.concatenate([part, self.transposed @ slope])

    def split(self, w: np.ndarray, bias: np.ndarray) -> Linear:
        x = None if self.x is None else w[self.n_z :] * self.root_x
        return Linear(w[: self.n_z] * self.root_z, x, bias)

    def join(self, linear: Linear) -> np.ndarray:
        parts = [_in_units(linear.z, self.root_z)]
        if self.x is not None and linear.x is not None:
            parts.append(_in_units(linear.x, self.root_x))
        return np.concatenate([*parts, linear.bias[None]])


def _in_units(weights: np.ndarray, root: float | np.ndarray) -> np.ndarray:
    """Return weights in units of their priors' deviation, 0 where that is 0."""
    return weights / np.where(np.asarray(root) > 0, root, np.inf)


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
    first = np.zeros((len(root) + 1, n_outputs(answers)))
    found = _minimise(lambda w: cells @ w, lambda slope: cells.T @ slope, first, answers, weights, iterations)
    return columns.back((vectors / root) @ found[:-1]), found[-1]


def n_outputs(answers: np.ndarray) -> int:
    """Return how many numbers are answered for each cell."""
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
