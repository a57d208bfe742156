"""Linear probes by scikit-learn, the regularization chosen by cross-validation: the start of a head, and the baseline beside it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.sparse import csr_matrix, hstack, vstack
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from scbin.nn.labels import LARGEST
from scbin.nn.packs import log_normalised, token_expression
from scbin.tl._split import folds_of

if TYPE_CHECKING:
    from scbin.tokens.tokens import Tokens

N_FOLDS = 4
STRENGTHS = np.logspace(-4, 1, 6)  # C of the logistic regression
ALPHAS = np.logspace(0, 6, 7)  # of the ridge regression
_MOST_TO_CHOOSE, _MOST_TO_FIT, _MOST_DENSE = 5_000, 50_000, 2 * 10**8  # cells, cells, numbers
_RARELY = 6.0  # a class that a fold has not seen gets so much less than the least of the others, in log probability
_BLOCK = 8_192  # cells


def log_expression(tokens: Tokens, rows: np.ndarray) -> csr_matrix:
    """Return the log expression of the vocabulary's genes that the tokens hold (cells, genes), as the heads read it."""
    vocabulary = tokens.vocabulary
    parts = [csr_matrix((0, len(vocabulary.genes)), dtype=np.float32)]
    for first in range(0, len(rows), _BLOCK):
        own = token_expression(tokens.take(np.asarray(rows[first : first + _BLOCK])), vocabulary)
        parts.append(csr_matrix(log_normalised(own, vocabulary), dtype=np.float32))
    return csr_matrix(vstack(parts))


