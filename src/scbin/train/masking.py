"""Which tokens are hidden, what stands in their place, and what is to be predicted there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scbin._arguments import check_fields, shown
from scbin._errors import ScbinInputError
from scbin.nn.limits import check_limits
from scbin.nn.packs import make_pack
from scbin.tokens.vocabulary import MASK, PAD
from scbin.train.mask_kernel import GENE, HELD_OUT, NEVER, Positions, Rules, hash_uniform, mask_kernel
from scbin.train.task import EVALUATION

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from scbin.nn.packs import Pack
    from scbin.tokens.vocabulary import Vocabulary

_PROBABILITIES = ("gene_mask_prob", "phenotype_mask_prob", "phenotype_drop", "zero_swap", "nonzero_ratio")
_LIMITS = {**dict.fromkeys(_PROBABILITIES, (0.0, 1.0)), "zero_targets": (0.0, 100.0)}


@dataclass(frozen=True)
class Masking:
    """What is masked in training, how often, and what stands there instead.

    The defaults hide 15 % of the genes and half of the phenotypes. Randomness is a function of (seed, epoch,
    cell): neither batches nor processes change which tokens are hidden.

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
    phenotype_drop_as
        How they leave: `"removed"`, or as an attended `"pad"` token at position 0.
    zero_targets
        For rows without zeros: unexpressed genes to predict for each hidden gene. They stand in the row as `[MASK]`, like the
        others, with bin 0 as the label. `None` asks for as many as make bin 0 as frequent among the labels as the other
        bins are on average (one per hidden gene for `"binary"`).
    zero_swap
        Probability per cell that hidden genes give their place to unexpressed ones, so that 1 / bins of all labels are bin
        0 (PerturbGene: 0.9). Replaces `zero_targets`.
    zero_swap_pool
        Unexpressed genes are `"unexpressed"` where the row can tell; `"absent"` also takes those that truncation cut off.
    nonzero_ratio
        For rows with zeros: hide exactly `gene_mask_prob` times the number of genes, this fraction of them expressed
        (Bioformers: 0.5), no refill where there are too few.
    attend_zeros
        For rows with zeros: `"all"` zeros are attended to; `"masked"`: only those that are hidden, so that a hidden gene
        looks the same either way; `"seed"`: none, hidden or not, as in Polygene.
    chosen
        Positions to hide, exactly these and always, instead of random ones.

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
    phenotype_drop_as: Literal["removed", "pad"] = "removed"
    zero_targets: float | None = None
    zero_swap: float = 0.0
    zero_swap_pool: Literal["unexpressed", "absent"] = "unexpressed"
    nonzero_ratio: float | None = None
    attend_zeros: Literal["all", "masked", "seed"] = "all"
    chosen: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        check_limits(vars(self), _LIMITS)
        chosen, replacement = _numbers(self.chosen), None
        if self.replacement is not None:
            replacement = _numbers(self.replacement) or ()
            if len(replacement) != 3 or min(replacement) < 0 or abs(sum(replacement) - 1) > 1e-6:
                given = shown(self.replacement)
                raise ScbinInputError("A02", f"replacement is {given}; it needs three fractions that sum to 1.")
        if chosen is None or any(position != int(position) or position < 0 for position in chosen):
            raise ScbinInputError("A02", f"chosen is {shown(self.chosen)}; it needs positions, whole numbers from 0.")
        object.__setattr__(self, "replacement", replacement)
        object.__setattr__(self, "chosen", tuple(int(position) for position in chosen))


