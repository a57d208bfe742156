"""Where cells lie by what the data alone say: leading components, drawn together with neighbours, brought together over batches."""

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
_SHARES = (0.15, 0.35, 0.5)  # of the cell itself, its neighbours, and their neighbours
_MUTUAL, _ANCHORS, _ROUNDS = 20, 80, 5  # many anchors: a way that cells of a kind share, not that of one of them


def places(
    tokens: sp.csr_matrix, vocabulary: Vocabulary, batches: np.ndarray | None = None, *, seed: int = 0
) -> np.ndarray:
    """Return where cells lie (cells, components), the leading components first.

    Principal components of partly standardised expression. Without batches each cell is drawn towards its neighbours; with
    batches, cells that find each other across them are.

    Parameters
    ----------
    tokens
        Token rows, none of them empty.
    vocabulary
        Of the tokens.
    batches
        Which batch each cell is of (cells,).
    seed
        Of the solver's start.
    """
    loadings = gene_loadings(tokens, vocabulary, N_COMPONENTS, scaling=_SCALING, seed=seed)
    scores = loadings.scores(token_expression(tokens, vocabulary))
    scores = scores - scores.mean(axis=0)
    return with_neighbors(scores) if batches is None else across_batches(scores, batches)


def with_neighbors(scores: np.ndarray, n_neighbors: int = N_NEIGHBORS) -> np.ndarray:
    """Return each cell's place averaged with those of its nearest neighbours, and of theirs.

    What two cells of a kind differ in is mostly which molecules happened to be counted; it goes, and what kinds differ in
    stays. The weights were chosen by measurement: more of it makes tighter groups that are further apart, and splits them.

    Examples
    --------
    >>> with_neighbors(np.array([[0.0], [1.0], [10.0], [11.0]]), n_neighbors=1).ravel()
    array([ 0.425,  0.575, 10.425, 10.575])
    """
    step = _walk(scores, min(n_neighbors, len(scores) - 1))
    once = step @ scores
    own, near, far = _SHARES
    return own * scores + near * once + far * (step @ once)


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
