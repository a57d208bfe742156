"""Cells into rows of tokens: the genes as the encoding writes them, with special tokens and phenotypes around."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from scbin.tokens.kernels import frame_rows, frozen, over_rows
from scbin.tokens.values import TARGET, RowReader
from scbin.tokens.vocabulary import CLS, END, START

if TYPE_CHECKING:
    from scipy import sparse

    from scbin.tokens.values import Reading, Rows
    from scbin.tokens.vocabulary import GeneTokens, Vocabulary


@dataclass(frozen=True, eq=False)
class Encoded:
    """Tokens of a block of rows, and what the encoder saw of each row."""

    tokens: sparse.csr_matrix
    totals: np.ndarray  # sum of the counts, or of logs where counts are not known (rows,)
    matched: np.ndarray  # of these, what lies in the vocabulary
    cut: np.ndarray  # of these, what did not fit into max_length
    rounded: int  # rows whose counts could not be had back exactly from their logs

    @property
    def status(self) -> np.ndarray:
        """Whether each row has tokens (0), no counts (1), or no gene of the vocabulary (2) (rows,)."""
        return np.where(self.totals <= 0, 1, np.where(np.diff(self.tokens.indptr) == 0, 2, 0))


class Encoder:
    """Encodes row blocks with one vocabulary; blocks are independent of each other.

    `columns` says which gene of the vocabulary each column is (-1: none, -2: not a gene count). Rows are CSR arrays with
    sorted, unique columns.
    """

    def __init__(self, vocabulary: Vocabulary, columns: np.ndarray, reading: Reading):
        self.vocabulary = vocabulary
        self._reader = RowReader(columns, reading)
        self._in_order = bool((np.diff(columns[columns >= 0]) > 0).all())

    def encode(self, block: Any, phenotype_ids: np.ndarray) -> Encoded:
        """Encode the rows of a block; `phenotype_ids` is (rows, phenotypes)."""
        vocabulary, reading, reads = self.vocabulary, self._reader.reading, self.vocabulary.codec.reads(self.vocabulary)
        reads = "counts" if reads == "any" and reading.exact else reads
        rows = self._reader.read(block, reads, TARGET if vocabulary.bins is None else vocabulary.bins.target_sum)
        counts = self._reader.read(block, "counts") if rows.logs and reading.counted else rows
        prefix = self._prefix(phenotype_ids, counts.matched if reading.counted else None)
        genes = vocabulary.codec.encode(vocabulary, rows)
        tokens = self._framed(genes, prefix, rows.matched > 0)
        cut = np.zeros(rows.n) if genes.cut is None else genes.cut
        if np.diff(tokens.indptr).max(initial=0) > vocabulary.max_length:
            tokens, cut = _shorten(tokens, rows, vocabulary)
        exact = rows.exact if vocabulary.depth is None else counts.exact  # of counts that make tokens
        rounded = 0 if exact is None else int((~exact & (counts.totals > 0)).sum())
        if counts is not rows:
            cut = cut * counts.matched / np.maximum(rows.matched, 1e-300)
        return Encoded(tokens, counts.totals, counts.matched, cut, rounded)

    def _prefix(self, phenotype_ids: np.ndarray, depth: np.ndarray | None) -> np.ndarray:
        """Return the tokens before the genes (rows, first gene position)."""
        vocabulary = self.vocabulary
        prefix = np.zeros((len(phenotype_ids), vocabulary.first_gene_position), dtype=np.uint32)
        if CLS in vocabulary.specials:
            prefix[:, 0] = vocabulary.specials[CLS]
        if START in vocabulary.specials:
            prefix[:, -1] = vocabulary.specials[START]
        for k, phenotype in enumerate(vocabulary.phenotypes):
            prefix[:, phenotype.position] = phenotype_ids[:, k]
        if vocabulary.depth is not None:
            prefix[:, vocabulary.depth.position] = vocabulary.depth.ids(depth)
        return prefix

    def _framed(self, genes: GeneTokens, prefix: np.ndarray, expressed: np.ndarray) -> sparse.csr_matrix:
        """Put specials and phenotypes around the genes; a row without genes, or in which none is expressed, stays empty."""
        vocabulary = self.vocabulary
        end_id = vocabulary.specials.get(END, 0)
        lengths = np.where(expressed, genes.lengths, 0)
        sizes = np.where(lengths > 0, lengths + (prefix > 0).sum(axis=1) + (end_id > 0), 0)
        indptr = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        ids, positions = np.empty(indptr[-1], dtype=vocabulary.dtype), np.empty(indptr[-1], dtype=np.int32)
        fixed = vocabulary.position_is_gene
        own = (genes.offsets, lengths, genes.ids.astype(vocabulary.dtype, copy=False), genes.places, prefix)
        end = (end_id, vocabulary.n_positions - 1 if fixed else -1)
        over_rows(frame_rows, frozen(indptr), *map(frozen, own), *end, ids, positions)
        tokens = vocabulary.matrix(ids, positions, indptr)
        if fixed and not self._in_order:
            tokens.has_sorted_indices = False
            tokens.sort_indices()
        return tokens


def _shorten(tokens: sparse.csr_matrix, rows: Rows, vocabulary: Vocabulary) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Keep the genes with the largest values of rows that are too long, equal values by position."""
    drop, cut = np.zeros(tokens.nnz, dtype=bool), np.zeros(tokens.shape[0])
    for row in np.flatnonzero(np.diff(tokens.indptr) > vocabulary.max_length):
        part = slice(tokens.indptr[row], tokens.indptr[row + 1])
        values = np.zeros(vocabulary.n_positions)
        stored = slice(rows.indptr[row], rows.indptr[row + 1])
        genes = rows.columns[rows.indices[stored]]
        values[vocabulary.first_gene_position + genes[genes >= 0]] = rows.data[stored][genes >= 0]
        here = tokens.indices[part]
        order = np.lexsort((here, -values[here], vocabulary.is_gene_token(tokens.data[part])))
        late = order[vocabulary.max_length :]
        drop[tokens.indptr[row] + late] = True
        cut[row] = values[here[late]].sum()
    kept = np.concatenate([[0], np.cumsum(~drop)])
    return vocabulary.matrix(tokens.data[~drop], tokens.indices[~drop], kept[tokens.indptr]), cut