def _numbers(values: Any) -> tuple[float, ...] | None:
    """Return a list or array of finite numbers as plain ones, or `None` for anything else."""
    try:
        array = np.asarray(values)
    except ValueError:
        return None
    if array.ndim != 1 or array.dtype.kind not in "iuf" or not np.isfinite(array).all():
        return None
    return tuple(array.astype(np.float64).tolist())


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
    >>> pack, hidden = mask_rows(rows, np.array([0]), vocabulary, Masking(chosen=(3,)), seed=0, epoch=0)
    >>> pack.input_ids, hidden.labels
    (tensor([2, 4, 5, 1, 3]), array([7]))
    """
    where, rules = _positions(vocabulary, masking, zero_positions), _rules(vocabulary, masking, score_all)
    cells = np.asarray(cells, dtype=np.int64)
    most = int(rows.nnz * (1 + np.ceil(rules.n_extra))) + len(cells) * len(masking.chosen) + 1
    columns = [np.empty(most, dtype=np.int64) for _ in range(3)]
    lengths, n_keys = np.empty(len(cells), dtype=np.int64), np.empty(len(cells), dtype=np.int64)
    out = (*columns, lengths, n_keys)
    n = mask_kernel(rows.indptr, rows.indices, rows.data, cells, random_key(seed, epoch), where, rules, out)
    ids, positions, labels = (column[:n] for column in columns)
    pack = make_pack(ids, positions, lengths, cells, key_lengths=n_keys if masking.attend_zeros != "all" else None)
    at = np.flatnonzero(labels >= 0)
    labels, start, stop = labels[at], where.group_start[positions[at]], where.group_stop[positions[at]]
    in_group = (labels >= start) & (labels < stop)
    start, stop = np.where(in_group, start, 0), np.where(in_group, stop, vocabulary.n_tokens)
    loss = np.where(in_group, where.kind[positions[at]], len(vocabulary.phenotypes) + 1)
    order = np.argsort(loss, kind="stable")
    return pack, Hidden(*(column[order] for column in (at, labels, start, stop, loss)))


def _positions(vocabulary: Vocabulary, masking: Masking, zero_positions: np.ndarray | None) -> Positions:
    """Return what the kernel asks of the vocabulary."""
    asks_zeros = vocabulary.bins is not None and not vocabulary.keeps_zeros
    if masking.zero_swap and not asks_zeros:
        raise ScbinInputError("A03", "zero_swap needs bins without zeros; here zeros are in the row already.")
    if masking.nonzero_ratio is not None and not vocabulary.keeps_zeros:
        raise ScbinInputError("A03", 'nonzero_ratio needs rows with zeros: tokenize with zeros="keep".')
    kind = np.full(vocabulary.n_positions, len(vocabulary.phenotypes) + 1, dtype=np.int64)  # specials
    kind[vocabulary.gene_positions] = GENE
    for number, phenotype in enumerate(vocabulary.phenotypes, start=1):
        kind[phenotype.position] = number
    if vocabulary.depth_position is not None:
        kind[vocabulary.depth_position] = NEVER
    chosen = np.zeros(vocabulary.n_positions, dtype=bool)
    chosen[[position for position in masking.chosen if position < vocabulary.n_positions]] = True
    is_special = np.zeros(vocabulary.n_tokens, dtype=bool)
    is_special[[id for name, id in vocabulary.specials.items() if name not in (PAD, MASK)]] = True
    return Positions(
        group_start=vocabulary.group_start.astype(np.int64),
        group_stop=vocabulary.group_stop.astype(np.int64),
        kind=kind,
        candidates=np.asarray(vocabulary.gene_positions if zero_positions is None else zero_positions, dtype=np.int64),
        chosen=chosen,
        is_special=is_special,
        mask_id=int(vocabulary.mask_id),
        zeros_kept=bool(vocabulary.keeps_zeros),
        lowest=int(asks_zeros),
        longest=int(vocabulary.max_length) if vocabulary.max_length < vocabulary.n_positions else 2**62,
    )


def _rules(vocabulary: Vocabulary, masking: Masking, score_all: bool) -> Rules:
    """Return the numbers of a `Masking` for the kernel."""
    usual = (1.0, 0.0, 0.0) if vocabulary.unit == "counts" else (0.8, 0.1, 0.1)
    p_mask, p_random, _ = masking.replacement or usual
    return Rules(
        p_gene=float(masking.gene_mask_prob),
        p_phenotype=float(masking.phenotype_mask_prob),
        p_mask=p_mask,
        p_random=p_random,
        p_drop=float(masking.phenotype_drop),
        p_swap=float(masking.zero_swap),
        q_swap=1 / max(vocabulary.n_levels, 1) / (masking.zero_swap or 1.0),
        n_extra=extra_zeros(vocabulary, masking),
        nonzero_ratio=-1.0 if masking.nonzero_ratio is None else float(masking.nonzero_ratio),
        from_vocabulary=masking.random_from == "vocabulary",
        mask_specials=masking.mask_specials,
        drop_as_pad=masking.phenotype_drop_as == "pad",
        score_all=score_all,
        attend={"all": 0, "masked": 1, "seed": 2}[masking.attend_zeros],
        only_unexpressed=masking.zero_swap_pool == "unexpressed",
        only_chosen=len(masking.chosen) > 0,
    )


def extra_zeros(vocabulary: Vocabulary, masking: Masking) -> float:
    """Return how many unexpressed genes are asked for with each hidden gene."""
    if masking.zero_swap or vocabulary.keeps_zeros or vocabulary.n_levels < 2:
        return 0.0
    return 1 / (vocabulary.n_levels - 1) if masking.zero_targets is None else float(masking.zero_targets)


def held_out_cells(n_cells: int, fraction: float, seed: int) -> np.ndarray:
    """Return whether each cell is held out for validation (cells,), a function of (seed, cell) alone."""
    return hash_uniform(random_key(seed, EVALUATION), np.arange(n_cells), HELD_OUT) < fraction


def epoch_order(cells: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Return the cells in the order of one epoch, a function of (seed, epoch, set of cells)."""
    bits = np.random.Philox(key=np.array([seed % 2**64, epoch % 2**64], dtype=np.uint64))
    return np.random.Generator(bits).permutation(np.sort(cells))


def random_key(seed: int, epoch: int) -> np.uint64:
    """Return one word that stands for (seed, epoch); splitmix64 keeps neighbours far apart."""
    x = (int(seed) % 2**64) * 0x9E3779B97F4A7C15 + (int(epoch) % 2**64) * 0xD1B54A32D192ED03 + 0x2545F4914F6CDD1D
    x %= 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    return np.uint64((x ^ (x >> 27)) % 2**64)
