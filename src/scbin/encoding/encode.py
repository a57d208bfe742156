"""Rows of values into rows of tokens: what all encodings share around the compiled loops."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from scbin.encoding.bins import lookup, scaled_edges
from scbin.encoding.kernels import bin_rows, compact, count_known, frozen, over_rows, rank_rows
from scbin.encoding.vocabulary import CLS, END, START

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scbin.encoding.values import Reading
    from scbin.encoding.vocabulary import Vocabulary


@dataclass(frozen=True)
class Encoded:
    """Tokens of a block of rows, and what the encoder saw of each row."""

    tokens: sparse.csr_matrix
    totals: np.ndarray  # sum of the stored values (rows,)
    matched: np.ndarray  # of these, what lies in the vocabulary
    cut: np.ndarray  # of these, what did not fit into max_length


class Encoder:
    """Encodes row blocks with one vocabulary: tables are made once, blocks are independent of each other.

    `columns` says which gene of the vocabulary each column is (-1: none, -2: not a gene count). Rows are CSR arrays with
    sorted, unique columns; several columns of one gene are added up first. `threads` share the rows of a block.
    """

    def __init__(self, vocabulary: Vocabulary, columns: np.ndarray, reading: Reading, *, threads: int | None = None):
        self.vocabulary = vocabulary
        self.reading = reading
        self._over_rows = partial(over_rows, threads=threads)
        self.columns, self._sum = unique_columns(columns, len(vocabulary.genes), reading)
        self._all_used = bool((self.columns > -2).all())
        self._all_known = bool((self.columns >= 0).all())
        known = self.columns[self.columns >= 0]
        self._in_order = bool((np.diff(known) > 0).all())
        bins = vocabulary.bins
        if bins is None:
            medians = np.ones(len(vocabulary.genes)) if vocabulary.medians is None else np.asarray(vocabulary.medians)
            by_column = np.append(medians.astype(np.float64), 0.0)[np.maximum(self.columns, -1)]
            self._medians = frozen(by_column)
            return
        as_counts = bins.reads == "counts"
        self._target = bins.target_sum if reading.kind == "counts" and not as_counts else 0.0
        self._factor = reading.log_factor or 1.0
        edges = scaled_edges(bins, self._target)
        self._edges = frozen(edges)
        self._table = frozen(lookup(edges[0]))
        step = vocabulary.n_levels if vocabulary.encoding == "gene_bins" else 0
        self._bases = frozen(vocabulary.first_gene_id + step * np.arange(len(vocabulary.genes), dtype=np.int64))

    def prefix(self, phenotype_ids: np.ndarray) -> np.ndarray:
        """Return the tokens before the genes (rows, first gene position); `phenotype_ids` is (rows, phenotypes)."""
        vocabulary = self.vocabulary
        prefix = np.zeros((len(phenotype_ids), vocabulary.first_gene_position), dtype=np.uint32)
        if vocabulary.first_gene_position:
            prefix[:, 0] = vocabulary.specials.get(CLS, 0)
        if START in vocabulary.specials:
            prefix[:, -1] = vocabulary.specials[START]
        for k, phenotype in enumerate(vocabulary.phenotypes):
            prefix[:, phenotype.position] = phenotype_ids[:, k]
        return prefix

    def encode(
        self,
        data: np.ndarray,
        indices: np.ndarray,
        indptr: np.ndarray,
        phenotype_ids: np.ndarray,
        *,
        positive: bool | None = None,
    ) -> Encoded:
        """Encode the rows of a block; the arrays are only read. `positive`: whether all values are, if that is known."""
        if self._sum is not None:
            data, indices, indptr = self._sum(data, indices, indptr)
            positive = None
        vocabulary = self.vocabulary
        n_rows = len(indptr) - 1
        prefix = self.prefix(phenotype_ids)
        end_id = vocabulary.specials.get(END, 0)
        keep = vocabulary.bins is not None and vocabulary.bins.zeros == "keep"
        rows = (frozen(indptr), frozen(data), frozen(indices), frozen(self.columns))
        room = np.full(n_rows, len(vocabulary.genes)) if keep else np.diff(indptr)
        max_genes = vocabulary.max_length - prefix.shape[1] - (end_id > 0)
        if positive is None:
            positive = not len(data) or bool(data.min() > 0)
        all_known = self._all_known and positive
        if vocabulary.encoding == "rank":  # the length of a row is known beforehand: no gaps to close
            if not all_known:
                self._over_rows(count_known, *rows, room)
            room = np.minimum(room, max_genes)
        frame = prefix.shape[1] + (end_id > 0)
        offsets = np.concatenate([[0], np.cumsum(np.where(room > 0, room + frame, 0))])
        ids, positions = np.empty(offsets[-1], dtype=vocabulary.dtype), np.empty(offsets[-1], dtype=np.int32)
        lengths = np.zeros(n_rows, dtype=np.int64)
        totals, matched, cut = np.zeros((3, n_rows))
        out = (frozen(prefix), end_id, frozen(offsets), ids, positions, lengths, totals, matched)
        if vocabulary.bins is None:
            log_factor = self.reading.log_factor
            self._over_rows(
                rank_rows,
                *rows,
                log_factor,
                self._medians,
                vocabulary.first_gene_id,
                max_genes,
                *out,
                cut,
                self._all_used,
                all_known,
            )
        else:
            tables = (self._target, self._factor, self._edges, self._table, self._bases, keep)
            self._over_rows(bin_rows, *rows, *tables, *out, vocabulary.bins.per == "cell", self._all_used)
        tokens = self._matrix(ids, positions, offsets, lengths, n_missing=(prefix == 0).sum(axis=1))
        if vocabulary.position_is_gene and lengths.max(initial=0) > vocabulary.max_length:
            tokens, cut = self._shorten(tokens, data, indices, indptr)
        return Encoded(tokens, totals, matched, cut)

    def _matrix(
        self, ids: np.ndarray, positions: np.ndarray, offsets: np.ndarray, lengths: np.ndarray, n_missing: np.ndarray
    ) -> sparse.csr_matrix:
        """Close the gaps between the rows; `n_missing` specials of each row do not exist in this layout."""
        vocabulary = self.vocabulary
        indptr = np.concatenate([[0], np.cumsum(np.where(lengths > 0, lengths - n_missing, 0))])
        if np.array_equal(indptr, offsets):
            data, indices = ids, positions
        else:
            data = np.empty(indptr[-1], dtype=vocabulary.dtype)
            indices = np.empty(indptr[-1], dtype=np.int32)
            rows = (frozen(offsets), frozen(lengths), frozen(ids), frozen(positions))
            self._over_rows(compact, frozen(indptr), *rows, data, indices)
        tokens = _rows(data, indices, indptr, vocabulary)
        if vocabulary.position_is_gene and not self._in_order:
            tokens.has_sorted_indices = False
            tokens.sort_indices()
        return tokens

    def _shorten(
        self, tokens: sparse.csr_matrix, data: np.ndarray, indices: np.ndarray, indptr: np.ndarray
    ) -> tuple[sparse.csr_matrix, np.ndarray]:
        """Keep the genes with the largest values of rows that are too long, equal values by position."""
        vocabulary = self.vocabulary
        drop = np.zeros(tokens.nnz, dtype=bool)
        cut = np.zeros(tokens.shape[0])
        first = vocabulary.first_gene_position
        for row in np.flatnonzero(np.diff(tokens.indptr) > vocabulary.max_length):
            part = slice(tokens.indptr[row], tokens.indptr[row + 1])
            values = np.zeros(vocabulary.n_positions)
            stored = slice(indptr[row], indptr[row + 1])
            genes = self.columns[indices[stored]]
            values[first + genes[genes >= 0]] = data[stored][genes >= 0]
            here = tokens.indices[part]
            is_gene = vocabulary.is_gene_token(tokens.data[part])
            order = np.lexsort((here, -values[here], is_gene))
            late = order[vocabulary.max_length :]
            drop[tokens.indptr[row] + late] = True
            cut[row] = values[here[late]].sum()
        kept = np.concatenate([[0], np.cumsum(~drop)])
        tokens = sparse.csr_matrix(
            (tokens.data[~drop], tokens.indices[~drop], kept[tokens.indptr]), shape=tokens.shape, copy=False
        )
        return tokens, cut


def joined_offsets(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the row offsets of matrices laid one behind the other from those of each; 64 bits, however many tokens."""
    lengths = [np.diff(part).astype(np.int64) for part in parts]
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.concatenate([np.zeros(0, np.int64), *lengths]))])


