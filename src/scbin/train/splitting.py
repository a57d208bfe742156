"""Counts split into a half that the network sees and one that its cell vector has to predict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit
from scipy.sparse import csr_matrix

from scbin._errors import ScbinInputError
from scbin.nn.embedding import gene_values
from scbin.train.randomness import SPLIT, SPLIT_SHARE, cell_key, mix, random_key, uniform

if TYPE_CHECKING:
    from scbin.tokens.vocabulary import Vocabulary

EXACT = 128
"""Up to so many molecules are drawn one by one; of more, a rounded normal number is as good as binomial."""


def split_rows(
    rows: csr_matrix, cells: np.ndarray, vocabulary: Vocabulary, visible: tuple[float, float], *, seed: int, epoch: int
) -> tuple[csr_matrix, csr_matrix, np.ndarray | None]:
    """Split the counts of some cells (rows,): what is shown, what is hidden, and which genes are asked about.

    Of counts, each molecule is visible with a probability q that is drawn for each cell between the two of `visible`. Of
    other units, whole genes are visible with this probability. All is a function of (seed, epoch, cell).

    Returns
    -------
    Token rows of the visible half; the counts of the hidden one (cells, genes) float32; and whether each gene is asked about
    (cells, genes), `None` where all are.
    """
    genes, values = gene_values(rows, vocabulary)
    key, n_genes = random_key(seed, epoch), len(vocabulary.genes)
    owner = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
    if vocabulary.unit == "counts":
        counts, asked = np.rint(values).astype(np.int64), None
        shown = split_counts(rows.indptr, genes, counts, cells, key, *visible)
        hidden, kept = counts - shown, rows_with_counts(rows, shown, vocabulary)
    else:
        asked = ~visible_genes(cells, n_genes, key, *visible)  # (cells, genes)
        hides = (genes >= 0) & asked[owner, genes]
        hidden, kept = np.where(hides, values, 0), rows_without(rows, hides, vocabulary)
    at = hidden > 0
    matrix = csr_matrix((hidden[at].astype(np.float32), (owner[at], genes[at])), shape=(rows.shape[0], n_genes))
    return kept, matrix, asked


def rows_with_counts(rows: csr_matrix, counts: np.ndarray, vocabulary: Vocabulary) -> csr_matrix:
    """Return rows whose gene tokens say other counts (tokens,), and `[DEPTH]` their sum; where zeros are dropped, genes without any go."""
    bins = vocabulary.bins
    if bins is None or bins.per != "all":
        raise ScbinInputError(
            "M04", "counts can be split only where the tokens hold counts in bins that all genes share."
        )
    is_gene = vocabulary.is_gene_token(rows.data)
    table = np.searchsorted(np.asarray(bins.edges), np.arange(int(np.ceil(bins.edges[-1])) + 1), side="right")
    level = table[np.minimum(counts, len(table) - 1)]
    ids = np.where(is_gene, vocabulary.group_start[rows.indices] + level, rows.data)
    if vocabulary.depth is not None:
        owner = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
        depth = np.asarray(vocabulary.depth.ids(np.bincount(owner, np.where(is_gene, counts, 0), rows.shape[0])))
        known = (rows.indices == vocabulary.depth.position) & (rows.data != vocabulary.depth.first_id)
        ids = np.where(known, depth[owner], ids)
    changed = csr_matrix((ids.astype(rows.dtype), rows.indices, rows.indptr), shape=rows.shape)
    return changed if vocabulary.keeps_zeros else _select(changed, ~is_gene | (level > 0))


def rows_without(rows: csr_matrix, drop: np.ndarray, vocabulary: Vocabulary) -> csr_matrix:
    """Return rows without some of their gene tokens (tokens,); where positions are ranks, later tokens move up."""
    if vocabulary.keeps_zeros:  # a gene that is not shown is masked
        ids = np.where(drop, vocabulary.mask_id, rows.data).astype(rows.dtype)
        return csr_matrix((ids, rows.indices, rows.indptr), shape=rows.shape)
    if not vocabulary.position_is_gene:
        dropped = np.concatenate([[0], np.cumsum(drop)])
        before = dropped[:-1] - np.repeat(dropped[rows.indptr[:-1]], np.diff(rows.indptr))
        rows = csr_matrix((rows.data, rows.indices - before.astype(rows.indices.dtype), rows.indptr), shape=rows.shape)
    return _select(rows, ~drop)


def _select(rows: csr_matrix, keep: np.ndarray) -> csr_matrix:
    """Return rows with some of their tokens (tokens,)."""
    bounds = np.concatenate([[0], np.cumsum(keep)])[rows.indptr]
    return csr_matrix((rows.data[keep], rows.indices[keep], bounds), shape=rows.shape)


@njit(cache=True, nogil=True)
def split_counts(indptr: Any, genes: Any, counts: Any, cells: Any, seed_key: Any, low: Any, high: Any) -> Any:
    """Return how many of the molecules of each token are visible (tokens,): binomial, with q drawn for each cell."""
    shown = np.zeros(len(counts), dtype=np.int64)
    for i in range(len(cells)):
        key = cell_key(seed_key, cells[i])
        q = low + (high - low) * uniform(key, SPLIT_SHARE, 0)
        for j in range(indptr[i], indptr[i + 1]):
            n = counts[j]
            if n <= 0:
                continue
            token = mix(key + np.uint64(genes[j] + 1))
            if n <= EXACT:
                for molecule in range(n):
                    shown[j] += uniform(token, SPLIT, molecule) < q
            else:
                radius = np.sqrt(-2 * np.log(1 - uniform(token, SPLIT, 0)))  # Box and Muller
                normal = radius * np.cos(2 * np.pi * uniform(token, SPLIT, 1))
                shown[j] = min(max(round(n * q + np.sqrt(n * q * (1 - q)) * normal), 0), n)
    return shown


@njit(cache=True, nogil=True)
def visible_genes(cells: Any, n_genes: Any, seed_key: Any, low: Any, high: Any) -> Any:
    """Return whether each gene of each cell is visible (cells, genes), expressed or not."""
    shown = np.empty((len(cells), n_genes), dtype=np.bool_)
    for i in range(len(cells)):
        key = cell_key(seed_key, cells[i])
        q = low + (high - low) * uniform(key, SPLIT_SHARE, 0)
        for gene in range(n_genes):
            shown[i, gene] = uniform(mix(key + np.uint64(gene + 1)), SPLIT, 0) < q
    return shown
