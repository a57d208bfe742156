"""Which cells are learned from and which are asked about: `obs["scbin_split"]`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scbin import _keys
from scbin._anndata import check_adata, check_writable, copied, read_obs, warn, write_obs
from scbin._arguments import numbers, texts, whole_numbers
from scbin._errors import ScbinInputError, count
from scbin.data.splitting import folds_of, share_of
from scbin.encoding.phenotypes import labels_of
from scbin.tl._targets import evident_donors

if TYPE_CHECKING:
    from anndata import AnnData

SIDES = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Sides:
    """Which cells are on which side; cells on neither are not used."""

    training: np.ndarray  # (cells,) bool
    held_out: np.ndarray  # (cells,) bool
    test: np.ndarray  # (cells,) bool
    groups: np.ndarray | None = None  # (cells,)

    def column(self) -> pd.Categorical:
        """Return the sides as a column of `obs`."""
        names = np.full(len(self.training), None, dtype=object)
        for name, side in zip(SIDES, (self.training, self.held_out, self.test), strict=True):
            names[side] = name
        return pd.Categorical(names, categories=SIDES)


def split(
    adata: AnnData,
    *,
    target: str | None = None,
    split_key: str | None = None,
    test_share: float = 0.2,
    validation_share: float = 0.1,
    n_folds: int | None = None,
    fold: int = 0,
    seed: int = 0,
    copy: bool = False,
) -> AnnData | None:
    """Divide the cells into those to train on, to validate on and to test on.

    Cells of one donor are more alike than cells of two, so a model that is tested on donors it has seen looks better than it
    is: pass `split_key` with the column that names the donors (or batches), and each stands on one side alone.
    :func:`scbin.tl.finetune` learns from the training cells, and :func:`scbin.tl.evaluate` scores the test cells.

    Parameters
    ----------
    adata
        The cells.
    target
        Column of `obs` whose classes shall stand on all sides in like shares.
    split_key
        Column of `obs` with donors or batches.
    test_share, validation_share
        Shares of the cells, or of the donors' cells; with folds the test share is one over their number.
    n_folds
        Make so many folds and test on the one called `fold`: as many calls give a cross-validation.
    fold
        Which fold is tested on, from 0.
    seed
        Of the draw. Folds of the same seed belong together.
    copy
        Return a copy instead of writing into `adata`.

    Returns
    -------
    Returns `None` if `copy=False`, else returns an `AnnData` object. Sets the following field:

    `adata.obs['scbin_split']`
        `"train"`, `"validation"` or `"test"`.

    Raises
    ------
    ScbinInputError
        If a class has a single cell, there are fewer donors than sides, or a share is out of range.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()
    >>> scbin.tl.split(adata, target="bulk_labels", test_share=0.25)
    >>> adata.obs["scbin_split"].value_counts()["test"] in range(160, 190)
    True
    """
    check_adata(adata)
    numbers(test_share=test_share, validation_share=validation_share)
    whole_numbers(seed=seed, fold=fold)
    whole_numbers(optional=True, n_folds=n_folds)
    texts(optional=True, target=target, split_key=split_key)
    if not (0 <= validation_share and 0 < test_share and validation_share + test_share < 1):
        raise ScbinInputError(
            "F20",
            f"test_share={test_share} and validation_share={validation_share} leave nothing to train on, or to test on.",
        )
    if n_folds is not None and not (2 <= n_folds <= adata.n_obs and 0 <= fold < n_folds):
        raise ScbinInputError("F20", f"n_folds={n_folds} and fold={fold}: folds are two or more, counted from 0.")
    check_writable(adata, "obs", _keys.SPLIT)
    classes = _codes(adata, target)
    groups = read_groups(adata, split_key)
    if groups is None:
        _check_classes(classes, target, adata)
    elif len(np.unique(groups)) < (n_folds or 2):
        raise ScbinInputError(
            "F21",
            f"{split_key!r} has {count(len(np.unique(groups)), 'value')}; they cannot be divided into {n_folds or 2} sides. "
            "Use fewer folds, or leave split_key out.",
        )
    if n_folds is None:
        test = share_of(classes, test_share, groups=groups, seed=seed)
    else:
        test = folds_of(classes, n_folds, groups=groups, seed=seed) == fold
    rest = np.flatnonzero(~test)
    own = None if groups is None else groups[rest]
    held_out = np.zeros(adata.n_obs, dtype=bool)
    held_out[rest] = share_of(classes[rest], validation_share / (1 - test.mean()), groups=own, seed=seed + 1)
    sides = Sides(~test & ~held_out, held_out, test, groups)
    warn_of_donors(adata, sides, split_key)
    adata = copied(adata) if copy else adata
    write_obs(adata, _keys.SPLIT, sides.column())
    return adata if copy else None


def read_groups(adata: AnnData, split_key: str | None) -> np.ndarray | None:
    """Return the donor or batch of each cell as text; a cell without one is a group of its own."""
    return None if split_key is None else _groups(adata, split_key)


def _groups(adata: AnnData, key: str) -> np.ndarray:
    column = read_obs(adata, key).astype(object)
    return np.array(
        [f"\0{row}" if pd.isna(value) else str(value) for row, value in enumerate(column)], dtype=object
    ).astype(str)


def given_sides(adata: AnnData, split_key: str | None) -> Sides | None:
    """Return the sides that a column of `obs` names: `split_key`, or `scbin_split` where it names test cells."""
    own = split_key is None
    key = _keys.SPLIT if split_key is None else split_key
    if own and key not in adata.obs.columns:
        return None
    column = read_obs(adata, key).astype(object).to_numpy()
    names = np.array(["" if pd.isna(value) else str(value) for value in column])
    if not set(names) - {""} <= set(SIDES) or (own and "test" not in names):
        return None
    return Sides(names == "train", names == "validation", names == "test")


def donors_kept_apart(adata: AnnData, sides: Sides) -> np.ndarray | None:
    """Return the donor of each cell as text, if the sides evidently go by donor: there are two or more, none is on two."""
    used = np.stack([sides.training, sides.held_out, sides.test])
    donor_key = evident_donors(adata, np.flatnonzero(used.any(axis=0)))
    if donor_key is None or used.any(axis=1).sum() < 2:
        return None
    donors = _groups(adata, donor_key)
    on_sides = [set(donors[side]) for side in used]
    return donors if sum(map(len, on_sides)) == len(set.union(*on_sides)) else None


def warn_of_donors(adata: AnnData, sides: Sides, split_key: str | None) -> None:
    """Warn where cells of one donor evidently stand on several sides."""
    donor_key = evident_donors(adata, np.flatnonzero(sides.training | sides.held_out | sides.test))
    if donor_key is None or donor_key == split_key:
        return
    column = adata.obs[donor_key].astype(object)
    held = [{str(value) for value in column[side].dropna()} for side in (sides.training, sides.held_out | sides.test)]
    both = held[0] & held[1] - {"unknown", "nan", ""}
    if both and len(held[0] | held[1]) > 1:
        warn(
            "F22",
            f"{count(len(both), 'value')} of adata.obs[{donor_key!r}] ({', '.join(sorted(both)[:3])} ...) stand both in training "
            "and among the held-out cells. Scores on such cells are too good for new donors: divide by donor with "
            f"split_key={donor_key!r}.",
        )


def _codes(adata: AnnData, target: str | None) -> np.ndarray:
    """Return the class of each cell (cells,), -1 where it has none."""
    if target is None:
        return np.zeros(adata.n_obs, dtype=np.int64)
    return pd.factorize(labels_of(read_obs(adata, target), target), use_na_sentinel=True)[0].astype(np.int64)


def _check_classes(classes: np.ndarray, target: str | None, adata: AnnData) -> None:
    counts = np.bincount(classes[classes >= 0])
    single = np.flatnonzero(counts == 1)
    if target is not None and len(single):
        name = str(adata.obs[target].iloc[int(np.flatnonzero(classes == single[0])[0])])
        raise ScbinInputError(
            "F23",
            f"{name!r} of {target!r} has one cell; a class needs 2 to stand on both sides. Leave such cells out, join classes, "
            "or split without target=.",
        )
