"""The simple methods that everything has to be compared with, and the scores to do it. Arrays in, numbers out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from scbin._errors import ScbinInputError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix
    from sklearn.base import BaseEstimator

ClassBaseline = Literal["majority class", "logistic regression", "PCA + kNN"]
NumberBaseline = Literal["mean", "ridge on genes", "ridge on PCA"]
GeneBaseline = Literal["most frequent bin", "most frequent bin per gene", "mean bin per gene"]
RankBaseline = Literal["most frequent gene per rank", "mean rank"]
CLASS_BASELINES: tuple[str, ...] = get_args(ClassBaseline)
NUMBER_BASELINES: tuple[str, ...] = get_args(NumberBaseline)
N_NEIGHBORS = 15
N_COMPONENTS = 50
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
            "I58",
            f"{N_FOLDS} stratified folds need two labels or more with {N_FOLDS} cells each; {rarest!r} has "
            f"{counts.min()} of {len(labels):,} cells. Leave rare labels out before scoring.",
        )
    folds = StratifiedKFold(N_FOLDS, shuffle=True, random_state=seed)
    predicted = cross_val_predict(classifier, embedding, labels, cv=folds)
    return float(f1_score(labels, predicted, average="macro"))


# ---- trained on some cells, asked about others ----------------------------------------------------------------------


def class_probabilities(
    method: str, train: csr_matrix, codes: np.ndarray, test: csr_matrix, n_classes: int, *, seed: int = 0
) -> np.ndarray:
    """Return the probability of every class for every test cell (cells, classes).

    Parameters
    ----------
    method
        One of `CLASS_BASELINES`.
    train, test
        Log-normalised expression of the same genes (cells, genes).
    codes
        Class of each training cell; classes that no training cell has get probability 0.
    n_classes
        Number of columns to return.
    seed
        Of the PCA.
    """
    present, local = np.unique(codes, return_inverse=True)
    if method == "majority class" or len(present) == 1:
        shares = np.bincount(codes, minlength=n_classes) / len(codes)
        return np.tile(shares, (test.shape[0], 1))
    if method == "logistic regression":
        found = _logistic(train, local, test)
    elif method == "PCA + kNN":
        found = _neighbours(train, local, test, seed)
    else:
        raise ScbinInputError("E19", f"{method!r} is not a baseline. There are: {', '.join(CLASS_BASELINES)}.")
    probability = np.zeros((test.shape[0], n_classes))
    probability[:, present] = found
    return probability


def predicted_numbers(
    method: str, train: csr_matrix, values: np.ndarray, test: csr_matrix, *, seed: int = 0
) -> np.ndarray:
    """Return the number that a simple method gives to every test cell (cells,); `method` is one of `NUMBER_BASELINES`."""
    if method == "mean":
        return np.full(test.shape[0], float(values.mean()))
    if method not in NUMBER_BASELINES:
        raise ScbinInputError("E19", f"{method!r} is not a baseline. There are: {', '.join(NUMBER_BASELINES)}.")
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if method == "ridge on PCA":
        before, after = _components(train, test, seed)
    else:
        before, after = train.toarray(), test.toarray()
    ridge = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 6, 15)))
    return ridge.fit(before, values).predict(after)


def _logistic(train: csr_matrix, codes: np.ndarray, test: csr_matrix) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=2000).fit(train, codes).predict_proba(test)


def _neighbours(train: csr_matrix, codes: np.ndarray, test: csr_matrix, seed: int) -> np.ndarray:
    from sklearn.neighbors import KNeighborsClassifier

    before, after = _components(train, test, seed)
    return KNeighborsClassifier(min(N_NEIGHBORS, len(codes))).fit(before, codes).predict_proba(after)


def _components(train: csr_matrix, test: csr_matrix, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the principal components of the training cells, and the test cells among them."""
    from sklearn.decomposition import PCA

    n_components = min(N_COMPONENTS, train.shape[0] - 1, train.shape[1])
    few_genes = train.shape[1] <= _MOST_GENES_FOR_COVARIANCE
    fitted = PCA(max(n_components, 1), svd_solver="covariance_eigh" if few_genes else "auto", random_state=seed)
    before = fitted.fit_transform(train.toarray())
    return before, fitted.transform(test.toarray())


# ---- hidden genes ---------------------------------------------------------------------------------------------------


class BinCounts:
    """How often each gene had each bin where it was hidden in training cells."""

    def __init__(self, n_genes: int, n_levels: int):
        self.counts = np.zeros((n_genes, n_levels))

    def add(self, gene: np.ndarray, level: np.ndarray) -> None:
        """Take in hidden genes and their bins."""
        np.add.at(self.counts, (gene, level), 1)

    def answers(self, method: str, gene: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the bin given to each hidden gene, and the log-probability of the true one where the method has one.

        Genes never hidden before get what genes get on average.
        """
        overall = self.counts.sum(axis=0) + 1e-9
        if method == "most frequent bin":
            share = overall / overall.sum()
            return np.full(len(gene), int(share.argmax())), np.log(share)[truth]
        share = self.counts + overall / overall.sum()  # one more observation, of the average gene
        share /= share.sum(axis=1, keepdims=True)
        if method == "mean bin per gene":
            mean = share @ np.arange(share.shape[1])
            return np.rint(mean).astype(np.int64)[gene], None
        return share.argmax(axis=1)[gene], np.log(share[gene, truth])


class RankCounts:
    """At which rank each gene stood in training cells."""

    def __init__(self, n_genes: int, n_ranks: int):
        self.n_genes, self.n_ranks = n_genes, n_ranks
        self.best = np.zeros(n_ranks, dtype=np.int64)  # most frequent gene at each rank
        self.mean = np.full(n_genes, np.inf)

    def fit(self, gene: np.ndarray, rank: np.ndarray) -> RankCounts:
        """Count the genes of training cells."""
        from scipy.sparse import csr_matrix

        pairs = csr_matrix((np.ones(len(gene)), (rank, gene)), shape=(self.n_ranks, self.n_genes))
        self.best = np.asarray(pairs.argmax(axis=1)).ravel()
        counts = np.bincount(gene, minlength=self.n_genes)
        sums = np.bincount(gene, weights=rank, minlength=self.n_genes)
        self.mean = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
        return self

    def answers(self, method: str, rank: np.ndarray) -> np.ndarray:
        """Return the gene given at each hidden rank: the most frequent one there, or that of the nearest mean rank."""
        if method == "most frequent gene per rank":
            return self.best[rank]
        order = np.argsort(self.mean, kind="stable")
        order = order[np.isfinite(self.mean[order])]
        means = self.mean[order]
        right = np.clip(np.searchsorted(means, rank), 0, len(means) - 1)
        left = np.maximum(right - 1, 0)
        return order[np.where(np.abs(means[left] - rank) <= np.abs(means[right] - rank), left, right)]
