"""`tl.split`: which cells are trained on and which are tested on, how they are drawn, and a check that no model has seen them."""

from __future__ import annotations

import base64
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from sklearn.model_selection import KFold, StratifiedGroupKFold, StratifiedKFold, StratifiedShuffleSplit

from scbin import _docs, _keys
from scbin._adata import check_adata, copied, read_obs, read_uns, warn, write, write_uns
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.tl._labels import has_column, obs_column
from scbin.tokens.phenotypes import labels_of
from scbin.train.randomness import mixed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scipy.sparse import csr_matrix

    from scbin.model import Model
    from scbin.tokens.tokens import Tokens
    from scbin.tokens.vocabulary import Vocabulary

PARTS = ("train", "validation", "test")
DONORS = "donor_id"  # CELLxGENE's name
N_KEPT = 512  # hashes: of a tenth of a million training cells, about 50 are recognised by them
_LEAST = 0.05  # fraction of cells that were trained on; below it cells may be equal by chance
_BLOCK = 1_024  # cells
# fractions of the cells: held out with their donors, at most; of classes that these have, at least
_MOST_OF_CELLS, _LEAST_JUDGED = 0.4, 0.8


@_docs.shared
@checked
def split(
    adata: AnnData,
    *,
    target: str | None = None,
    split_key: str | None = None,
    test: float = 0.2,
    validation: float = 0.1,
    seed: int = 0,
    copy: bool = False,
) -> AnnData | None:
    """Split the cells into training, validation and test cells.

    Cells of one donor resemble each other, so a model that is tested on donors from training looks better than it is. Pass the
    column of donors (or batches) as `split_key`, and each donor is in one part only. :func:`scbin.tl.finetune` uses the training
    cells, and :func:`scbin.tl.evaluate` scores the test cells.

    Parameters
    ----------
    {adata}
    target
        Column of `obs` whose classes should occur in all parts in similar fractions.
    split_key
        Column of `obs` with donors or batches. :func:`scbin.tl.finetune` then splits further by this column, too.
    test
        Fraction of test cells; with donors the nearest of a half, a third, a quarter ... of them.
    validation
        Fraction of validation cells.
    {seed}
    {copy}

    Returns
    -------
    {returns_copy}

    `adata.obs["scbin_split"]`
        `"train"`, `"validation"` or `"test"`.
    `adata.uns["scbin"]["split"]`
        How it was made, as JSON.

    Raises
    ------
    ScbinInputError
        If there are fewer donors than parts, or a fraction is out of range.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()
    >>> scbin.tl.split(adata, target="louvain", test=0.25)
    >>> int(adata.obs["scbin_split"].value_counts()["test"])
    175
    """
    check_adata(adata)
    if validation < 0 or not 0 < test < 1 - validation:
        raise ScbinInputError("A02", f"test={test} and validation={validation} leave no cells to train or to test on.")
    classes = np.zeros(adata.n_obs, dtype=np.int64)
    if target is not None:
        classes = pd.factorize(labels_of(read_obs(adata, target), target))[0]
    donors = None if split_key is None else read_donors(adata, split_key)
    tested = hold_out(classes, test, donors=donors, seed=seed)
    rest, held_out = np.flatnonzero(~tested), np.zeros(adata.n_obs, dtype=bool)
    own = None if donors is None else donors[rest]
    held_out[rest[hold_out(classes[rest], validation / (1 - tested.mean()), donors=own, seed=seed + 1)]] = True
    if donors is not None and not (tested.any() and (held_out.any() or not validation)):
        found = f"{len(np.unique(donors))} values of {split_key!r} cannot be divided into these parts"
        raise ScbinInputError("L03", f"{found}. Use validation=0 for no validation cells, or another column.")
    parts = Split(~tested & ~held_out, held_out, tested, donors)
    warn_of_donors(adata, parts, split_key)
    adata = copied(adata) if copy else adata
    write(adata, "obs", _keys.SPLIT, parts.column())
    made = {"target": target, "split_key": split_key, "test": test, "validation": validation, "seed": seed}
    write_uns(adata, _keys.SPLIT_RECORD, made)
    return adata if copy else None


# ---- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Split:
    """Which cells are for training, validation and testing; cells in none are not used."""

    train: np.ndarray  # (cells,) bool
    validation: np.ndarray  # (cells,) bool
    test: np.ndarray  # (cells,) bool
    donors: np.ndarray | None = None  # (cells,) text, where donors (or batches) are kept apart

    @property
    def open(self) -> np.ndarray:
        """Cells that may be learned from or chosen by (cells,)."""
        return self.train | self.validation

    def column(self) -> pd.Categorical:
        """Return the split as a column of `obs`."""
        codes = np.select([self.train, self.validation, self.test], [0, 1, 2], -1)
        return pd.Categorical.from_codes(codes, categories=list(PARTS))


