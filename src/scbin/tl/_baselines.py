"""The simple methods that every embedding has to be compared with, and the scores to do it. Arrays in, numbers out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scbin._errors import ScbinInputError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix
    from sklearn.base import BaseEstimator

N_NEIGHBORS = 15
N_FOLDS = 5
_MOST_GENES_FOR_COVARIANCE = 2_000


def pca(log1p: np.ndarray | csr_matrix, n_components: int = 50, *, seed: int = 0) -> np.ndarray:
    """Return the first principal components of the centred matrix (cells, components), as float32."""
    from sklearn.decomposition import PCA

    dense = log1p.toarray() if hasattr(log1p, "toarray") else np.asarray(log1p)
    few_genes = dense.shape[1] <= _MOST_GENES_FOR_COVARIANCE  # exact and fast there, cubic in the genes beyond
    n_components = min(n_components, min(dense.shape) - (0 if few_genes else 1))
    solver = "covariance_eigh" if few_genes else "arpack"
    return PCA(n_components, svd_solver=solver, random_state=seed).fit_transform(dense).astype(np.float32)


def knn_macro_f1(embedding: np.ndarray, labels: np.ndarray, *, n_neighbors: int = N_NEIGHBORS, seed: int = 0) -> float:
    """Macro-F1 of the label that most of a held-out cell's nearest neighbours carry."""
    from sklearn.neighbors import KNeighborsClassifier

    return _macro_f1(KNeighborsClassifier(n_neighbors), embedding, labels, seed)


def logistic_macro_f1(embedding: np.ndarray, labels: np.ndarray, *, seed: int = 0) -> float:
    """Macro-F1 of a logistic regression on the standardised embedding, on held-out cells."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return _macro_f1(make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)), embedding, labels, seed)


def _macro_f1(classifier: BaseEstimator, embedding: np.ndarray, labels: np.ndarray, seed: int) -> float:
    """Score the predictions for all cells at once, each made by a classifier that did not see the cell's fold."""
    from sklearn.metrics import f1_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    labels = np.asarray(labels).astype(str)
    names, counts = np.unique(labels, return_counts=True)
    if len(names) < 2 or counts.min() < N_FOLDS:
        rarest = str(names[counts.argmin()])
        raise ScbinInputError(
            "I40",
            f"{N_FOLDS} stratified folds need two labels or more with {N_FOLDS} cells each; {rarest!r} has "
            f"{counts.min()} of {len(labels):,} cells. Leave rare labels out before scoring.",
        )
    folds = StratifiedKFold(N_FOLDS, shuffle=True, random_state=seed)
    predicted = cross_val_predict(classifier, embedding, labels, cv=folds)
    return float(f1_score(labels, predicted, average="macro"))
