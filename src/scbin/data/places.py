"""Where cells lie by what the data alone say: among their neighbours, and across batches, along the leading components."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from scbin.data.loadings import gene_loadings, token_expression

if TYPE_CHECKING:
    from scbin.encoding.vocabulary import Vocabulary

N_COMPONENTS = 30
N_NEIGHBORS = 10
_SCALING = 0.85  # between genes as loud as they are and genes all alike
_FAR = 0.6  # share of the neighbours' neighbours in the average, beside the neighbours
_OWN, _AROUND = 1.6, 0.02  # how long a cell's own part is, in distances to the nearest fiftieth of all cells
_MEASURED = 500  # cells from which that distance is known well enough
_FEWEST = 8  # directions of a cell's own: in two, say, cells of one length would be a ring
_MUTUAL, _ANCHORS, _ROUNDS = 20, 80, 5  # many anchors: a way that cells of a kind share, not that of one of them


def places(
    tokens: sp.csr_matrix, vocabulary: Vocabulary, room: int, batches: np.ndarray | None = None, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return where cells lie (cells, components): what they share with others, and what they have for themselves.

    Principal components of partly standardised expression, cells of different batches brought together if asked for, and
    then seen among their neighbours.

    Parameters
    ----------
    tokens
        Token rows, none of them empty.
    vocabulary
        Of the tokens.
    room
        How many numbers both parts may have together.
    batches
        Which batch each cell is of (cells,).
    seed
        Of the solver's start.
    """
    loadings = gene_loadings(tokens, vocabulary, min(N_COMPONENTS, max(room // 2, 1)), scaling=_SCALING, seed=seed)
    scores = loadings.scores(token_expression(tokens, vocabulary))
    scores = scores - scores.mean(axis=0)
    return shared_and_own(scores if batches is None else across_batches(scores, batches))


def shared_and_own(scores: np.ndarray, n_neighbors: int = N_NEIGHBORS) -> tuple[np.ndarray, np.ndarray]:
    """Return what each cell shares with its neighbours, and what it has for itself (cells, components).

    What two cells of a kind differ in is mostly which molecules happened to be counted. In the average over neighbours, and
    theirs, it goes, and what kinds differ in stays. Alone, that makes each kind a thin sheet, which clustering cuts into pieces.
    So what a cell differs in from the average comes in columns of its own, where it blurs no border between kinds; and
    with the same length for all cells, so that none is everybody's neighbour for having little of it.

    Examples
    --------
    >>> scores = np.random.default_rng(0).normal(size=(100, 10))
    >>> shared, own = shared_and_own(scores)
    >>> bool(shared.std() < 0.5 * scores.std()), float(np.ptp(np.linalg.norm(own, axis=1)).round(6))
    (True, 0.0)
    """
    n_neighbors = min(n_neighbors, len(scores) // 5)  # of few cells the neighbours' neighbours would be all
    step = _walk(scores, n_neighbors)
    once = step @ scores
    shared = once + _FAR * (step @ once - once)
    if scores.shape[1] < _FEWEST:
        return shared, scores[:, :0]
    own = scores - shared
    own /= np.maximum(np.linalg.norm(own, axis=1, keepdims=True), 1e-12)
    return shared, _OWN * _reach(shared, n_neighbors) * own


def _reach(places: np.ndarray, n_neighbors: int) -> float:
    """Return how far the nearest fiftieth of all cells lies around a cell, and no fewer than its neighbours: the median."""
    some = places[:: -(-len(places) // _MEASURED)]
    n_around = max(int(_AROUND * len(places)), n_neighbors)
    around = _nearest(some, places, n_around + 1, distances=True)  # the cell itself is one of them
    return float(np.median(around.data.reshape(len(some), -1).max(axis=1)))


def _walk(scores: np.ndarray, n_neighbors: int) -> sp.csr_matrix:
    """Return the matrix that averages over a cell and all who are its neighbours or have it as theirs."""
    if n_neighbors < 1:
        return sp.identity(len(scores), format="csr")
    graph = _nearest(scores, scores, n_neighbors + 1)
    graph = ((graph + graph.T + sp.identity(len(scores))) > 0).astype(np.float64)
    return sp.csr_matrix(sp.diags(1 / np.asarray(graph.sum(axis=1)).ravel()) @ graph)


def across_batches(scores: np.ndarray, batches: np.ndarray) -> np.ndarray:
    """Return places in which the same kinds of cells of different batches lie together.

    Cells of two batches that are mutual nearest neighbours are taken for the same kind; each goes half the way to its
    partners, and the cells around it go along, a few times over. A kind that one batch lacks has no partners and stays
    (Haghverdi et al. 2018).

    Parameters
    ----------
    scores
        Where the cells lie (cells, components).
    batches
        Which batch each is of (cells,).
    """
    _, codes = np.unique(batches, return_inverse=True)
    for _ in range(_ROUNDS):
        directions = scores / np.maximum(np.linalg.norm(scores, axis=1, keepdims=True), 1e-12)
        move = np.zeros_like(scores)
        for batch in range(codes.max() + 1):
            mine, others = np.flatnonzero(codes == batch), np.flatnonzero(codes != batch)
            if len(others):
                move[mine] = _towards_partners(scores, directions, mine, others)
        scores = scores + move / 2
    return scores


def _towards_partners(scores: np.ndarray, directions: np.ndarray, mine: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the way from each of my cells to where its kind lies among the others (cells, components)."""
    forth = _nearest(directions[mine], directions[others], _MUTUAL)
    back = _nearest(directions[others], directions[mine], _MUTUAL)
    mutual = sp.csr_matrix(forth.multiply(back.T))
    n_partners = np.diff(mutual.indptr)
    anchors = np.flatnonzero(n_partners)
    if not len(anchors):
        return np.zeros((len(mine), scores.shape[1]))
    partners = sp.diags(1 / n_partners[anchors]) @ mutual[anchors] @ scores[others]
    ways = partners - scores[mine[anchors]]
    near = _nearest(directions[mine], directions[mine[anchors]], _ANCHORS, distances=True)
    far = near.data.reshape(len(mine), -1)
    third = far.shape[1] // 3  # of the anchors are within the width
    width = np.maximum(np.sort(far, axis=1)[:, [third]], 1e-9)
    near.data = np.exp(-0.5 * (far / width) ** 2).ravel()
    return np.asarray(sp.diags(1 / np.asarray(near.sum(axis=1)).ravel()) @ near @ ways)


def _nearest(cells: np.ndarray, among: np.ndarray, n_neighbors: int, *, distances: bool = False) -> sp.csr_matrix:
    """Return the nearest of some places to each cell (cells, among), as ones or as distances."""
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=min(n_neighbors, len(among))).fit(among)
    return search.kneighbors_graph(cells, mode="distance" if distances else "connectivity")