def named_parts(column: pd.Series) -> np.ndarray | None:
    """Return the part that a column names for each cell (cells,), NaN for none; `None` where it names something else."""
    parts = column.astype(object)
    return parts.to_numpy() if {*parts.dropna()} <= {*PARTS} and parts.notna().any() else None


def read_donors(data: AnnData | Tokens, key: str) -> np.ndarray:
    """Return the donor or batch of each cell as text; a cell without one is a group by itself."""
    column = obs_column(data, key).astype(object)
    return np.array([f"\0{row}" if pd.isna(value) else str(value) for row, value in enumerate(column)])


def read_split(data: AnnData | Tokens, split_key: str | None = None) -> Split:
    """Return the split that `split_key` names, or `scbin_split` where that has test cells, or else all cells for training.

    Its donors are those that must not be in two parts: a column named by `split_key`, or the one that the split goes by.
    """
    n_cells = data.n_obs if isinstance(data, AnnData) else data.n_cells
    parts = None if split_key is None else named_parts(obs_column(data, split_key))
    by_donor = split_key is not None and parts is None
    if parts is None and has_column(data, _keys.SPLIT):
        parts = named_parts(obs_column(data, _keys.SPLIT))
        parts = parts if parts is not None and "test" in parts else None
    train, validation, test = (np.full(n_cells, part == "train") if parts is None else parts == part for part in PARTS)
    key = split_key if by_donor else None if parts is None else _donor_key(data)
    if key is None:
        return Split(train, validation, test)
    donors = read_donors(data, key)
    groups = [set(donors[part]) for part in (train, validation, test)]
    if by_donor and groups[0] & groups[1]:  # drawn again, by donor
        train, validation = train | validation, np.zeros_like(validation)
    apart = sum(map(len, groups)) == len(set.union(*groups))
    return Split(train, validation, test, donors if by_donor or apart else None)


def _donor_key(data: AnnData | Tokens) -> str | None:
    """Return the column with the donors: the one that `tl.split` was given, or `donor_id`."""
    given = read_uns(data, _keys.SPLIT_RECORD, dict).get("split_key") if isinstance(data, AnnData) else None
    return next((key for key in (given, DONORS) if key is not None and has_column(data, key)), None)


def warn_of_donors(data: AnnData | Tokens, split: Split, split_key: str | None = None) -> None:
    """Warn where cells of one donor are in training and among the held-out cells."""
    is_split = split_key is None or named_parts(obs_column(data, split_key)) is not None
    key = _donor_key(data) if is_split else split_key
    donors = np.zeros(0) if key is None else read_donors(data, key)
    if len(np.unique(donors)) > 1 and np.isin(donors[split.train], donors[split.validation | split.test]).any():
        fix = f"divide by donor with split_key={key!r}, in scbin.tl.split where there are test cells"
        warn("L03", f"cells of one {key!r} are in training and held out: scores are too good for new donors. So {fix}.")


# ---- drawing --------------------------------------------------------------------------------------------------------


def hold_out(
    classes: np.ndarray, fraction: float, *, donors: np.ndarray | None = None, most: int | None = None, seed: int = 0
) -> np.ndarray:
    """Return which cells are held out (cells,): about a fraction of them, of each class alike; with donors, whole donors.

    A class of a single cell is never held out. Of donors those are that suit best (`suits`).
    """
    held_out = np.zeros(len(classes), dtype=bool)
    fraction = fraction if most is None else min(fraction, most / max(len(classes), 1))
    if fraction <= 0 or len(classes) < 2:
        return held_out
    codes = np.unique(classes, return_inverse=True)[1]
    if donors is not None:
        folds = folds_of(codes, max(round(1 / fraction), 2), donors=donors, seed=seed)
        order = np.random.default_rng(seed).permutation(folds.max() + 1)
        return (folds == max(order, key=lambda fold: suits(codes, folds == fold))) & (len(order) > 1)
    rows = np.flatnonzero(np.bincount(codes)[codes] > 1)
    n_held = min(max(round(fraction * len(classes)), 1), len(rows) - 1)
    if n_held > 0:
        stratified = min(n_held, len(rows) - n_held) >= len(np.unique(codes[rows]))
        draw = StratifiedShuffleSplit(1, test_size=n_held, random_state=seed)
        held_out[rows[next(draw.split(rows, codes[rows] * stratified))[1]]] = True
    return held_out