@dataclass(frozen=True, eq=False)
class Scaler:
    """Means and factors that bring the features of the training cells to the same spread; expression keeps its zeros."""

    mean: np.ndarray  # (vector,)
    factor: np.ndarray  # (vector,)
    gene_factor: np.ndarray  # (genes,)

    @classmethod
    def fit(cls, vectors: np.ndarray, genes: csr_matrix) -> Scaler:
        """Fit to the vectors (cells, size) and the log expression of genes (cells, genes) of training cells."""
        of_vector, of_genes = StandardScaler().fit(vectors), StandardScaler(with_mean=False).fit(genes)
        factors = ((1 / each.scale_).astype(np.float32) for each in (of_vector, of_genes))
        return cls(of_vector.mean_.astype(np.float32), *factors)

    def features(self, vectors: Any, genes: csr_matrix | None, weight: float) -> Any:
        """Return vectors times a weight beside the scaled expression (cells, features); dense where that fits."""
        parts: list[Any] = [(vectors - self.mean) * self.factor * np.float32(weight)] if weight else []
        if genes is not None:
            scaled = csr_matrix(genes.multiply(self.gene_factor[None, :]), dtype=np.float32)
            scaled.data = np.minimum(scaled.data, LARGEST)
            if np.prod(scaled.shape, dtype=np.float64) > _MOST_DENSE:
                return csr_matrix(hstack([*map(csr_matrix, parts), scaled]), dtype=np.float32)
            parts.append(scaled.toarray())
        return np.hstack(parts, dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear model: outputs are `features @ weights + bias`."""

    weights: np.ndarray  # (features, outputs)
    bias: np.ndarray  # (outputs,)
    strength: float  # C of the logistic regression, or alpha of the ridge
    held_out: np.ndarray  # what it says of training cells when fitted to the others (cells, outputs); empty: not asked
    truth: np.ndarray  # (cells,) class or number of these cells

    def outputs(self, features: Any) -> np.ndarray:
        """Return log-odds (cells, classes), or numbers (cells, 1)."""
        return np.asarray(features @ self.weights) + self.bias


def fit_probe(
    features: Any,
    values: np.ndarray,
    n_classes: int,
    *,
    class_weights: np.ndarray | None = None,
    donors: np.ndarray | None = None,
    strength: float | None = None,
    seed: int = 0,
) -> Probe:
    """Fit a logistic regression to classes (cells,), or with `n_classes=0` a ridge regression to standardised numbers.

    C or alpha are chosen by cross-validated loss, by donor where there are donors, unless a `strength` is given. Classes count by
    `class_weights` (classes,) in the fit and in the loss.
    """
    values = values.astype(np.int64) if n_classes else values
    weights = class_weights[values] if n_classes and class_weights is not None else np.ones(len(values))
    weights = weights / max(float(weights.mean()), 1e-12)
    held_out, truth = np.zeros((0, n_classes or 1)), values[:0]
    if strength is None:
        rows = some_of(len(values), _MOST_TO_CHOOSE, seed)
        codes, truth = values[rows] if n_classes else np.zeros(len(rows)), values[rows]
        folds = folds_of(codes, N_FOLDS, donors=None if donors is None else donors[rows], seed=seed)
        folds = folds if folds.any() else folds_of(codes, N_FOLDS, seed=seed)  # a single donor
        strength, held_out = _chosen(features[rows], truth, n_classes, weights[rows], folds)
    rows = some_of(len(values), _MOST_TO_FIT, seed)
    model = LogisticRegression(C=strength, max_iter=500) if n_classes else Ridge(strength)
    return Probe(*_fitted(model, features[rows], values[rows], weights[rows], n_classes), strength, held_out, truth)


def some_of(n: int, most: int, seed: int) -> np.ndarray:
    """Return all of n rows, or so many drawn at random."""
    return np.arange(n) if n <= most else np.sort(np.random.default_rng(seed).choice(n, most, replace=False))


def _chosen(
    features: Any, values: np.ndarray, n_classes: int, weights: np.ndarray, folds: np.ndarray
) -> tuple[float, np.ndarray]:
    """Return the best C or alpha, and what it says of cells that it was not fitted to (cells, outputs)."""
    make = (lambda: LogisticRegression(max_iter=200, tol=1e-3, warm_start=True)) if n_classes else Ridge
    models: dict[int, Any] = {number: make() for number in np.unique(folds)}
    least, best = np.inf, (1.0, np.zeros((len(values), n_classes or 1)))
    for strength in STRENGTHS if n_classes else ALPHAS:
        outputs = np.zeros((len(values), n_classes or 1))
        for number, model in models.items():
            train = folds != number
            model.set_params(**{"C" if n_classes else "alpha": strength})
            coefficients, bias = _fitted(model, features[train], values[train], weights[train], n_classes)
            outputs[~train] = features[~train] @ coefficients + bias
        loss = float((losses_of(outputs, values, n_classes) * weights).mean())
        if loss > 1.1 * least:  # it only rises from here, and the fits take longer
            break
        if loss < least:
            least, best = loss, (float(strength), outputs)
    return best


def _fitted(
    model: Any, features: Any, values: np.ndarray, weights: np.ndarray, n_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return weights (features, outputs) and bias (outputs,); classes that were not seen are rare everywhere."""
    seen = np.unique(values)
    if len(seen) < 2:  # nothing to tell apart
        bias = _RARELY * np.isin(np.arange(n_classes), seen) if n_classes else np.zeros(1)
        return np.zeros((features.shape[1], n_classes or 1)), bias
    with warnings.catch_warnings():  # where it has not converged: the penalty matters more than the last digits
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features, values, weights)
    coefficients, bias = np.atleast_2d(model.coef_).T, np.atleast_1d(model.intercept_)
    if not n_classes:
        return coefficients, bias
    if len(seen) == 2:  # their log-odds, shared out
        coefficients, bias = np.hstack([-coefficients, coefficients]) / 2, np.append(-bias, bias) / 2
    all_weights = np.repeat(coefficients.mean(axis=1, keepdims=True), n_classes, axis=1)
    all_bias = np.full(n_classes, bias.min() - _RARELY)
    all_weights[:, seen], all_bias[seen] = coefficients, bias
    return all_weights.astype(np.float64), all_bias


def losses_of(outputs: np.ndarray, values: np.ndarray, n_classes: int) -> np.ndarray:
    """Return the log loss (bounded where a class was given no chance at all), or squared error, of each cell (cells,)."""
    if not n_classes:
        return np.square(outputs[:, 0] - values)
    return -np.maximum(log_softmax(outputs, axis=1)[np.arange(len(values)), values], -16)


def fitted_temperature(outputs: np.ndarray, classes: np.ndarray, fewest: int = 10) -> float:
    """Return the temperature at which outputs (cells, classes) have the least log loss; 1 where fewer than `fewest` cells say."""
    if len(classes) < fewest:
        return 1.0
    rows, outputs = np.arange(len(classes)), np.asarray(outputs, dtype=np.float64)
    loss = lambda log_t: -log_softmax(outputs / np.exp(log_t), axis=1)[rows, classes].mean()
    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))
