"""Perturbations as edits of token rows: delete, overexpress, inhibit, activate and knock down, for every encoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from scipy import sparse

from scbin._errors import ScbinInputError
from scbin.encoding.vocabulary import END

if TYPE_CHECKING:
    from scbin.encoding.bins import Bins
    from scbin.encoding.vocabulary import Vocabulary

Mode = Literal["delete", "overexpress", "inhibit", "activate", "knock_down"]
_NOWHERE = 2**62
_ABSENT_QUARTILE = 4  # a gene that a cell lacks counts as one quartile below the last


@dataclass(frozen=True)
class Edit:
    """What is done to a gene.

    Where a token says how much of a gene there is (`"bins"`, `"binary"`, `"gene_bins"`), `"delete"` sets it to zero,
    `"overexpress"` to the top bin, `"inhibit"` and `"activate"` move it by `k` bins but not to zero nor beyond the top, and
    `"knock_down"` takes `fraction` of the expression that its bin stands for away. Where tokens are ranked, `"delete"` takes
    the gene out, `"overexpress"` moves it to the front, `"inhibit"` and `"activate"` move it by `k` quartiles of the cell's
    ranks, and `"knock_down"` moves it by `fraction` of the way to the end, 1 deletes.
    """

    mode: Mode = "delete"
    k: int = 1
    fraction: float = 0.5

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ScbinInputError("P20", f"mode is {self.mode!r}; choose one of {list(get_args(Mode))}.")
        if type(self.k) is not int or self.k < 1:
            raise ScbinInputError("P47", f"k is {self.k!r}; it is a number of bins or quartiles, 1 or more.")
        if not 0 < self.fraction <= 1:
            raise ScbinInputError("P48", f"fraction is {self.fraction!r}; it lies above 0 and is at most 1.")

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
    """A token matrix whose genes can be found: which stand in a row, where, and in which bin."""

    def __init__(self, tokens: sparse.csr_matrix, vocabulary: Vocabulary):
        self.tokens, self.vocabulary = tokens, vocabulary
        rank = vocabulary.encoding == "rank"
        self.at = np.flatnonzero(vocabulary.is_gene_token(tokens.data))  # where in tokens.data each gene token stands
        self.n_genes = np.diff(np.searchsorted(self.at, tokens.indptr))  # (rows,) gene tokens of each row
        row = np.repeat(np.arange(tokens.shape[0]), self.n_genes)
        ids = tokens.data[self.at].astype(np.int64) - vocabulary.first_gene_id
        gene = ids if rank else tokens.indices[self.at].astype(np.int64) - vocabulary.first_gene_position
        self.level = np.ones(len(ids), dtype=np.int64) if rank else ids % vocabulary.n_levels
        self.keys = row * len(vocabulary.genes) + gene
        if rank:
            order = np.argsort(self.keys, kind="stable")
            self.at, self.keys = self.at[order], self.keys[order]

    def expressed(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows and genes of all expressed (row, gene) pairs, by row and then by gene."""
        keys = self.keys[self.level > 0]
        return np.divmod(keys, len(self.vocabulary.genes))

    def find(self, cells: np.ndarray, genes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where in `tokens.data` genes stand in cells (-1: nowhere) and their bins (0 where not expressed)."""
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

    Parameters
    ----------
    rows
        The token rows.
    edit
        What is done.
    cells
        Row of each pair (pairs,).
    genes
        Genes edited together in each pair, as places in the vocabulary: (pairs,) or (pairs, genes), no gene twice in a row.

    Examples
    --------
    >>> from scbin.encoding.vocabulary import Vocabulary
    >>> vocabulary = Vocabulary.build("rank", ["A", "B", "C"], max_length=6)
    >>> row = sparse.csr_matrix(np.array([[2, 4, 5, 6, 7, 3]], dtype=np.uint16))
    >>> edit_rows(GeneRows(row, vocabulary), Edit("delete"), np.array([0]), np.array([1])).tokens.toarray()
    array([[2, 4, 5, 7, 3, 0]], dtype=uint16)
    """
    cells = np.asarray(cells, dtype=np.int64)
    genes = np.asarray(genes, dtype=np.int64)
    genes = genes[:, None] if genes.ndim == 1 else genes
    return (_edit_bins if rows.vocabulary.position_is_gene else _edit_ranks)(rows, edit, cells, genes)


def shortened(rows: GeneRows, cells: np.ndarray, n_cut: np.ndarray) -> sparse.csr_matrix:
    """Return rows without their last `n_cut` genes: what an edited row that lost so many is compared with."""
    vocabulary = rows.vocabulary
    if vocabulary.position_is_gene:  # every gene has a place of its own: nothing is ever pushed out
        return rows.tokens[cells]
    ids, positions, pair, bounds = rows.take(cells)
    last = vocabulary.first_gene_position + rows.n_genes[cells] - n_cut  # first position that goes
    is_gene = vocabulary.is_gene_token(ids)
    kept = ~is_gene | (positions < last[pair])
    behind = ~is_gene & (positions >= vocabulary.first_gene_position)  # [END] moves up
    positions = positions - np.where(behind, n_cut[pair], 0)
    return _matrix(ids[kept], positions[kept], pair[kept], len(cells), vocabulary)


# ---- where a token says how much ------------------------------------------------------------------------------------


def new_levels(vocabulary: Vocabulary, edit: Edit, genes: np.ndarray, old: np.ndarray) -> np.ndarray:
    """Return the bins of genes after an edit; 0 is not expressed."""
    bins = vocabulary.bins
    if bins is None:
        raise ScbinInputError("P21", 'ranked genes have no bins; this is for "bins", "binary" and "gene_bins".')
    if edit.mode == "delete":
        return np.zeros_like(old)
    if edit.mode == "overexpress":
        return np.full_like(old, bins.n_bins)
    if edit.mode == "activate":
        return np.minimum(old + edit.k, bins.n_bins)
    if edit.mode == "inhibit":
        return np.where(old > 0, np.maximum(old - edit.k, 1), 0)
    return np.where(old > 0, _knocked_down(bins, genes, old, edit.fraction), 0)


def _knocked_down(bins: Bins, genes: np.ndarray, level: np.ndarray, fraction: float) -> np.ndarray:
    """Bin of what is left of the value that a bin stands for: its middle, as counts."""
    if bins.per == "cell":  # quantiles have no unit: the place among the cell's expressed genes shrinks
        return np.floor(level * (1 - fraction) + 1e-9).astype(level.dtype)
    edges = np.broadcast_to(bins.matrix, (1, bins.n_bins)) if bins.per == "all" else bins.matrix
    own = genes if bins.per == "gene" else np.zeros_like(genes)
    if bins.per == "all":
        value = bins.centres.astype(np.float64)[level]
    else:
        widths = np.diff(edges, axis=1, append=2 * edges[:, -1:] - edges[:, -2:-1] if edges.shape[1] > 1 else edges)
        value = (edges + widths / 2)[own, np.maximum(level - 1, 0)]
    left = np.log1p(np.expm1(value) * (1 - fraction)) if bins.reads == "log1p" else value * (1 - fraction)
    return np.minimum((edges[own] <= left[..., None]).sum(axis=-1), level)


def level_ids(vocabulary: Vocabulary, genes: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Return the token ids of genes in bins."""
    own = genes * vocabulary.n_levels if vocabulary.encoding == "gene_bins" else 0
    return vocabulary.first_gene_id + own + levels


def _edit_bins(rows: GeneRows, edit: Edit, cells: np.ndarray, genes: np.ndarray) -> Edited:
    vocabulary = rows.vocabulary
    at, old = rows.find(cells[:, None], genes)
    new = new_levels(vocabulary, edit, genes, old)
    ids, positions, pair, bounds = rows.take(cells)
    place = at - rows.tokens.indptr[cells].astype(np.int64)[:, None] + bounds[:-1, None]
    new_ids = level_ids(vocabulary, genes, new)
    dropped = (at >= 0) & (new == 0) & (vocabulary.bins is not None and vocabulary.bins.zeros == "drop")
    replaced = (at >= 0) & ~dropped
    ids[place[replaced]] = new_ids[replaced]
    kept = np.ones(len(ids), dtype=bool)
    kept[place[dropped]] = False
    added = (at < 0) & (new > 0)
    ids, positions, pair = ids[kept], positions[kept], pair[kept]
    if added.any():
        came = np.nonzero(added)[0]
        where = vocabulary.first_gene_position + genes[added]
        key = np.concatenate([pair * vocabulary.n_positions + positions, came * vocabulary.n_positions + where])
        order = np.argsort(key, kind="stable")
        ids = np.concatenate([ids, new_ids[added].astype(ids.dtype)])[order]
        positions, pair = np.concatenate([positions, where])[order], np.concatenate([pair, came])[order]
    tokens = _matrix(ids, positions, pair, len(cells), vocabulary)
    return Edited(tokens, (new != old).any(axis=1), np.zeros(len(cells), dtype=np.int64))


# ---- where a position says how much ---------------------------------------------------------------------------------


def _edit_ranks(rows: GeneRows, edit: Edit, cells: np.ndarray, genes: np.ndarray) -> Edited:
    vocabulary, first = rows.vocabulary, rows.vocabulary.first_gene_position
    at, _ = rows.find(cells[:, None], genes)
    there = at >= 0
    rank = np.where(there, rows.tokens.indices[at].astype(np.int64) - first, -1)  # (pairs, m)
    n = rows.n_genes[cells]
    target, moved = _targets(edit, rank, there, n)
    n_final = n - there.sum(axis=1) + moved.sum(axis=1)
    has_end = END in vocabulary.specials
    n_cut = np.maximum(0, first + n_final + has_end - vocabulary.max_length)
    slot = _slots(target, moved, n_final)
    ids, positions, pair, _ = rows.take(cells)
    is_gene = vocabulary.is_gene_token(ids)
    behind = ~is_gene & (positions >= first)
    positions = np.where(behind, (first + n_final - n_cut)[pair], positions)
    kept = np.ones(len(ids), dtype=bool)
    owner = pair[is_gene]
    place, edited = _places(positions[is_gene] - first, rank[owner], np.where(moved, slot, _NOWHERE)[owner])
    positions[is_gene] = first + place
    kept[is_gene] = ~edited & (place < (n_final - n_cut)[owner])
    stays = moved & (slot < (n_final - n_cut)[:, None])
    came = np.nonzero(stays)[0]
    ids = np.concatenate([ids[kept], (vocabulary.first_gene_id + genes[stays]).astype(ids.dtype)])
    positions = np.concatenate([positions[kept], first + slot[stays]])
    pair = np.concatenate([pair[kept], came])
    order = np.argsort(pair * vocabulary.n_positions + positions, kind="stable")
    tokens = _matrix(ids[order], positions[order], pair[order], len(cells), vocabulary)
    changed = (np.where(moved, slot, -1) != rank).any(axis=1)
    return Edited(tokens, changed, n_cut)


def _places(old: np.ndarray, edited: np.ndarray, taken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the new rank of each gene that is not edited, and which are.

    `old` (tokens,) are their ranks, `edited` and `taken` (tokens, m) the old and new ranks of the edited genes of their row.
    """
    is_edited = (edited == old[:, None]).any(axis=1)
    place = old - ((edited >= 0) & (edited < old[:, None])).sum(axis=1)
    taken = np.sort(taken, axis=1) - np.arange(taken.shape[1])  # so many free ranks lie before each
    return place + (taken <= place[:, None]).sum(axis=1), is_edited


def _targets(edit: Edit, rank: np.ndarray, there: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rank that each gene shall have, and which genes are in the row afterwards (pairs, m)."""
    n = n[:, None]
    if edit.mode == "delete" or (edit.mode == "knock_down" and edit.fraction == 1):
        return rank, np.zeros_like(there)
    if edit.mode == "overexpress":
        return np.broadcast_to(np.arange(rank.shape[1]), rank.shape), np.ones_like(there)
    if edit.mode == "knock_down":
        return rank + np.rint(edit.fraction * (n - 1 - rank)).astype(np.int64), there
    quartile = np.where(there, 4 * rank // np.maximum(n, 1), _ABSENT_QUARTILE)
    quartile = quartile + (-edit.k if edit.mode == "activate" else edit.k)
    middle = (2 * quartile + 1) * n // 8
    target = np.where(quartile < 0, 0, np.where(quartile > 3, n - 1, middle))
    return target, there | (edit.mode == "activate")


def _slots(target: np.ndarray, moved: np.ndarray, n_final: np.ndarray) -> np.ndarray:
    """Give every moved gene a rank of its own, its target or the nearest free one behind, or before at the end."""
    wanted = np.where(moved, target, _NOWHERE)
    order = np.argsort(wanted, axis=1, kind="stable")
    wanted = np.take_along_axis(wanted, order, axis=1)
    n_moved = moved.sum(axis=1)
    previous = np.full(len(target), -1)
    slots = np.empty_like(wanted)
    for j in range(target.shape[1]):
        previous = np.maximum(wanted[:, j], previous + 1)
        slots[:, j] = np.minimum(previous, n_final - (n_moved - j))
    result = np.empty_like(slots)
    np.put_along_axis(result, order, slots, axis=1)
    return result


def _matrix(
    ids: np.ndarray, positions: np.ndarray, pair: np.ndarray, n_pairs: int, vocabulary: Vocabulary
) -> sparse.csr_matrix:
    """Tokens sorted by pair and position as a matrix."""
    indptr = np.concatenate([[0], np.cumsum(np.bincount(pair, minlength=n_pairs))])
    tokens = sparse.csr_matrix(
        (ids, positions.astype(np.int32), indptr), shape=(n_pairs, vocabulary.n_positions), copy=False
    )
    tokens.has_sorted_indices = tokens.has_canonical_format = True
    return tokens
