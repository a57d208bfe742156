"""Which tokens are hidden, what stands in their place, and what is to be predicted there."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scbin._arguments import choices, flags, numbers, plain, shown
from scbin._errors import ScbinInputError
from scbin.data._mask_kernel import hash_uniform, mask_kernel
from scbin.data.packing import Pack, plan_packs, take_rows
from scbin.encoding.vocabulary import END, Vocabulary

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

EVALUATION = -1
"""The epoch of evaluation masks, which depend on (seed, cell) alone."""

_CHOICES = {
    "random_from": ("group", "vocabulary"),
    "phenotype_drop_as": ("removed", "pad"),
    "zero_swap_pool": ("unexpressed", "absent"),
    "attend_zeros": ("all", "masked", "seed"),
    "loss_positions": ("masked", "all"),
}
_ATTEND = {"all": 0, "masked": 1, "seed": 2}


@dataclass(frozen=True)
class MaskingScheme:
    """What is masked, how often, and what stands there instead.

    The defaults hide 15 % of the genes and half of the phenotypes; of the hidden genes 80 % become `[MASK]`, 10 % another
    token of their group and 10 % stay. Randomness is a function of (seed, epoch, cell): neither batches nor processes change
    which tokens are hidden.

    Parameters
    ----------
    gene_mask_prob
        Probability that a gene is to be predicted.
    phenotype_mask_prob
        Probability that a phenotype is to be predicted; `[NO_X]` never is.
    replacement
        Shares of hidden genes that become `[MASK]`, become a random token, stay as they are. They sum to 1.
    random_from
        Where random tokens come from: the position's `"group"`, or the whole `"vocabulary"`.
    mask_specials
        Hide and predict `[CLS]`, `[START]` and `[END]` too, as Geneformer does.
    phenotype_drop
        Share of the hidden phenotypes that leave the row without being predicted.
    phenotype_drop_as
        How they leave: `"removed"`, or as an attended `"pad"` token at position 0.
    zero_targets
        For rows without zeros: unexpressed genes to predict for each hidden gene. They stand in the row as `[MASK]`, like the
        others, with bin 0 as the answer. `None` asks for as many as make bin 0 as frequent among the answers as the other
        bins are on average (one per hidden gene for `"binary"`).
    zero_swap
        Probability per cell that hidden genes give their place to unexpressed ones, so that 1 / bins of all answers are bin
        0 (PerturbGene: 0.9). Replaces `zero_targets`.
    zero_swap_pool
        Unexpressed genes are `"unexpressed"` where the row can tell; `"absent"` also takes those that truncation cut off.
    nonzero_ratio
        For rows with zeros: hide exactly `gene_mask_prob` times the number of genes, this share of them expressed
        (Bioformers: 0.5), no refill where there are too few.
    attend_zeros
        For rows with zeros: `"all"` zeros are attended to; `"masked"`: only those that are hidden, so that a hidden gene
        looks the same either way; `"seed"`: none, hidden or not, as in Polygene.
    loss_positions
        `"masked"`, or `"all"` for Bioformers' loss that also scores copied tokens.
    chosen
        Positions to hide, exactly these and always, instead of random ones.

    Examples
    --------
    >>> MaskingScheme(gene_mask_prob=0.3, replacement=(1, 0, 0)).gene_mask_prob
    0.3
    """

    gene_mask_prob: float = 0.15
    phenotype_mask_prob: float = 0.5
    replacement: tuple[float, float, float] = (0.8, 0.1, 0.1)
    random_from: Literal["group", "vocabulary"] = "group"
    mask_specials: bool = False
    phenotype_drop: float = 0.0
    phenotype_drop_as: Literal["removed", "pad"] = "removed"
    zero_targets: float | None = None
    zero_swap: float = 0.0
    zero_swap_pool: Literal["unexpressed", "absent"] = "unexpressed"
    nonzero_ratio: float | None = None
    attend_zeros: Literal["all", "masked", "seed"] = "all"
    loss_positions: Literal["masked", "all"] = "masked"
    chosen: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, plain(getattr(self, item.name)))
        choices(_CHOICES, **{name: getattr(self, name) for name in _CHOICES})
        flags(mask_specials=self.mask_specials)
        shares = ("gene_mask_prob", "phenotype_mask_prob", "phenotype_drop", "zero_swap")
        numbers(**{name: getattr(self, name) for name in shares})
        numbers(optional=True, zero_targets=self.zero_targets, nonzero_ratio=self.nonzero_ratio)
        for name in (*shares, *(() if self.nonzero_ratio is None else ("nonzero_ratio",))):
            if not 0 <= getattr(self, name) <= 1:
                raise ScbinInputError("T06", f"{name} is {getattr(self, name)}; a probability lies between 0 and 1.")
        if self.zero_targets is not None and not 0 <= self.zero_targets <= 100:
            raise ScbinInputError("T06", f"zero_targets is {self.zero_targets}; it needs a number from 0 to 100.")
        replacement, chosen = _numbers(self.replacement), _numbers(self.chosen)
        if replacement is None or len(replacement) != 3 or min(replacement) < 0 or abs(sum(replacement) - 1) > 1e-6:
            raise ScbinInputError(
                "T07", f"replacement is {shown(self.replacement)}; it needs three shares that sum to 1."
            )
        if chosen is None or any(place != int(place) or place < 0 for place in chosen):
            raise ScbinInputError("T07", f"chosen is {shown(self.chosen)}; it needs positions, whole numbers from 0.")
        object.__setattr__(self, "replacement", replacement)
        object.__setattr__(self, "chosen", tuple(int(place) for place in chosen))


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
class Targets:
    """What is to be predicted, ordered by task; `where` points into the tokens of the pack."""

    where: np.ndarray  # (M,) int64
    labels: np.ndarray  # (M,) int64 token ids
    start: np.ndarray  # (M,) int64, first id of the group
    stop: np.ndarray  # (M,) int64, one past its last id
    task: np.ndarray  # (M,) int64, index into `task_names`

    def __len__(self) -> int:
        return len(self.where)


def task_names(vocabulary: Vocabulary) -> tuple[str, ...]:
    """Names of what can be predicted: genes, each phenotype, special tokens."""
    return ("genes", *(phenotype.name for phenotype in vocabulary.phenotypes), "specials")


def mask_rows(
    tokens: csr_matrix,
    cells: np.ndarray,
    vocabulary: Vocabulary,
    scheme: MaskingScheme,
    *,
    seed: int,
    epoch: int,
    views: Literal[1, 2] = 1,
    keys: np.ndarray | None = None,
    zero_positions: np.ndarray | None = None,
) -> tuple[Pack, Targets]:
    """Lay cells end to end with some of their tokens hidden.

    Parameters
    ----------
    tokens
        Token matrix.
    cells
        Rows of it, in the order they shall have.
    vocabulary
        What its tokens mean.
    scheme
        What to hide.
    seed, epoch
        With the cell they determine every choice. `epoch=EVALUATION` gives masks that stay the same.
    views
        2 deals the genes of each cell into two rows (rows 2 i and 2 i + 1), at random; specials and phenotypes stand in both.
    keys
        What identifies the cells in the random choices. Default: `cells`.
    zero_positions
        Positions of genes that may be asked for as unexpressed. Default: all genes.

    Returns
    -------
    The rows as one pack, and what is to be predicted in it.

    Examples
    --------
    >>> from scipy.sparse import csr_matrix
    >>> from scbin.encoding.bins import Bins
    >>> vocabulary = Vocabulary.build("bins", ["A", "B", "C"], bins=Bins((0.1, 1.0)))
    >>> tokens = csr_matrix([[2, 4, 6, 0, 7, 3]])  # [CLS] [START] A=1 C=2 [END]
    >>> scheme = MaskingScheme(chosen=(4,))
    >>> pack, targets = mask_rows(tokens, np.array([0]), vocabulary, scheme, seed=0, epoch=0)
    >>> pack.input_ids, targets.labels, targets.start, targets.stop
    (array([2, 4, 6, 1, 3]), array([7]), array([5]), array([8]))
    """
    cells = np.asarray(cells, dtype=np.int64)
    keys = cells if keys is None else np.asarray(keys, dtype=np.int64)
    genes = vocabulary.gene_positions
    zeros_kept = vocabulary.bins is not None and vocabulary.bins.zeros == "keep"
    asks_zeros = vocabulary.bins is not None and not zeros_kept
    n_extra = _zero_targets(scheme, vocabulary) if asks_zeros else 0.0
    if scheme.zero_swap and not asks_zeros:
        raise ScbinInputError(
            "T08", "zero_swap needs an encoding by bins without zeros; here zeros are in the row already."
        )
    if scheme.nonzero_ratio is not None and not zeros_kept:
        raise ScbinInputError("T09", 'nonzero_ratio needs rows with zeros: tokenize with zeros="keep".')
    levels = max(vocabulary.n_levels, 1)
    probs = (
        scheme.gene_mask_prob, scheme.phenotype_mask_prob, scheme.replacement[0], scheme.replacement[1],
        scheme.phenotype_drop, scheme.zero_swap, 1 / levels / (scheme.zero_swap or 1), n_extra,
        -1.0 if scheme.nonzero_ratio is None else scheme.nonzero_ratio,
    )  # fmt: skip
    flags = (
        int(views), scheme.random_from == "vocabulary", scheme.mask_specials, scheme.phenotype_drop_as == "pad",
        scheme.loss_positions == "all", _ATTEND[scheme.attend_zeros], scheme.zero_swap_pool == "unexpressed", 0,
    )  # fmt: skip
    n_longest = _longest(vocabulary)
    ids = (
        vocabulary.mask_id,
        vocabulary.n_tokens,
        int(asks_zeros),
        len(vocabulary.phenotypes) + 1,
        zeros_kept,
        n_longest,
    )
    layout = (vocabulary.group_start, vocabulary.group_stop, _tasks(vocabulary))
    candidates = genes if zero_positions is None else np.asarray(zero_positions, dtype=np.int64)
    n_most = int((tokens.indptr[cells + 1] - tokens.indptr[cells]).astype(np.int64).sum())
    most = int(n_most * (views + np.ceil(n_extra))) + len(cells) * len(scheme.chosen) * views + 1
    out = _buffers(most, len(cells) * views)
    n_out, n_targets = mask_kernel(
        tokens.indptr, tokens.indices, tokens.data, cells, keys, random_key(seed, epoch), layout, ids, probs, flags,
        candidates, np.asarray(scheme.chosen, dtype=np.int64), out,
    )  # fmt: skip
    ids_out, positions, cu_seqlens, n_keys, *targets = out
    pack = Pack(
        input_ids=ids_out[:n_out],
        position_ids=positions[:n_out],
        cu_seqlens=cu_seqlens,
        cells=np.repeat(cells, views),
        key_lengths=n_keys if scheme.attend_zeros != "all" else None,
    )
    order = np.argsort(targets[-1][:n_targets], kind="stable")
    return pack, Targets(*(column[:n_targets][order] for column in targets))


def split_pack(pack: Pack, targets: Targets, token_budget: int) -> list[tuple[Pack, Targets, np.ndarray]]:
    """Divide a pack into packs within a token budget; the third item of each says which rows it took."""
    parts = plan_packs(pack.lengths, token_budget)
    if len(parts) == 1 and len(parts[0]) == pack.n_rows:
        return [(pack, targets, parts[0])]
    owner, moved = np.full(pack.n_tokens, -1), np.zeros(pack.n_tokens, dtype=np.int64)
    packs = []
    for number, rows in enumerate(parts):
        part, where = take_rows(pack, rows)
        owner[where], moved[where] = number, np.arange(len(where))
        packs.append((part, rows))
    owner_of_target = owner[targets.where]
    result = []
    for number, (part, rows) in enumerate(packs):
        mine = owner_of_target == number
        columns = (targets.labels[mine], targets.start[mine], targets.stop[mine], targets.task[mine])
        result.append((part, Targets(moved[targets.where[mine]], *columns), rows))
    return result


def split_cells(n_cells: int, share: float, seed: int) -> np.ndarray:
    """Return whether each cell is held out for validation, a function of (seed, cell) alone."""
    return hash_uniform(random_key(seed, EVALUATION), np.arange(n_cells), 15) < share


def epoch_order(cells: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Return the cells in the order of one epoch, a function of (seed, epoch, set of cells)."""
    bits = np.random.Philox(key=np.array([seed % 2**64, epoch % 2**64], dtype=np.uint64))
    return np.random.Generator(bits).permutation(np.sort(cells))


