"""Which tokens and molecules of a cell are hidden, what stands in their place, and what is to be predicted."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numba import njit
from scipy.sparse import csr_matrix

from scbin._errors import ScbinInputError
from scbin.nn.packs import gene_values, make_pack
from scbin.tokens.vocabulary import MASK, PAD
from scbin.train import randomness

if TYPE_CHECKING:
    from scbin.nn.packs import Pack
    from scbin.tokens.vocabulary import Vocabulary
    from scbin.train.settings import Masking

EXACT = 128  # up to so many molecules are drawn one by one; of more, a rounded normal number is as good as binomial
_TRIES = 32  # draws of an unexpressed gene before walking to the next free one
CLOSED = np.float32(-1e4)  # the gate of a token that nobody attends to
GENE, NEVER = 0, -1  # what a token is: a gene, 1.. the number of a phenotype, then a special; never masked


class Hidden(NamedTuple):
    """What is to be predicted in a pack, ordered by loss; `where` points into its tokens."""

    where: np.ndarray  # (M,) int64
    labels: np.ndarray  # (M,) int64 token ids
    start: np.ndarray  # (M,) int64, first id of the group
    stop: np.ndarray  # (M,) int64, one past its last id
    loss: np.ndarray  # (M,) int64, index into `masked_losses`


def masked_losses(vocabulary: Vocabulary) -> tuple[str, ...]:
    """Return the names of what can be hidden: genes, each phenotype, special tokens."""
    return ("genes", *(phenotype.name for phenotype in vocabulary.phenotypes), "specials")


def extra_zeros(vocabulary: Vocabulary, masking: Masking) -> float:
    """Return how many unexpressed genes are asked for with each hidden gene."""
    if masking.zero_swap or vocabulary.keeps_zeros or vocabulary.n_levels < 2:
        return 0.0
    return 1 / (vocabulary.n_levels - 1)


def mask_rows(
    rows: csr_matrix,
    cells: np.ndarray,
    vocabulary: Vocabulary,
    masking: Masking,
    *,
    seed: int,
    epoch: int,
    score_all: bool = False,
    zero_positions: np.ndarray | None = None,
) -> tuple[Pack, Hidden]:
    """Lay token rows of some cells (rows,) end to end, as one pack on the host, with some of their tokens hidden.

    Every choice is a function of seed, epoch and cell. `score_all` asks for the tokens that are not hidden, too. Only genes at
    `zero_positions` are asked for as unexpressed; default: all genes.

    Examples
    --------
    >>> from scipy.sparse import csr_matrix
    >>> from scbin.tokens.vocabulary import Vocabulary
    >>> from scbin.train.settings import Masking
    >>> vocabulary = Vocabulary.build("rank", ["A", "B", "C"], max_length=8)
    >>> rows = csr_matrix([[2, 4, 5, 7, 3]])  # [CLS] [START] A C [END]
    >>> pack, hidden = mask_rows(rows, np.array([0]), vocabulary, Masking(1.0, replacement=(1, 0, 0)), seed=0, epoch=0)
    >>> pack.input_ids, hidden.labels
    (tensor([2, 4, 1, 1, 3]), array([5, 7]))
    """
    if masking.zero_swap and (vocabulary.bins is None or vocabulary.keeps_zeros):
        raise ScbinInputError("A03", "zero_swap needs bins without zeros; here zeros are in the row already.")
    if masking.nonzero_ratio is not None and not vocabulary.keeps_zeros:
        raise ScbinInputError("A03", 'nonzero_ratio needs rows with zeros: tokenize with zeros="keep".')
    cells = np.asarray(cells, dtype=np.int64)
    keys, lengths = randomness.cell_keys(randomness.random_key(seed, epoch), cells), np.diff(rows.indptr)
    owner = np.repeat(np.arange(len(cells)), lengths)
    ids, positions = rows.data.astype(np.int64), rows.indices.astype(np.int64)
    row = _Row(keys[owner], owner, positions, ids, _kinds(ids, positions, vocabulary))
    specials = len(vocabulary.phenotypes) + 1
    hit = _hidden(row, vocabulary, masking)
    labels = np.where(hit | (score_all & (row.kinds >= GENE) & (row.kinds < specials)), ids, -1)
    ids, kept = _replaced(row, hit, vocabulary, masking), np.ones(len(ids), bool)
    if masking.phenotype_drop:
        phenotypes = np.flatnonzero(hit & (row.kinds > GENE) & (row.kinds < specials))
        kept[phenotypes] = row.uniforms(randomness.DROP, phenotypes) >= masking.phenotype_drop

    # a hidden gene gives its place to one that the cell does not express, or brings one along; of a row that was cut off
    # nobody knows which genes these are
    cut_off = (lengths >= vocabulary.max_length) & (vocabulary.max_length < vocabulary.n_positions)
    genes = np.flatnonzero(hit & (row.kinds == GENE) & ~cut_off[owner])
    if masking.zero_swap:
        swaps = randomness.uniforms(keys, randomness.SWAP_CELL, np.zeros_like(cells)) < masking.zero_swap
        genes = genes[swaps[owner[genes]]]
        genes = genes[row.uniforms(randomness.SWAP, genes) < 1 / vocabulary.n_levels / masking.zero_swap]
    else:
        genes = genes[extra_zeros(vocabulary, masking) + row.uniforms(randomness.EXTRA, genes) >= 1]
    counters = positions[genes] + (0 if masking.zero_swap else vocabulary.n_positions)
    candidates = np.asarray(vocabulary.gene_positions if zero_positions is None else zero_positions, dtype=np.int64)
    drawn = owner[genes], row.keys[genes], counters, candidates
    places = _draw_unexpressed(rows.indptr, positions, vocabulary.n_positions, *drawn)
    genes, places = genes[places >= 0], places[places >= 0]
    kept[genes] &= not masking.zero_swap
    columns, starts = [owner, positions, ids, labels, row.kinds], vocabulary.group_start
    if len(genes) or masking.phenotype_drop:
        like = np.ones(len(genes), dtype=np.int64)
        new = [owner[genes], places, like * vocabulary.mask_id, starts[places], like * GENE]
        columns = [np.append(old[kept], more) for old, more in zip(columns, new, strict=True)]
        # by row; numpy has a radix sort for 16 bits alone
        order = np.argsort(columns[0].astype(np.uint16) if len(cells) < 2**16 else columns[0], kind="stable")
        columns = [column[order] for column in columns]
    owner, positions, ids, labels, kinds = columns
    pack = make_pack(ids, positions, np.bincount(owner, minlength=len(cells)), cells)
    if not masking.attend_zeros and vocabulary.bins is not None:
        is_zero = (kinds == GENE) & (np.where(labels < 0, ids, labels) == starts[positions])
        pack = replace(pack, gates=torch.from_numpy(np.where(is_zero, CLOSED, np.float32(0))))
    where = np.flatnonzero(labels >= 0)
    where = where[np.argsort(kinds[where], kind="stable")]
    special, positions = kinds[where] == specials, positions[where]
    start = np.where(special, 0, starts[positions])
    stop = np.where(special, vocabulary.n_tokens, vocabulary.group_stop[positions])
    return pack, Hidden(where, labels[where], start, stop, kinds[where])


class _Row(NamedTuple):
    """The tokens of some rows, one behind the other (T,)."""

    keys: np.ndarray  # of the cell, that random numbers come from
    owner: np.ndarray  # the row
    positions: np.ndarray
    ids: np.ndarray
    kinds: np.ndarray  # GENE, the number of a phenotype, one more for specials, or NEVER

    def uniforms(self, purpose: int, at: np.ndarray) -> np.ndarray:
        """Return a random number for each of some tokens."""
        return randomness.uniforms(self.keys[at], purpose, self.positions[at])


def _kinds(ids: np.ndarray, positions: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Return what each token is (T,)."""
    specials = len(vocabulary.phenotypes) + 1
    of_position = np.full(vocabulary.n_positions, specials)
    of_position[vocabulary.gene_positions] = GENE
    for number, phenotype in enumerate(vocabulary.phenotypes, start=1):
        of_position[phenotype.position] = number
    if vocabulary.depth is not None:
        of_position[vocabulary.depth.position] = NEVER
    kinds = of_position[positions]
    other = np.flatnonzero((ids < vocabulary.group_start[positions]) | (ids >= vocabulary.group_stop[positions]))
    is_special = np.isin(ids[other], [id for name, id in vocabulary.specials.items() if name not in (PAD, MASK)])
    kinds[other] = np.where(is_special & (kinds[other] != NEVER), specials, NEVER)
    return kinds


