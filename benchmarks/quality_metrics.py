"""Scores of embeddings after scIB (Luecken et al. 2022), in a few lines each over scikit-learn, umap and igraph.

Arrays in, numbers out. All lie between 0 and 1 (ARI may fall a little below), larger is better.
"""

from __future__ import annotations

import random

import numpy as np
import scipy.sparse as sp

RESOLUTIONS = np.round(np.arange(0.1, 2.01, 0.1), 1)  # of Leiden, as in scIB
LABEL_SCORES = (
    "knn_f1", "logistic_f1", "kmeans_nmi", "kmeans_ari", "leiden_nmi", "leiden_ari", "leiden1_nmi", "leiden1_ari", "silhouette",
)  # fmt: skip
BATCH_SCORES = ("ilisi", "batch_asw", "connectivity", "kbet")
CONSERVATION = ("knn_f1", "kmeans_nmi", "leiden_nmi", "silhouette")  # the mean of these is called label conservation
_LISI_NEIGHBORS, _PERPLEXITY, _GRAPH_NEIGHBORS, _FOLDS = 90, 30, 15, 5


def label_scores(embedding: np.ndarray, labels: np.ndarray, *, seed: int = 0) -> dict[str, float]:
    """Return how well labels that no method saw can be read from an embedding (cells, numbers)."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score

    from scbin.tl._baselines import knn_macro_f1, logistic_macro_f1

    n_labels = len(np.unique(labels))
    groups = KMeans(n_labels, n_init=10, random_state=seed).fit_predict(embedding)
    by_resolution = leiden(embedding, seed=seed)
    nmi = {r: normalized_mutual_info_score(labels, found) for r, found in by_resolution.items()}
    best = max(nmi, key=nmi.__getitem__)
    folds = enough(labels)
    return {
        "knn_f1": knn_macro_f1(embedding[folds], labels[folds], seed=seed),
        "logistic_f1": logistic_macro_f1(embedding[folds], labels[folds], seed=seed),
        "kmeans_nmi": normalized_mutual_info_score(labels, groups),
        "kmeans_ari": adjusted_rand_score(labels, groups),
        "leiden_nmi": nmi[best],
        "leiden_ari": adjusted_rand_score(labels, by_resolution[best]),
        "leiden1_nmi": nmi[1.0],
        "leiden1_ari": adjusted_rand_score(labels, by_resolution[1.0]),
        "silhouette": (silhouette_score(embedding, labels) + 1) / 2,
    }


def enough(labels: np.ndarray) -> np.ndarray:
    """Return which cells have a label frequent enough for every fold."""
    _, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return (counts >= _FOLDS)[codes]


def leiden(embedding: np.ndarray, *, seed: int = 0) -> dict[float, np.ndarray]:
    """Return clusters at each resolution, of one graph with UMAP's weights between 15 nearest neighbours, as scanpy's."""
    import igraph
    from umap.umap_ import fuzzy_simplicial_set

    distances, indices = nearest(embedding, _GRAPH_NEIGHBORS - 1)
    own = np.arange(len(embedding))[:, None]  # umap counts the cell itself as its first neighbour
    weights = fuzzy_simplicial_set(
        sp.coo_matrix((len(embedding), 1)), _GRAPH_NEIGHBORS, np.random.RandomState(seed), "euclidean",
        knn_indices=np.hstack([own, indices]), knn_dists=np.hstack([0.0 * own, distances]).astype(np.float32),
    )[0]  # fmt: skip
    upper = sp.coo_matrix(sp.triu(weights, k=1))
    graph = igraph.Graph(n=len(embedding), edges=np.column_stack([upper.row, upper.col]))
    igraph.set_random_number_generator(random.Random(seed))
    return {
        float(r): np.array(
            graph.community_leiden("modularity", weights=upper.data, resolution=float(r), n_iterations=2).membership
        )
        for r in RESOLUTIONS
    }


def batch_scores(embedding: np.ndarray, labels: np.ndarray, batches: np.ndarray) -> dict[str, float]:
    """Return how well batches lie over one another, label by label where scIB does so."""
    _, codes = np.unique(batches, return_inverse=True)
    asw, accepted, connected = [], [], []
    _, indices = nearest(embedding, _GRAPH_NEIGHBORS)
    rows = np.repeat(np.arange(len(embedding)), indices.shape[1])
    graph = sp.csr_matrix((np.ones(len(rows)), (rows, indices.ravel())), shape=(len(embedding),) * 2)
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        pieces = sp.csgraph.connected_components(graph[mine][:, mine], directed=False)[1]
        connected.append(np.bincount(pieces).max() / len(mine))
        if 1 < len(np.unique(codes[mine])) < len(mine):
            asw.append(_batch_asw(embedding[mine], codes[mine]))
            accepted.append(_kbet(embedding[mine], codes[mine]))
    return {
        "ilisi": _ilisi(embedding, codes),
        "batch_asw": float(np.mean(asw)),
        "connectivity": float(np.mean(connected)),
        "kbet": float(np.mean(accepted)),
    }


def _batch_asw(embedding: np.ndarray, codes: np.ndarray) -> float:
    from sklearn.metrics import silhouette_samples

    return float(np.mean(1 - np.abs(silhouette_samples(embedding, codes))))


def _ilisi(embedding: np.ndarray, codes: np.ndarray) -> float:
    """Median of the effective number of batches around a cell (Korsunsky et al. 2019), 0 for one and 1 for all."""
    distances, indices = nearest(embedding, min(_LISI_NEIGHBORS, len(embedding) - 1))
    weights = _perplex(distances)
    n_batches = codes.max() + 1
    shares = np.stack([(weights * (codes[indices] == batch)).sum(1) for batch in range(n_batches)], axis=1)
    return float((np.median(1 / (shares**2).sum(1)) - 1) / (n_batches - 1))


def _perplex(distances: np.ndarray) -> np.ndarray:
    """Return weights that fall with the distance and, in each row, have the perplexity asked for: bisection of all rows."""
    perplexity = min(_PERPLEXITY, distances.shape[1] / 3)
    low, high, beta = np.zeros(len(distances)), np.full(len(distances), np.inf), np.ones(len(distances))
    for _ in range(60):
        weights = np.exp(-(distances - distances[:, :1]) * beta[:, None])
        weights /= weights.sum(1, keepdims=True)
        entropy = -(weights * np.log(np.maximum(weights, 1e-300))).sum(1)
        wide = entropy > np.log(perplexity)
        low, high = np.where(wide, beta, low), np.where(wide, high, beta)
        beta = np.where(np.isinf(high), beta * 2, (low + np.minimum(high, 1e300)) / 2)
    return weights


def _kbet(embedding: np.ndarray, codes: np.ndarray) -> float:
    """Share of cells around whom the batches have the shares that they have in the label, by a chi-square test at 5 %."""
    from scipy.stats import chi2

    present, codes = np.unique(codes, return_inverse=True)
    n_neighbors = int(min(np.clip(len(codes) / len(present) / 4, 10, 100), len(codes) - 1))
    _, indices = nearest(embedding, n_neighbors)
    expected = n_neighbors * np.bincount(codes) / len(codes)
    found = np.stack([(codes[indices] == batch).sum(1) for batch in range(len(present))], axis=1)
    statistic = ((found - expected) ** 2 / expected).sum(1)
    return float(np.mean(chi2.sf(statistic, len(present) - 1) >= 0.05))


def nearest(embedding: np.ndarray, n_neighbors: int) -> tuple[np.ndarray, np.ndarray]:
    """Return distances and rows of the nearest other cells (cells, neighbours)."""
    from sklearn.neighbors import NearestNeighbors

    return NearestNeighbors(n_neighbors=n_neighbors, algorithm="brute").fit(embedding).kneighbors()