def _zero_targets(scheme: MaskingScheme, vocabulary: Vocabulary) -> float:
    if scheme.zero_swap or vocabulary.n_levels < 2:
        return 0.0
    return 1 / (vocabulary.n_levels - 1) if scheme.zero_targets is None else float(scheme.zero_targets)


def _longest(vocabulary: Vocabulary) -> int:
    """Tokens from which on a row counts as truncated; a row of every gene cannot have been."""
    complete = len(vocabulary.genes) + len(vocabulary.phenotypes) + 2 + (END in vocabulary.specials)
    return vocabulary.max_length if vocabulary.max_length < complete else 2**62


def _tasks(vocabulary: Vocabulary) -> np.ndarray:
    """Task of each position (positions,): 0 genes, 1.. phenotypes, the last one for specials."""
    task = np.full(vocabulary.n_positions, len(vocabulary.phenotypes) + 1, dtype=np.int64)
    task[vocabulary.gene_positions] = 0
    for number, phenotype in enumerate(vocabulary.phenotypes, start=1):
        task[phenotype.position] = number
    return task


def _buffers(n_tokens: int, n_rows: int) -> tuple[np.ndarray, ...]:
    ids, positions, *targets = (np.empty(n_tokens, dtype=np.int64) for _ in range(7))
    return (ids, positions, np.empty(n_rows + 1, dtype=np.int32), np.empty(n_rows, dtype=np.int32), *targets)


def random_key(seed: int, epoch: int) -> np.uint64:
    """Return one word that stands for (seed, epoch); splitmix64 keeps neighbours far apart."""
    x = (int(seed) % 2**64) * 0x9E3779B97F4A7C15 + (int(epoch) % 2**64) * 0xD1B54A32D192ED03 + 0x2545F4914F6CDD1D
    x %= 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    return np.uint64((x ^ (x >> 27)) % 2**64)