def _hidden(row: _Row, vocabulary: Vocabulary, masking: Masking) -> np.ndarray:
    """Choose which tokens are to be predicted (T,)."""
    by_kind = np.full(len(vocabulary.phenotypes) + 3, masking.phenotype_mask_prob)
    by_kind[[GENE, -2, NEVER]] = masking.gene_mask_prob, masking.gene_mask_prob * masking.mask_specials, 0.0
    p = by_kind[row.kinds]
    at = np.flatnonzero(p > 0)
    hit = np.zeros(len(p), bool)
    hit[at] = row.uniforms(randomness.SELECT, at) < p[at]
    if masking.nonzero_ratio is not None:  # exact numbers of zeros and others in each row, every set equally likely
        genes = np.flatnonzero(row.kinds == GENE)
        groups = 2 * row.owner[genes] + (row.ids[genes] == vocabulary.group_start[row.positions[genes]])
        sizes = np.bincount(groups, minlength=2 * (int(row.owner.max(initial=-1)) + 1))
        both = np.floor(masking.gene_mask_prob * sizes.reshape(-1, 2).sum(axis=1))
        wanted = np.outer(both, (masking.nonzero_ratio, 1 - masking.nonzero_ratio)).ravel()
        order = np.lexsort((row.uniforms(randomness.SELECT, genes), groups))
        rank = np.arange(len(genes)) - (np.cumsum(sizes) - sizes)[groups[order]]
        hit[genes[order]] = rank < np.floor(np.minimum(wanted, sizes))[groups[order]]
    return hit


