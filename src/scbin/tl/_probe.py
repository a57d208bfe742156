"""Linear probes by scikit-learn, the regularization chosen by cross-validation: the start of a head, and the baseline beside it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.sparse import csr_matrix, hstack, vstack
from scipy.special import log_softmax, softmax
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.model_selection import cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

from scbin.nn.embedding import log_normalised, token_expression
from scbin.nn.labels import LARGEST
from scbin.tl._labels import balanced_weights
from scbin.tl._split import folds_of

if TYPE_CHECKING:
    from scbin.get.predictions import Column
    from scbin.tokens.tokens import Tokens

CLASS_BASELINES = ("majority class", "logistic regression", "PCA + kNN")
NUMBER_BASELINES = ("mean", "ridge on genes", "ridge on PCA")
N_FOLDS, N_NEIGHBORS, N_COMPONENTS = 4, 15, 50
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
        spread = vectors.std(axis=0)
        squares = np.asarray(genes.multiply(genes).mean(axis=0)).ravel()
        deviation = np.sqrt(np.maximum(squares - np.asarray(genes.mean(axis=0)).ravel() ** 2, 0))
        factor = np.where(spread > 1e-6, 1 / np.maximum(spread, 1e-6), 0.0)
        gene_factor = np.where(deviation > 1e-3, 1 / np.maximum(deviation, 1e-3), 0.0)
        return cls(vectors.mean(axis=0), factor.astype(np.float32), gene_factor.astype(np.float32))

    def features(self, vectors: Any, genes: csr_matrix | None, weight: float) -> Any:
        """Return vectors times a weight beside the scaled expression (cells, features); dense where that fits."""
        parts = [(vectors - self.mean) * self.factor * np.float32(weight)] if weight else []
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


def fit_classes(
    features: Any,
    codes: np.ndarray,
    n_classes: int,
    *,
    class_weights: np.ndarray | None = None,
    donors: np.ndarray | None = None,
    strength: float | None = None,
    seed: int = 0,
) -> Probe:
    """Fit a logistic regression to classes (cells,), C chosen by cross-validated log loss, by donor where there are donors.

    Classes count by `class_weights` (classes,) in the fit and in the loss. With a `strength` nothing is chosen.
    """
    weights = np.ones(len(codes)) if class_weights is None else class_weights[codes]
    weights = weights / max(float(weights.mean()), 1e-12)
    held_out, truth = np.zeros((0, n_classes)), codes[:0]
    with warnings.catch_warnings():  # where it has not converged: the penalty matters more than the last digits
        warnings.simplefilter("ignore", ConvergenceWarning)
        if strength is None:
            rows = _some(len(codes), _MOST_TO_CHOOSE, seed)
            folds = _folds(codes[rows], None if donors is None else donors[rows], seed)
            strength, held_out = _choose_strength(features[rows], codes[rows], n_classes, weights[rows], folds)
            truth = codes[rows]
        rows = _some(len(codes), _MOST_TO_FIT, seed)
        model = LogisticRegression(C=strength, max_iter=500).fit(features[rows], codes[rows], weights[rows])
    return Probe(*_coefficients(model, n_classes), strength, held_out, truth)


def _choose_strength(
    features: Any, codes: np.ndarray, n_classes: int, weights: np.ndarray, folds: np.ndarray
) -> tuple[float, np.ndarray]:
    """Return the best C, and what it says of cells that it was not fitted to (cells, classes)."""
    models = {number: LogisticRegression(max_iter=200, tol=1e-3, warm_start=True) for number in np.unique(folds)}
    least, best = np.inf, (float(STRENGTHS[0]), np.zeros((len(codes), n_classes)))
    for strength in STRENGTHS:
        outputs = np.zeros((len(codes), n_classes))
        for number, model in models.items():
            train, test = folds != number, folds == number
            if len(np.unique(codes[train])) < 2:  # one class is left, which the fold can only guess
                outputs[test, codes[train][:1]] = _RARELY
                continue
            model.set_params(C=strength).fit(features[train], codes[train], weights[train])
            coefficients, bias = _coefficients(model, n_classes)
            outputs[test] = features[test] @ coefficients + bias
        loss = float((log_loss_of(outputs, codes) * weights).mean())
        if loss > 1.1 * least:  # it only rises from here, and the fits take longer
            break
        if loss < least:
            least, best = loss, (float(strength), outputs)
    return best


def log_loss_of(outputs: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Return the log loss of each cell, bounded where a class was given no chance at all (cells,)."""
    return -np.maximum(log_softmax(outputs, axis=1)[np.arange(len(codes)), codes], -16)


def fitted_temperature(outputs: np.ndarray, classes: np.ndarray, fewest: int = 10) -> float:
    """Return the temperature at which outputs (cells, classes) have the least log loss; 1 where fewer than `fewest` cells say."""
    if len(classes) < fewest:
        return 1.0
    rows, outputs = np.arange(len(classes)), np.asarray(outputs, dtype=np.float64)
    loss = lambda log_t: -log_softmax(outputs / np.exp(log_t), axis=1)[rows, classes].mean()
    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


