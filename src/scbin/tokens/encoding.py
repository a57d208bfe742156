"""Cells into rows of tokens: the genes as the encoding writes them, with special tokens and phenotypes around."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from scbin.tokens.kernels import frame_rows, over_rows
from scbin.tokens.values import TARGET, RowReader
from scbin.tokens.vocabulary import CLS, END, START

if TYPE_CHECKING:
    from scipy import sparse

    from scbin.tokens.values import Reading, Rows
    from scbin.tokens.vocabulary import GeneTokens, Vocabulary


class Encoded(NamedTuple):
    """Tokens of a block of rows, and what the encoder saw of each row.

    The columns of `seen` are the sum of the counts, or of logs where counts are not known (`"total"`), what of it lies in the
    vocabulary (`"matched"`); whether not all genes fitted into max_length (`"cut"`), and counts could not be had back exactly from
    logs (`"rounded"`); and whether the row has tokens (0), no counts (1), or no gene of the vocabulary (2) (`"status"`).
    """

    tokens: sparse.csr_matrix
    seen: pd.DataFrame


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
        vocabulary, reading, unit = self.vocabulary, self._reader.reading, self.vocabulary.codec.reads(self.vocabulary)
        unit = "counts" if unit == "any" and reading.exact else unit
        rows = self._reader.read(block, unit, TARGET if vocabulary.bins is None else vocabulary.bins.target_sum)
        counts = self._reader.read(block, "counts") if rows.logs and reading.exact else rows
        genes = vocabulary.codec.encode(vocabulary, rows)
        prefix = self._prefix(phenotype_ids, counts.matched if reading.counted else None)
        n_around = (prefix > 0).sum(axis=1) + (END in vocabulary.specials)
        room = np.where(vocabulary.position_is_gene, vocabulary.max_length, vocabulary.n_positions) - n_around
        cut = (genes.lengths > room) & (rows.matched > 0)
        if not vocabulary.position_is_gene:
            genes = replace(genes, lengths=np.minimum(genes.lengths, room))
        tokens = self._framed(genes, prefix, rows.matched > 0)
        if vocabulary.position_is_gene and cut.any():
            tokens = _shorten(tokens, rows, vocabulary)
        exact = rows.exact if vocabulary.depth is None else counts.exact  # of counts that make tokens
        seen = {
            "total": counts.totals,
            "matched": counts.matched,
            "cut": cut,
            "rounded": np.zeros(rows.n, dtype=bool) if exact is None else ~exact & (counts.totals > 0),
            "status": np.where(counts.totals <= 0, 1, np.where(np.diff(tokens.indptr) == 0, 2, 0)),
        }
        return Encoded(tokens, pd.DataFrame(seen))

    def _prefix(self, phenotype_ids: np.ndarray, depth: np.ndarray | None) -> np.ndarray:
        """Return the tokens before the genes (rows, first gene position)."""
        vocabulary = self.vocabulary
        prefix = np.zeros((len(phenotype_ids), vocabulary.first_gene_position), dtype=np.uint32)
        for special, at in ((CLS, 0), (START, -1)):
            if special in vocabulary.specials:
                prefix[:, at] = vocabulary.specials[special]
        prefix[:, [p.position for p in vocabulary.phenotypes]] = phenotype_ids
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
        over_rows(frame_rows, indptr, (*own, *end), (ids, positions))
        tokens = vocabulary.matrix(ids, positions, indptr)
        if fixed and not self._in_order:
            tokens.has_sorted_indices = False
            tokens.sort_indices()
        return tokens


def _shorten(tokens: sparse.csr_matrix, rows: Rows, vocabulary: Vocabulary) -> sparse.csr_matrix:
    """Keep the genes with the largest values of rows that are too long, equal values by position."""
    kept = np.ones(tokens.nnz, dtype=bool)
    for row in np.flatnonzero(np.diff(tokens.indptr) > vocabulary.max_length):
        (first, last), stored = tokens.indptr[row : row + 2], slice(*rows.indptr[row : row + 2])
        values, genes = np.zeros(vocabulary.n_positions), rows.columns[rows.indices[stored]]
        values[vocabulary.first_gene_position + genes[genes >= 0]] = rows.data[stored][genes >= 0]
        here = values[tokens.indices[first:last]]
        late = np.lexsort((-here, vocabulary.is_gene_token(tokens.data[first:last])))[vocabulary.max_length :]
        kept[first + late] = False
    indptr = np.concatenate([[0], np.cumsum(kept)])[tokens.indptr]
    return vocabulary.matrix(tokens.data[kept], tokens.indices[kept], indptr)