def _replaced(row: _Row, hit: np.ndarray, vocabulary: Vocabulary, masking: Masking) -> np.ndarray:
    """Return the token ids with others in the place of those that are hidden (T,)."""
    usual = (1.0, 0.0, 0.0) if vocabulary.unit == "counts" else (0.8, 0.1, 0.1)
    p_mask, p_random, _ = masking.replacement or usual
    ids, at = row.ids.copy(), np.flatnonzero(hit)
    is_phenotype = (row.kinds[at] > GENE) & (row.kinds[at] <= len(vocabulary.phenotypes))
    u = np.where(is_phenotype, -1.0, row.uniforms(randomness.KIND, at))
    ids[at[u < p_mask]] = vocabulary.mask_id
    random = at[(u >= p_mask) & (u < p_mask + p_random)]
    low, high = np.zeros(len(random)), np.full(len(random), float(vocabulary.n_tokens))
    if masking.random_from == "group":
        of_gene, where = row.kinds[random] == GENE, row.positions[random]
        lowest = vocabulary.bins is not None and not vocabulary.keeps_zeros  # bin 0 is a label only
        low[of_gene] = vocabulary.group_start[where[of_gene]] + lowest
        high[of_gene] = vocabulary.group_stop[where[of_gene]]
    ids[random] = low + np.floor(row.uniforms(randomness.VALUE, random) * (high - low))
    return ids


@njit(cache=True, nogil=True)
def _draw_unexpressed(
    indptr: Any, positions: Any, n: Any, owner: Any, keys: Any, counters: Any, candidates: Any
) -> Any:
    """Return a position of `candidates` for each of some rows (n,) that is not taken in its row, -1 where there is none."""
    places, taken, row = np.full(len(owner), -1), np.zeros(n, np.bool_), -1
    for k in range(len(owner)):
        if owner[k] != row:
            row = owner[k]
            taken[:] = False
            taken[positions[indptr[row] : indptr[row + 1]]] = True
        slot = 0
        for attempt in range(_TRIES + len(candidates) if len(candidates) else 0):
            u = randomness.uniform(keys[k], randomness.PLACE, counters[k] * _TRIES + attempt)
            slot = int(u * len(candidates)) if attempt < _TRIES else (slot + 1) % len(candidates)
            if not taken[candidates[slot]]:
                places[k] = candidates[slot]
                taken[places[k]] = True
                break
    return places