def _coefficients(model: LogisticRegression, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return weights (features, classes) and bias (classes,); classes that were not seen are rare everywhere."""
    coefficients, bias = model.coef_.T, model.intercept_
    if coefficients.shape[1] == 1:  # two classes: their log-odds, shared out
        coefficients, bias = np.hstack([-coefficients, coefficients]) / 2, np.array([-bias[0], bias[0]]) / 2
    weights = np.repeat(coefficients.mean(axis=1, keepdims=True), n_classes, axis=1)
    all_bias = np.full(n_classes, bias.min() - _RARELY)
    weights[:, model.classes_], all_bias[model.classes_] = coefficients, bias
    return weights.astype(np.float64), all_bias.astype(np.float64)


def fit_numbers(
    features: Any, values: np.ndarray, *, donors: np.ndarray | None = None, strength: float | None = None, seed: int = 0
) -> Probe:
    """Fit a ridge regression to standardised numbers (cells,), alpha chosen by cross-validation, by donor where there are donors."""
    held_out, truth = np.zeros((0, 1)), values[:0]
    if len(values) < 2:
        return Probe(np.zeros((features.shape[1], 1)), np.zeros(1), float(ALPHAS[-1]), held_out, truth)
    if strength is None:
        rows = _some(len(values), _MOST_TO_CHOOSE, seed)
        folds = _folds(np.zeros(len(rows)), None if donors is None else donors[rows], seed)
        cv = [(np.flatnonzero(folds != number), np.flatnonzero(folds == number)) for number in np.unique(folds)]
        model = RidgeCV(ALPHAS, cv=cv, scoring="neg_mean_squared_error").fit(features[rows], values[rows])
        strength, truth = float(model.alpha_), values[rows]
        held_out = cross_val_predict(Ridge(strength), features[rows], truth, cv=cv)[:, None]
    rows = _some(len(values), _MOST_TO_FIT, seed)
    model = RidgeCV([strength]).fit(features[rows], values[rows])
    return Probe(model.coef_[:, None], np.atleast_1d(model.intercept_), strength, held_out, truth)


def _folds(codes: np.ndarray, donors: np.ndarray | None, seed: int) -> np.ndarray:
    """Return folds of the training cells, by donor where several are left."""
    folds = folds_of(codes, N_FOLDS, donors=donors, seed=seed)
    return folds if folds.max() > 0 else folds_of(codes, N_FOLDS, seed=seed)


def _some(n: int, most: int, seed: int) -> np.ndarray:
    """Return all rows, or so many drawn at random."""
    return np.arange(n) if n <= most else np.sort(np.random.default_rng(seed).choice(n, most, replace=False))


# ---- baselines ------------------------------------------------------------------------------------------------------


def baseline_predictions(
    method: str,
    train: csr_matrix,
    column: Column,
    rows: np.ndarray,
    test: csr_matrix,
    *,
    donors: np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Return what a simple method predicts for test cells: probabilities (cells, classes) or numbers (cells,).

    `train` and `test` are log expression; `rows` are the training cells in the column, `donors` theirs.
    """
    values, codes, n_classes = column.values[rows], column.codes(rows), len(column.classes)
    mean, scale = values.mean(), max(values.std(), 1e-12)
    if method == "mean":
        return np.full(test.shape[0], mean)
    if method == "majority class" or (column.kind == "class" and len(np.unique(codes)) == 1):
        return np.tile(np.bincount(codes, minlength=n_classes) / len(codes), (test.shape[0], 1))
    if "PCA" in method:
        n_components = max(min(N_COMPONENTS, train.shape[0] - 1, train.shape[1] - 1), 1)
        solver = "covariance_eigh" if train.shape[1] <= 5_000 else "arpack"
        pca = PCA(n_components, svd_solver=solver, random_state=seed)
        before, after = pca.fit_transform(train), pca.transform(test)
    else:
        scaler = Scaler.fit(np.zeros((1, 1)), train)
        before, after = (scaler.features(None, part, 0.0) for part in (train, test))
    if column.kind == "number":
        probe = fit_numbers(before, (values - mean) / scale, donors=donors, seed=seed)
        return probe.outputs(after)[:, 0] * scale + mean
    if method == "PCA + kNN":
        model = KNeighborsClassifier(min(N_NEIGHBORS, len(codes))).fit(before, codes)
        result = np.zeros((test.shape[0], n_classes))
        result[:, model.classes_] = model.predict_proba(after)
        return result
    weights = balanced_weights(codes, n_classes)
    probe = fit_classes(before, codes, n_classes, class_weights=weights, donors=donors, seed=seed)
    return softmax(probe.outputs(after) / fitted_temperature(probe.held_out, probe.truth), axis=1)
