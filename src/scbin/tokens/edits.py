"""Perturbations as edits of token rows: delete, overexpress, inhibit, activate and knock down, for every encoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from scbin._arguments import check_fields
from scbin._errors import ScbinInputError
from scbin.tokens.vocabulary import END

if TYPE_CHECKING:
    from scipy import sparse

    from scbin.tokens.vocabulary import Vocabulary

Mode = Literal["delete", "overexpress", "inhibit", "activate", "knock_down"]
NOWHERE = 2**62
ABSENT_QUARTILE = 4  # a gene that a cell lacks counts as one quartile below the last


@dataclass(frozen=True)
class Edit:
    """What is done to a gene.

    Where a token says how much of a gene there is (`"bins"`, `"binary"`, `"gene_bins"`), `"delete"` sets it to zero,
    `"overexpress"` to the top bin (of counts: to the highest of the cell), `"inhibit"` and `"activate"` move it by `k` bins but not
    to zero nor beyond the top, and `"knock_down"` takes `fraction` of the expression that its bin stands for away. Where tokens are ranked, `"delete"` takes
    the gene out, `"overexpress"` moves it to the front, `"inhibit"` and `"activate"` move it by `k` quartiles of the cell's
    ranks, and `"knock_down"` moves it by `fraction` of the way to the end, 1 deletes. The `[DEPTH]` token stays as it is.
    """

    mode: Mode = "delete"
    k: int = 1
    fraction: float = 0.5

    def __post_init__(self) -> None:
        check_fields(self)
        if self.k < 1:
            raise ScbinInputError("A02", f"k is {self.k!r}; it is a number of bins or quartiles, 1 or more.")
        if not 0 < self.fraction <= 1:
            raise ScbinInputError("A02", f"fraction is {self.fraction!r}; it lies above 0 and is at most 1.")

    @property
    def inserts(self) -> bool:
        """Whether cells that lack a gene get it."""
        return self.mode in ("overexpress", "activate")


@dataclass(frozen=True, eq=False)
class Edited:
    """Token rows after their edits, one row per (cell, genes) pair."""

    tokens: sparse.csr_matrix  # (pairs, positions)
    changed: np.ndarray  # (pairs,) bool: whether the row differs from the cell's
    n_cut: np.ndarray  # (pairs,) genes that left the end of the row because others came in; the original loses as many


class GeneRows:
    """A token matrix whose genes can be found: which stand in a row, where, and at which level (1 where tokens are ranked)."""

    def __init__(self, tokens: sparse.csr_matrix, vocabulary: Vocabulary):
        self.tokens, self.vocabulary = tokens, vocabulary
        self.at = np.flatnonzero(vocabulary.is_gene_token(tokens.data))  # where in tokens.data each gene token stands
        self.n_genes = np.diff(np.searchsorted(self.at, tokens.indptr))  # (rows,) gene tokens of each row
        row = np.repeat(np.arange(tokens.shape[0]), self.n_genes)
        ids = tokens.data[self.at]
        self.level = vocabulary.levels_of(ids)
        self.highest = np.zeros(tokens.shape[0], dtype=np.int64)  # level of each row
        np.maximum.at(self.highest, row, self.level)
        self.keys = row * len(vocabulary.genes) + vocabulary.genes_at(ids, tokens.indices[self.at])
        if not vocabulary.position_is_gene:
            order = np.argsort(self.keys, kind="stable")
            self.at, self.keys, self.level = self.at[order], self.keys[order], self.level[order]

    def expressed(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows and genes of all expressed (row, gene) pairs, by row and then by gene."""
        return np.divmod(self.keys[self.level > 0], len(self.vocabulary.genes))

    def find(self, cells: np.ndarray, genes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where in `tokens.data` genes stand in cells (-1: nowhere) and their levels (0 where not expressed)."""
        wanted = cells * len(self.vocabulary.genes) + genes
        if not len(self.keys):
            return np.full(wanted.shape, -1), np.zeros(wanted.shape, dtype=np.int64)
        place = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        there = self.keys[place] == wanted
        return np.where(there, self.at[place], -1), np.where(there, self.level[place], 0)

    def take(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return ids, positions and row number of the tokens of some rows laid end to end, and the bounds of the rows."""
        starts = self.tokens.indptr[cells].astype(np.int64)
        lengths = self.tokens.indptr[cells + 1] - starts
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        pair = np.repeat(np.arange(len(cells)), lengths)
        where = (starts - bounds[:-1])[pair] + np.arange(bounds[-1])
        return self.tokens.data[where], self.tokens.indices[where].astype(np.int64), pair, bounds


def edit_rows(rows: GeneRows, edit: Edit, cells: np.ndarray, genes: np.ndarray) -> Edited:
    """Edit one or several genes in one row per pair; the same row may be edited many times, each time from the original.

    `cells` (pairs,) are the rows, `genes` (pairs,) or (pairs, genes) what is edited in each, as places in the vocabulary, no gene
    twice in a row.

    Examples
    --------
    >>> from scipy import sparse
    >>> from scbin.tokens.vocabulary import Vocabulary
    >>> vocabulary = Vocabulary.build("rank", ["A", "B", "C"], max_length=6)
    >>> row = sparse.csr_matrix(np.array([[2, 4, 5, 6, 7, 3]], dtype=np.uint16))
    >>> edit_rows(GeneRows(row, vocabulary), Edit("delete"), np.array([0]), np.array([1])).tokens.toarray()
    array([[2, 4, 5, 7, 3, 0]], dtype=uint16)
    """
    cells, genes = np.asarray(cells, dtype=np.int64), np.asarray(genes, dtype=np.int64)
    genes = genes[:, None] if genes.ndim == 1 else genes
    return (_edit_levels if rows.vocabulary.position_is_gene else _edit_ranks)(rows, edit, cells, genes)


def shortened(rows: GeneRows, cells: np.ndarray, n_cut: np.ndarray) -> sparse.csr_matrix:
    """Return rows of ranks without their last `n_cut` genes: what an edited row that lost so many is compared with."""
    vocabulary = rows.vocabulary
    ids, positions, pair, _ = rows.take(cells)
    last = vocabulary.first_gene_position + rows.n_genes[cells] - n_cut  # first position that goes
    is_gene = vocabulary.is_gene_token(ids)
    kept = ~is_gene | (positions < last[pair])
    behind = ~is_gene & (positions >= vocabulary.first_gene_position)  # [END] moves up
    positions = positions - np.where(behind, n_cut[pair], 0)
    return _sorted(ids[kept], positions[kept], pair[kept], len(cells), vocabulary)


def _sorted(
    ids: np.ndarray, positions: np.ndarray, pair: np.ndarray, n_pairs: int, vocabulary: Vocabulary
) -> sparse.csr_matrix:
    """Return the tokens of pairs as a matrix (pairs, positions), sorted by position."""
    order = np.argsort(pair * vocabulary.n_positions + positions, kind="stable")
    indptr = np.concatenate([[0], np.cumsum(np.bincount(pair, minlength=n_pairs))])
    return vocabulary.matrix(ids[order], positions[order], indptr)


# ---- levels: every gene has a position of its own, and its token says how much of it there is ---------------------------


def new_levels(vocabulary: Vocabulary, edit: Edit, old: np.ndarray, highest: np.ndarray | int = 0) -> np.ndarray:
    """Return the levels of genes after an edit; 0 is not expressed, `highest` the highest level of the cell."""
    top = vocabulary.n_levels - 1
    if edit.mode == "delete":
        return np.zeros_like(old)
    if edit.mode == "overexpress":
        return np.maximum(old, highest) if vocabulary.unit == "counts" else np.full_like(old, top)
    if edit.mode == "activate":
        return np.minimum(old + edit.k, top)
    if edit.mode == "inhibit":
        return np.where(old > 0, np.maximum(old - edit.k, 1), 0)
    return np.where(old > 0, vocabulary.codec.knocked_down(vocabulary, old, edit.fraction), 0)


def _edit_levels(rows: GeneRows, edit: Edit, cells: np.ndarray, genes: np.ndarray) -> Edited:
    vocabulary = rows.vocabulary
    at, old = rows.find(cells[:, None], genes)
    new = new_levels(vocabulary, edit, old, rows.highest[cells, None])
    ids, positions, pair, bounds = rows.take(cells)
    place = at - rows.tokens.indptr[cells].astype(np.int64)[:, None] + bounds[:-1, None]
    new_ids = vocabulary.ids_of(genes, new).astype(ids.dtype)
    dropped = (at >= 0) & (new == 0) & (not vocabulary.keeps_zeros)
    replaced = (at >= 0) & ~dropped
    ids[place[replaced]] = new_ids[replaced]
    kept = np.ones(len(ids), dtype=bool)
    kept[place[dropped]] = False
    added = (at < 0) & (new > 0)
    tokens = _sorted(
        np.concatenate([ids[kept], new_ids[added]]),
        np.concatenate([positions[kept], vocabulary.first_gene_position + genes[added]]),
        np.concatenate([pair[kept], np.nonzero(added)[0]]),
        len(cells),
        vocabulary,
    )
    return Edited(tokens, (new != old).any(axis=1), np.zeros(len(cells), dtype=np.int64))


# ---- ranks ----------------------------------------------------------------------------------------------------------


def _edit_ranks(rows: GeneRows, edit: Edit, cells: np.ndarray, genes: np.ndarray) -> Edited:
    """Take genes out of their rows, or move them to another rank; what does not fit behind is cut."""
    vocabulary, first = rows.vocabulary, rows.vocabulary.first_gene_position
    at, _ = rows.find(cells[:, None], genes)
    there, n = at >= 0, rows.n_genes[cells]
    places = rows.tokens.indices if rows.tokens.nnz else np.zeros(1, dtype=np.int32)
    rank = np.where(there, places[at].astype(np.int64) - first, -1)  # (pairs, m)
    target, moved = _targets(edit, rank, there, n[:, None])
    n_final = n - there.sum(axis=1) + moved.sum(axis=1)
    n_cut = np.maximum(0, first + n_final + (END in vocabulary.specials) - vocabulary.max_length)
    slot = _slots(target, moved, n_final)
    ids, positions, pair, bounds = rows.take(cells)
    kept = np.ones(len(ids), dtype=bool)
    kept[(at - rows.tokens.indptr[cells].astype(np.int64)[:, None] + bounds[:-1, None])[there]] = False
    stays = kept & vocabulary.is_gene_token(ids)  # these genes fill the ranks that the moved ones leave, in their order
    starts = np.cumsum(n_final) - n_final
    free = np.ones(n_final.sum(), dtype=bool)
    free[(starts[:, None] + slot)[moved]] = False
    positions[stays] = first + np.flatnonzero(free) - starts[pair[stays]]
    behind = ~vocabulary.is_gene_token(ids) & (positions >= first)  # [END]
    positions[behind] = (first + n_final - n_cut)[pair[behind]]
    kept &= ~stays | (positions - first < (n_final - n_cut)[pair])
    comes = moved & (slot < (n_final - n_cut)[:, None])
    tokens = _sorted(
        np.concatenate([ids[kept], (vocabulary.first_gene_id + genes[comes]).astype(ids.dtype)]),
        np.concatenate([positions[kept], first + slot[comes]]),
        np.concatenate([pair[kept], np.nonzero(comes)[0]]),
        len(cells),
        vocabulary,
    )
    return Edited(tokens, (np.where(moved, slot, -1) != rank).any(axis=1), n_cut)


def _targets(edit: Edit, rank: np.ndarray, there: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rank that each gene is to have, and which genes are in the row afterwards (pairs, m)."""
    if edit.mode == "delete" or (edit.mode == "knock_down" and edit.fraction == 1):
        return rank, np.zeros_like(there)
    if edit.mode == "overexpress":
        return np.broadcast_to(np.arange(rank.shape[1]), rank.shape), np.ones_like(there)
    if edit.mode == "knock_down":
        return rank + np.rint(edit.fraction * (n - 1 - rank)).astype(np.int64), there
    quartile = np.where(there, 4 * rank // np.maximum(n, 1), ABSENT_QUARTILE)
    quartile = quartile + (-edit.k if edit.mode == "activate" else edit.k)
    target = np.where(quartile < 0, 0, np.where(quartile > 3, n - 1, (2 * quartile + 1) * n // 8))
    return target, there | (edit.mode == "activate")


def _slots(target: np.ndarray, moved: np.ndarray, n_final: np.ndarray) -> np.ndarray:
    """Give every moved gene a rank of its own, its target or the nearest free one behind, or before at the end."""
    wanted = np.where(moved, target, NOWHERE)
    order = np.argsort(wanted, axis=1, kind="stable")
    previous, slots = np.full(len(target), -1), np.empty_like(wanted)
    for j in range(target.shape[1]):
        column, last = order[:, j : j + 1], n_final - (moved.sum(axis=1) - j)
        previous = np.maximum(np.take_along_axis(wanted, column, axis=1)[:, 0], previous + 1)
        np.put_along_axis(slots, column, np.minimum(previous, last)[:, None], axis=1)
    return slots
