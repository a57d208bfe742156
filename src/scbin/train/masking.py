"""Which tokens are hidden, what stands in their place, and what is to be predicted there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numba import njit

from scbin._arguments import check_fields, shown
from scbin._errors import ScbinInputError
from scbin.nn.limits import check_limits
from scbin.nn.packs import make_pack
from scbin.tokens.vocabulary import MASK, PAD
from scbin.train import randomness

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from scbin.nn.packs import Pack
    from scbin.tokens.vocabulary import Vocabulary

_PROBABILITIES = ("gene_mask_prob", "phenotype_mask_prob", "phenotype_drop", "zero_swap", "nonzero_ratio")
_TRIES = 32  # draws of an unexpressed gene before walking to the next free one
GENE, NEVER = 0, -1  # what a token is: a gene, 1.. the number of a phenotype, then a special; never masked


@dataclass(frozen=True)
class Masking:
    """What is masked in training, how often, and what stands there instead.

    The defaults hide 15 % of the genes and half of the phenotypes. Where rows have no zeros, unexpressed genes are asked for too,
    as `[MASK]` like the others, so many that bin 0 is as frequent among the labels as the other bins are on average. Randomness
    is a function of (seed, epoch, cell): neither batches nor processes change which tokens are hidden.

    Parameters
    ----------
    gene_mask_prob
        Probability that a gene is to be predicted.
    phenotype_mask_prob
        Probability that a phenotype is to be predicted; `[NO_X]` never is.
    replacement
        Fractions of hidden genes that become `[MASK]`, become a random token, stay as they are. They sum to 1. `None` is (0.8,
        0.1, 0.1), and (1, 0, 0) where tokens hold counts, whose sum a random one would change.
    random_from
        Where random tokens come from: the position's `"group"`, or the whole `"vocabulary"`.
    mask_specials
        Hide and predict `[CLS]`, `[START]` and `[END]` too, as Geneformer does.
    phenotype_drop
        Fraction of the hidden phenotypes that leave the row without being predicted.
    zero_swap
        For rows without zeros: probability per cell that hidden genes give their place to unexpressed ones, so that 1 / bins of
        all labels are bin 0 (PerturbGene: 0.9). Then no others are asked for.
    nonzero_ratio
        For rows with zeros: hide exactly `gene_mask_prob` times the number of genes, this fraction of them expressed
        (Bioformers: 0.5), no refill where there are too few.
    attend_zeros
        For rows with zeros: whether zeros are attended to, hidden or not (Polygene: `False`).

    Examples
    --------
    >>> Masking(gene_mask_prob=0.3, replacement=(1, 0, 0)).gene_mask_prob
    0.3
    """

    gene_mask_prob: float = 0.15
    phenotype_mask_prob: float = 0.5
    replacement: tuple[float, float, float] | None = None
    random_from: Literal["group", "vocabulary"] = "group"
    mask_specials: bool = False
    phenotype_drop: float = 0.0
    zero_swap: float = 0.0
    nonzero_ratio: float | None = None
    attend_zeros: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_limits(vars(self), dict.fromkeys(_PROBABILITIES, (0.0, 1.0)))
        if self.replacement is not None:
            try:
                parts = np.array(self.replacement, dtype=np.float64)
            except (TypeError, ValueError):
                parts = np.empty(0)
            if parts.shape != (3,) or not parts.min() >= 0 or not abs(parts.sum() - 1) < 1e-6:
                given = shown(self.replacement)
                raise ScbinInputError("A02", f"replacement is {given}; it needs three fractions that sum to 1.")
            object.__setattr__(self, "replacement", tuple(parts.tolist()))


@dataclass(frozen=True, eq=False)
class Hidden:
    """What is to be predicted in a pack, ordered by loss; `where` points into its tokens."""

    where: np.ndarray  # (M,) int64
    labels: np.ndarray  # (M,) int64 token ids
    start: np.ndarray  # (M,) int64, first id of the group
    stop: np.ndarray  # (M,) int64, one past its last id
    loss: np.ndarray  # (M,) int64, index into `masked_losses`

    def __len__(self) -> int:
        return len(self.where)


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
    is_zero = np.zeros(len(ids), bool)
    if vocabulary.keeps_zeros:
        is_zero = (row.kinds == GENE) & (ids == vocabulary.group_start[positions])
    hit = _hidden(row, is_zero, vocabulary, masking)
    asked = hit | (score_all & (row.kinds >= GENE) & (row.kinds <= len(vocabulary.phenotypes)))
    labels = np.where(asked, ids, -1)
    ids = _replaced(row, hit, vocabulary, masking)
    attended = ~is_zero | masking.attend_zeros
    kept = np.ones(len(ids), bool)
    if masking.phenotype_drop:
        phenotypes = np.flatnonzero(hit & (row.kinds > GENE) & (row.kinds <= len(vocabulary.phenotypes)))
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
    places = _draw_unexpressed(
        rows.indptr, positions, vocabulary.n_positions, owner[genes], row.keys[genes], counters, candidates
    )
    genes, places = genes[places >= 0], places[places >= 0]
    kept[genes] &= not masking.zero_swap
    columns = [owner, positions, ids, labels, row.kinds, attended]
    if len(genes) or masking.phenotype_drop or not masking.attend_zeros:
        like = np.ones(len(genes), dtype=np.int64)
        new = [owner[genes], places, like * vocabulary.mask_id, vocabulary.group_start[places], like * GENE]
        new.append(np.full(len(genes), masking.attend_zeros))
        columns = [np.append(old, more) for old, more in zip(columns, new, strict=True)]
        key = 2 * columns[0] + ~columns[-1]  # by row, attended tokens first; numpy has a radix sort for 16 bits alone
        order = np.argsort(key.astype(np.uint16) if len(cells) < 2**15 else key, kind="stable")
        order = order if kept.all() else order[np.append(kept, like > 0)[order]]
        columns = [column[order] for column in columns]
    owner, positions, ids, labels, kinds, attended = columns
    lengths, n_attended = (np.bincount(of, minlength=len(cells)) for of in (owner, owner[attended]))
    pack = make_pack(ids, positions, lengths, cells, key_lengths=None if masking.attend_zeros else n_attended)
    where = np.flatnonzero(labels >= 0)
    where = where[np.argsort(kinds[where], kind="stable")]
    special, positions = kinds[where] > len(vocabulary.phenotypes), positions[where]
    start = np.where(special, 0, vocabulary.group_start[positions])
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
    is_special = np.zeros(vocabulary.n_tokens, bool)
    is_special[[id for name, id in vocabulary.specials.items() if name not in (PAD, MASK)]] = True
    kinds = of_position[positions]
    other = np.flatnonzero((ids < vocabulary.group_start[positions]) | (ids >= vocabulary.group_stop[positions]))
    kinds[other] = np.where(is_special[ids[other]] & (kinds[other] != NEVER), specials, NEVER)
    return kinds


def _hidden(row: _Row, is_zero: np.ndarray, vocabulary: Vocabulary, masking: Masking) -> np.ndarray:
    """Choose which tokens are to be predicted (T,)."""
    by_kind = np.full(len(vocabulary.phenotypes) + 3, masking.phenotype_mask_prob)
    by_kind[[GENE, -2, NEVER]] = masking.gene_mask_prob, masking.gene_mask_prob * masking.mask_specials, 0.0
    p = by_kind[row.kinds]
    at = np.flatnonzero(p > 0)
    hit = np.zeros(len(p), bool)
    hit[at] = row.uniforms(randomness.SELECT, at) < p[at]
    if masking.nonzero_ratio is not None:  # exact numbers of zeros and others in each row, every set equally likely
        genes = np.flatnonzero(row.kinds == GENE)
        groups = 2 * row.owner[genes] + is_zero[genes]
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
    indptr: Any, positions: Any, n_positions: Any, owner: Any, keys: Any, counters: Any, candidates: Any
) -> Any:
    """Return a position of `candidates` for each of some rows (n,) that is not taken in its row, -1 where there is none."""
    places, taken, row = np.full(len(owner), -1), np.zeros(n_positions, np.bool_), -1
    for k in range(len(owner)):
        if owner[k] != row:
            row = owner[k]
            taken[:] = False
            taken[positions[indptr[row] : indptr[row + 1]]] = True
        slot = 0
        for attempt in range(_TRIES + len(candidates) if len(candidates) else 0):
            if attempt < _TRIES:
                slot = int(
                    randomness.uniform(keys[k], randomness.PLACE, counters[k] * _TRIES + attempt) * len(candidates)
                )
            else:
                slot = (slot + 1) % len(candidates)
            if not taken[candidates[slot]]:
                places[k] = candidates[slot]
                taken[places[k]] = True
                break
    return places
