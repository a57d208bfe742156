"""What the data say about genes before any training: the loadings of a truncated SVD."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import LinearOperator, svds

if TYPE_CHECKING:
    from scbin.encoding.vocabulary import Vocabulary

MOST_CELLS = 20_000  # more change the leading directions little
_CLIP = 10.0  # standard deviations, as in scanpy's scale: a gene of a few cells shall not own a direction


def token_expression(tokens: sp.csr_matrix, vocabulary: Vocabulary) -> sp.csr_matrix:
    """Return the expression (cells, genes) that the tokens stand for: the centre of each bin, or 1 for a ranked gene."""
    is_gene = vocabulary.is_gene_token(tokens.data)
    ids = tokens.data[is_gene].astype(np.int64)
    rows = np.repeat(np.arange(tokens.shape[0]), np.diff(tokens.indptr))[is_gene]
    if vocabulary.position_is_gene:
        genes = tokens.indices[is_gene] - vocabulary.first_gene_position
    else:
        genes = ids - vocabulary.first_gene_id
    values = vocabulary.token_values[ids]
    return sp.csr_matrix((values, (rows, genes)), shape=(tokens.shape[0], len(vocabulary.genes)))


def gene_loadings(
    tokens: sp.csr_matrix, vocabulary: Vocabulary, n_components: int, cells: np.ndarray | None = None, *, seed: int = 0
) -> np.ndarray:
    """Return the loadings of the genes on the leading directions of their standardised expression.

    These are the right singular vectors times the singular values, per square root of the number of cells: the dot product of
    two rows approximates the correlation of two genes. The matrix is centred and scaled implicitly and never made dense.

    Parameters
    ----------
    tokens
        Token matrix of the cells.
    vocabulary
        Its vocabulary.
    n_components
        Number of directions; fewer are returned where the matrix has fewer.
    cells
        The cells to look at. Default: all, at most 20,000 drawn at random.
    seed
        Of that draw and of the solver's start.

    Returns
    -------
    An array (genes, components), zero for genes that no cell expresses.

    Examples
    --------
    >>> import scipy.sparse as sp
    >>> from scbin.encoding.vocabulary import Vocabulary
    >>> vocabulary = Vocabulary.build("rank", ["A", "B", "C"], max_length=6)
    >>> tokens = sp.csr_matrix(np.array([[2, 4, 5, 6], [2, 4, 6, 7], [2, 4, 5, 0], [2, 4, 7, 0]], dtype=np.uint16))
    >>> gene_loadings(tokens, vocabulary, 2).shape
    (3, 2)
    """
    generator = np.random.default_rng(seed)
    cells = np.flatnonzero(np.diff(tokens.indptr)) if cells is None else np.asarray(cells)
    if len(cells) > MOST_CELLS:
        cells = np.sort(generator.choice(cells, MOST_CELLS, replace=False))
    expression = token_expression(tokens[cells], vocabulary).astype(np.float64)
    n_cells, n_genes = expression.shape
    mean = np.asarray(expression.mean(axis=0)).ravel()
    variance = np.asarray(expression.multiply(expression).mean(axis=0)).ravel() - mean**2
    seen = variance > 1e-12
    scale = np.where(seen, 1 / np.sqrt(np.where(seen, variance, 1.0)), 0.0)
    scaled = sp.csr_matrix(expression @ sp.diags(scale))
    scaled.data = np.minimum(scaled.data, (mean * scale)[scaled.indices] + _CLIP)
    centre = np.asarray(scaled.mean(axis=0)).ravel()
    n_components = min(n_components, int(seen.sum()) - 1, n_cells - 1)
    if n_components < 1:
        return np.zeros((n_genes, 1))
    transposed = scaled.T.tocsr()
    operator = LinearOperator(
        scaled.shape,
        dtype=np.float64,
        matvec=lambda vector: scaled @ vector.ravel() - centre @ vector.ravel(),
        rmatvec=lambda vector: transposed @ vector.ravel() - centre * vector.sum(),
    )
    start = generator.standard_normal(min(scaled.shape))
    _, values, vectors = svds(operator, k=n_components, v0=start)
    order = np.argsort(-values)
    vectors, values = vectors[order], values[order]
    signs = np.sign(vectors[np.arange(len(vectors)), np.abs(vectors).argmax(axis=1)])  # as in scikit-learn's svd_flip
    return (vectors * (signs * values / np.sqrt(n_cells))[:, None]).T