# ---- molecules ------------------------------------------------------------------------------------------------------


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
    genes, values = gene_values(vocabulary.tables(), rows.data, rows.indices)
    key, n_genes = randomness.random_key(seed, epoch), len(vocabulary.genes)
    owner = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
    if vocabulary.unit == "counts":
        counts, asked = np.rint(values).astype(np.int64), None
        shown = split_counts(rows.indptr, genes, counts, cells, key, *visible)
        hidden, kept = counts - shown, rows_with_counts(rows, shown, vocabulary)
    else:
        every, ones = np.tile(np.arange(n_genes), len(cells)), np.ones(len(cells) * n_genes, dtype=np.int64)
        bounds = n_genes * np.arange(len(cells) + 1)
        asked = split_counts(bounds, every, ones, cells, key, *visible).reshape(-1, n_genes) == 0  # (cells, genes)
        hides = (genes >= 0) & asked[owner, genes]
        hidden, kept = np.where(hides, values, 0), rows_without(rows, hides, vocabulary)
    at = hidden > 0
    matrix = csr_matrix((hidden[at].astype(np.float32), (owner[at], genes[at])), shape=(rows.shape[0], n_genes))
    return kept, matrix, asked


def rows_with_counts(rows: csr_matrix, counts: np.ndarray, vocabulary: Vocabulary) -> csr_matrix:
    """Return rows whose gene tokens say other counts (tokens,), and `[DEPTH]` their sum; where zeros are dropped, genes without any go."""
    bins = vocabulary.bins
    if bins is None or bins.per != "all":
        raise ScbinInputError("M04", "counts can be split only in bins of counts that all genes share.")
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
    return changed if vocabulary.keeps_zeros else select(changed, ~is_gene | (level > 0))


def rows_without(rows: csr_matrix, drop: np.ndarray, vocabulary: Vocabulary) -> csr_matrix:
    """Return rows without some of their gene tokens (tokens,); where positions are ranks, later tokens move up."""
    if vocabulary.keeps_zeros:  # a gene that is not shown is masked
        ids = np.where(drop, vocabulary.mask_id, rows.data).astype(rows.dtype)
        return csr_matrix((ids, rows.indices, rows.indptr), shape=rows.shape)
    if not vocabulary.position_is_gene:
        dropped = np.concatenate([[0], np.cumsum(drop)])
        before = dropped[:-1] - np.repeat(dropped[rows.indptr[:-1]], np.diff(rows.indptr))
        rows = csr_matrix((rows.data, rows.indices - before.astype(rows.indices.dtype), rows.indptr), shape=rows.shape)
    return select(rows, ~drop)


def select(rows: csr_matrix, keep: np.ndarray) -> csr_matrix:
    """Return rows with some of their tokens (tokens,)."""
    bounds = np.concatenate([[0], np.cumsum(keep)])[rows.indptr]
    return csr_matrix((rows.data[keep], rows.indices[keep], bounds), shape=rows.shape)


@njit(cache=True, nogil=True)
def split_counts(indptr: Any, genes: Any, counts: Any, cells: Any, seed_key: Any, low: Any, high: Any) -> Any:
    """Return how many of the molecules of each token are visible (tokens,): binomial, with q drawn for each cell."""
    shown = np.zeros(len(counts), dtype=np.int64)
    for i in range(len(cells)):
        key = randomness.cell_key(seed_key, cells[i])
        q = low + (high - low) * randomness.uniform(key, randomness.SPLIT_SHARE, 0)
        for j in range(indptr[i], indptr[i + 1]):
            n = counts[j]
            if n <= 0:
                continue
            token = randomness.mix(key + np.uint64(genes[j] + 1))
            if n <= EXACT:
                for molecule in range(n):
                    shown[j] += randomness.uniform(token, randomness.SPLIT, molecule) < q
            else:
                radius = np.sqrt(-2 * np.log(1 - randomness.uniform(token, randomness.SPLIT, 0)))  # Box and Muller
                normal = radius * np.cos(2 * np.pi * randomness.uniform(token, randomness.SPLIT, 1))
                shown[j] = min(max(round(n * q + np.sqrt(n * q * (1 - q)) * normal), 0), n)
    return shown