def join_rows(parts: Sequence[sparse.csr_matrix], vocabulary: Vocabulary) -> sparse.csr_matrix:
    """Return the token rows of several blocks as one matrix."""
    if len(parts) == 1:
        return parts[0]
    indptr = joined_offsets([part.indptr for part in parts])
    data, indices = np.empty(indptr[-1], dtype=vocabulary.dtype), np.empty(indptr[-1], dtype=np.int32)
    start = 0
    for part in parts:
        data[start : start + part.nnz], indices[start : start + part.nnz] = part.data, part.indices
        start += part.nnz
    return _rows(data, indices, indptr, vocabulary)


def _rows(data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, vocabulary: Vocabulary) -> sparse.csr_matrix:
    shape = (len(indptr) - 1, vocabulary.n_positions)
    tokens = sparse.csr_matrix((data, indices, indptr), shape=shape, copy=False)
    tokens.has_sorted_indices = True
    tokens.has_canonical_format = True
    return tokens


def unique_columns(columns: np.ndarray, n_genes: int, reading: Reading):  # type: ignore[no-untyped-def]
    """Return columns where every gene stands once, and the function that adds up the repeated ones (None if none are).

    Logs are added as what they are logs of: log(1 + expm1(a) + expm1(b)).
    """
    known = columns[columns >= 0]
    if len(np.unique(known)) == len(known):
        return columns.astype(np.int32), None
    owner = np.arange(len(columns))
    first = np.full(n_genes, -1, dtype=np.int64)
    for k in np.flatnonzero(columns >= 0)[::-1]:
        first[columns[k]] = k
    owner[columns >= 0] = first[known]
    factor = reading.log_factor

    def add_up(data: np.ndarray, indices: np.ndarray, indptr: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        values = np.expm1(data * factor) if factor else data.astype(np.float64)
        matrix = sparse.csr_matrix(
            (values.astype(np.float64), owner[indices], indptr), shape=(len(indptr) - 1, len(columns))
        )
        matrix.has_canonical_format = False
        matrix.sum_duplicates()
        values = np.log1p(matrix.data) / factor if factor else matrix.data
        return values, matrix.indices.astype(np.int32), matrix.indptr.astype(np.int64)

    return columns.astype(np.int32), add_up