def suits(classes: np.ndarray, held_out: np.ndarray) -> int:
    """Return how well donors can be held out: 1 if the others have all classes, 2 if also most cells, and they the classes of most."""
    complete = set(classes) == set(classes[~held_out])
    judge = held_out.mean() < _MOST_OF_CELLS and np.isin(classes, classes[held_out]).mean() > _LEAST_JUDGED
    return int(complete) + int(complete and judge)


def folds_of(classes: np.ndarray, n_folds: int, *, donors: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """Return the fold of each cell (cells,), with the classes in similar fractions and no donor in two folds."""
    folds = np.zeros(len(classes), dtype=np.int64)
    n_folds = min(n_folds, len(classes) if donors is None else len(np.unique(donors)))
    if n_folds < 2:
        return folds
    largest = np.unique(classes, return_counts=True)[1].max()
    splitter: Any = KFold if largest < n_folds else StratifiedKFold
    if donors is not None:
        splitter, n_folds = StratifiedGroupKFold, min(n_folds, largest)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes with fewer cells than folds
        draw = splitter(n_folds, shuffle=True, random_state=seed)
        for number, (_, test) in enumerate(draw.split(folds, classes, donors)):
            folds[test] = number
    return np.unique(folds, return_inverse=True)[1]


# ---- which cells a model was trained on -----------------------------------------------------------------------------


def cell_hashes(rows: csr_matrix, vocabulary: Vocabulary) -> np.ndarray:
    """Return a hash of the genes in each token row (cells,) uint64, 0 for rows without any; phenotypes play no part."""
    words = mixed((rows.indices.astype(np.uint64) << np.uint64(32)) | rows.data.astype(np.uint64))
    words[~vocabulary.is_gene_token(rows.data)] = 0
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(words, dtype=np.uint64)])
    result = np.diff(sums[rows.indptr])  # sums and differences wrap around alike
    return np.where(result == 0, result, mixed(result))


def hash_blocks(tokens: Tokens, cells: np.ndarray) -> Iterator[np.ndarray]:
    """Go through the hashes of some cells, read block by block."""
    for start in range(0, len(cells), _BLOCK):
        yield cell_hashes(tokens.take(cells[start : start + _BLOCK]), tokens.vocabulary)


def remembered_cells(tokens: Tokens, cells: np.ndarray) -> str:
    """Return the smallest hashes of the training cells as text: a sample that depends on the cells alone."""
    kept = np.zeros(0, dtype=np.uint64)
    for hashes in hash_blocks(tokens, np.asarray(cells)):
        kept = np.unique(np.concatenate([kept, hashes[hashes > 0]]))[:N_KEPT]
    return base64.b64encode(kept.astype("<u8").tobytes()).decode()


def fraction_trained_on(remembered: object, hashes: np.ndarray) -> float:
    """Return the fraction of cells that are among the remembered ones, 0 where nothing can be said.

    All training cells with a hash up to the largest one kept are among those kept.
    """
    try:
        kept = np.frombuffer(base64.b64decode(str(remembered or ""), validate=True), dtype="<u8")
    except ValueError:  # a model that came from elsewhere may say anything
        return 0.0
    if len(kept) == N_KEPT:
        hashes = hashes[hashes <= kept.max()]
    return float(np.isin(hashes[hashes > 0], kept).sum() / max((hashes > 0).sum(), 1))


def warn_of_leakage(tokens: Tokens, name: str, test: np.ndarray, model: Model, *, split_known: bool) -> None:
    """Warn (L04) where a model has learned from the cells that it is scored on, whose labels it was told."""
    hashes = np.concatenate([np.zeros(0, dtype=np.uint64), *hash_blocks(tokens, test)])
    finetuned = model.training.get("finetune") or {}
    tuned = fraction_trained_on(finetuned.get("cells"), hashes) if name in finetuned.get("targets", {}) else 0.0
    pretrained = fraction_trained_on(model.training.get("cells"), hashes)
    told = name in ["genes", *(phenotype.name for phenotype in tokens.vocabulary.phenotypes)]
    if tuned >= _LEAST or (pretrained >= _LEAST and told):
        what = f"the model was trained on {name!r} of about {max(tuned, pretrained):.0%} of the cells it is scored on"
        fix = "Score by the split it was trained with." if split_known else "Call scbin.tl.split before training."
        warn("L04", f"{what}, and may just remember it. {fix}")
