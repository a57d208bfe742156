"""Rows with some of their genes left out at random, so that an answer learns not to hang on a few of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_matrix

from scbin.data._mask_kernel import hash_uniform

if TYPE_CHECKING:
    from scbin.encoding.vocabulary import Vocabulary

_PURPOSE = 14  # a stream of random numbers of its own
_PLACES = 2**20  # more than a row has positions


def drop_genes(tokens: csr_matrix, cells: np.ndarray, vocabulary: Vocabulary, share: float, key: int) -> csr_matrix:
    """Return the rows of some cells with a share of the gene tokens left out, a function of (key, cell, position) alone.

    Specials and phenotype slots stay, and so does one gene of every cell.

    Parameters
    ----------
    tokens
        Token matrix.
    cells
        Rows of it, in the order they shall have.
    vocabulary
        Of the tokens.
    share
        Probability that a gene is left out.
    key
        Stands for the seed and the epoch.

    Examples
    --------
    >>> from scbin.encoding.vocabulary import Vocabulary
    >>> vocabulary = Vocabulary.build("rank", ["A", "B", "C"], max_length=8)
    >>> tokens = csr_matrix(np.array([[2, 4, 5, 6, 7, 3, 0, 0]], dtype=np.uint16))
    >>> drop_genes(tokens, np.array([0]), vocabulary, 0.5, key=1).nnz <= tokens.nnz
    True
    """
    rows = csr_matrix(tokens[cells])
    if share == 0:
        return rows
    lengths = np.diff(rows.indptr)
    items = np.repeat(np.asarray(cells, dtype=np.int64), lengths) * _PLACES + rows.indices
    number = hash_uniform(np.uint64(key), items, _PURPOSE)
    is_gene = vocabulary.is_gene_token(rows.data)
    kept = ~is_gene | (number >= share)
    owner = np.repeat(np.arange(len(cells)), lengths)
    bare = np.bincount(owner[kept & is_gene], minlength=len(cells)) == 0
    for row in np.flatnonzero(bare & (np.bincount(owner[is_gene], minlength=len(cells)) > 0)):
        span = slice(rows.indptr[row], rows.indptr[row + 1])
        kept[rows.indptr[row] + np.argmax(np.where(is_gene[span], number[span], -1))] = True
    bounds = np.concatenate([[0], np.cumsum(np.bincount(owner[kept], minlength=len(cells)))])
    return csr_matrix((rows.data[kept], rows.indices[kept], bounds), shape=rows.shape)
