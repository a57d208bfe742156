"""What the data say about genes before any training: the loadings of a truncated SVD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import LinearOperator, svds

if TYPE_CHECKING:
    from scbin.encoding.vocabulary import Vocabulary

MOST_CELLS = 20_000  # more change the leading directions little
_CLIP = 10.0  # standard deviations, as in scanpy's scale: a gene of a few cells shall not own a direction
_MOST_WEIGHT, _LEAST_WEIGHT = 5.0, 1e-6  # times the median weight


def token_expression(tokens: sp.csr_matrix, vocabulary: Vocabulary) -> sp.csr_matrix:
    """Return the expression (cells, genes) that the tokens stand for: the centre of each bin, or 1 for a ranked gene."""
    is_gene = vocabulary.is_gene_token(tokens.data)
    ids = tokens.data[is_gene].astype(np.int64)
    rows = np.repeat(np.arange(tokens.shape[0]), np.diff(tokens.indptr))[is_gene]
    genes = vocabulary.genes_at(ids, tokens.indices[is_gene])
    values = vocabulary.token_values[ids]
    return sp.csr_matrix((values, (rows, genes)), shape=(tokens.shape[0], len(vocabulary.genes)))


@dataclass(frozen=True, eq=False)
class Loadings:
    """The leading directions of standardised expression: scores of a cell are `standardised @ directions`."""

    directions: np.ndarray  # (genes, components), orthonormal columns; zero rows for genes that no cell expresses
    spreads: np.ndarray  # (components,), standard deviations of the scores, decreasing
    scale: np.ndarray  # (genes,), one over the standard deviation of each gene; zero where it does not vary
    ceiling: np.ndarray  # (genes,), what scaled expression is cut off at

    def scores(self, expression: sp.csr_matrix) -> np.ndarray:
        """Return where cells with this expression lie along the directions (cells, components); not centred."""
        return np.asarray(_scaled(expression, self.scale, self.ceiling) @ self.directions)

    def table(self) -> np.ndarray:
        """Return one row per gene (genes, components): its direction, with strong components longer than weak ones.

        The root is between the directions themselves, which make all components alike, and their product with the spreads,
        which leaves two or three.
        """
        return self.directions * np.sqrt(self.spreads / self.spreads[0])

    def weights(self) -> np.ndarray:
        """Return how much each gene says about a cell (genes,), with mean 1.

        The mean of the rows of `table`, normed and so weighted, is what the truncated SVD would say.
        """
        weights = np.linalg.norm(self.table(), axis=1) * self.scale
        typical = np.median(weights[weights > 0]) if (weights > 0).any() else 1.0
        # a gene seen in three cells shall not own them; one that never varied shall not count, unless a cell has no other
        weights = np.clip(weights, _LEAST_WEIGHT * typical, _MOST_WEIGHT * typical)
        return weights / weights.mean()


def gene_loadings(
    tokens: sp.csr_matrix,
    vocabulary: Vocabulary,
    n_components: int,
    cells: np.ndarray | None = None,
    *,
    scaling: float = 1.0,
    seed: int = 0,
) -> Loadings:
    """Return the leading directions of the standardised expression that the tokens stand for.

    The truncated SVD behind PCA on scaled data. The matrix is centred and scaled implicitly and never made dense.

    Parameters
    ----------
    tokens
        Token matrix of the cells.
    vocabulary
        Its vocabulary.
    n_components
        Number of directions; fewer are returned where the matrix has fewer.
    cells
        The cells to look at. Default: all that are not empty, at most 20,000 of them drawn at random.
    scaling
        Power of the standard deviation that each gene is divided by: 1 makes all genes alike, 0 leaves them as they are.
    seed
        Of that draw and of the solver's start.

    Examples
    --------
    >>> import scipy.sparse as sp
    >>> from scbin.encoding.vocabulary import Vocabulary
    >>> vocabulary = Vocabulary.build("rank", ["A", "B", "C"], max_length=6)
    >>> tokens = sp.csr_matrix(np.array([[2, 4, 5, 6], [2, 4, 6, 7], [2, 4, 5, 0], [2, 4, 7, 0]], dtype=np.uint16))
    >>> gene_loadings(tokens, vocabulary, 2).directions.shape
    (3, 2)
    """
    generator = np.random.default_rng(seed)
    cells = np.flatnonzero(np.diff(tokens.indptr)) if cells is None else np.asarray(cells)
    if len(cells) > MOST_CELLS:
        cells = np.sort(generator.choice(cells, MOST_CELLS, replace=False))
    expression = token_expression(tokens[cells], vocabulary).astype(np.float64)
    scale, ceiling = _scales(expression, scaling)
    scaled = _scaled(expression, scale, ceiling)
    n_components = min(n_components, int((scale > 0).sum()) - 1, len(cells) - 1)
    if n_components < 1:
        n_genes = len(scale)
        return Loadings(np.zeros((n_genes, 1)), np.ones(1), scale, ceiling)
    centre = np.asarray(scaled.mean(axis=0)).ravel()
    transposed = scaled.T.tocsr()
    operator = LinearOperator(
        scaled.shape,
        dtype=np.float64,
        matvec=lambda vector: scaled @ vector.ravel() - centre @ vector.ravel(),
        rmatvec=lambda vector: transposed @ vector.ravel() - centre * vector.sum(),
    )
    _, values, vectors = svds(operator, k=n_components, v0=generator.standard_normal(min(scaled.shape)))
    order = np.argsort(-values)
    vectors, values = vectors[order], values[order]
    signs = np.sign(vectors[np.arange(len(vectors)), np.abs(vectors).argmax(axis=1)])  # as in scikit-learn's svd_flip
    return Loadings((vectors * signs[:, None]).T, np.maximum(values, 1e-12) / np.sqrt(len(cells)), scale, ceiling)


def _scales(expression: sp.csr_matrix, scaling: float) -> tuple[np.ndarray, np.ndarray]:
    """Return by what each gene is multiplied, and where what comes out is cut off."""
    mean = np.asarray(expression.mean(axis=0)).ravel()
    variance = np.asarray(expression.multiply(expression).mean(axis=0)).ravel() - mean**2
    varies = variance > 1e-12
    deviation = np.sqrt(np.where(varies, variance, 1.0))
    scale = np.where(varies, deviation**-scaling, 0.0)
    return scale, scale * (mean + _CLIP * deviation)


def _scaled(expression: sp.csr_matrix, scale: np.ndarray, ceiling: np.ndarray) -> sp.csr_matrix:
    """Return expression with its genes on one scale, cut off but not centred."""
    scaled = sp.csr_matrix(expression @ sp.diags(scale))
    scaled.data = np.minimum(scaled.data, ceiling[scaled.indices])
    return scaled
