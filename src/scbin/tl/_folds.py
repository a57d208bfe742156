"""Which cells the simple methods learn from and which they are asked about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scbin import _keys
from scbin._anndata import read_obs
from scbin._errors import ScbinInputError
from scbin.data.splitting import folds_of
from scbin.tl._sides import named_sides

if TYPE_CHECKING:
    from anndata import AnnData

N_FOLDS = 5


@dataclass(frozen=True, eq=False)
class Folds:
    """Pairs of training and test rows; every test row stands in one pair."""

    parts: tuple[tuple[np.ndarray, np.ndarray], ...]
    text: str
    cut: bool = False  # whether no split was known and the cells were cut into folds here

    @property
    def test(self) -> np.ndarray:
        """All rows that are scored, in order."""
        return np.sort(np.concatenate([test for _, test in self.parts]))


def plan_folds(
    adata: AnnData, usable: np.ndarray, labels: np.ndarray | None, split_key: str | None, *, seed: int = 0
) -> Folds:
    """Take the split that `obs` knows, else divide the cells into folds.

    A column of "train", "validation" and "test" (or the usual words for them) is taken as it is, and training cells are those of the first two: simple
    methods have nothing to choose by validation. Any other column names donors or batches, none of which is on both sides.

    Parameters
    ----------
    adata
        The cells.
    usable
        Rows that have a truth.
    labels
        Class of each usable row, to have all classes in all folds; `None` for numbers.
    split_key
        Column of `obs`. Default: `"scbin_split"` where it is there and names test cells.
    seed
        Of the folds.
    """
    key = _keys.SPLIT if split_key is None else split_key
    if split_key is None and key not in adata.obs.columns:
        return _cut(usable, labels, None, seed)
    sides = named_sides(read_obs(adata, key), key)
    if split_key is None and (sides is None or "test" not in sides):
        return _cut(usable, labels, None, seed)
    if sides is None:
        return _cut(usable, labels, read_obs(adata, key).astype(object).to_numpy()[usable], seed, key)
    side = sides[usable]
    train, test = usable[np.isin(side, ("train", "validation"))], usable[side == "test"]
    for part, what in ((train, "to train on"), (test, "to test on")):
        if not len(part):
            raise ScbinInputError(
                "E20", f"adata.obs[{key!r}] leaves no cell {what}: no cell with a known truth is in that share."
            )
    return Folds(((train, test),), f"{len(test):,} test cells")


def _cut(usable: np.ndarray, labels: np.ndarray | None, groups: np.ndarray | None, seed: int, name: str = "") -> Folds:
    """Cut the cells into folds, with the classes in like shares, and no group on two sides."""
    if groups is not None:
        known = np.array([not pd.isna(value) for value in groups], dtype=bool)
        usable, groups = usable[known], groups[known].astype(str)
        labels = None if labels is None else labels[known]
    n_units = len(usable) if groups is None else len(np.unique(groups))
    if n_units < 2:
        what = "cell" if groups is None else f"value of {name!r}"
        raise ScbinInputError(
            "E20", f"there is one {what} only, so nothing is left to test on. Name another split_key."
        )
    classes = np.zeros(len(usable), dtype=np.int64) if labels is None else np.unique(labels, return_inverse=True)[1]
    fold = folds_of(classes, min(N_FOLDS, n_units), groups=groups, seed=seed)
    numbers = np.unique(fold)
    parts = tuple((usable[fold != number], usable[fold == number]) for number in numbers)
    by = f" by {name}" if name else ""
    return Folds(parts, f"{len(usable):,} cells, {len(numbers)} folds{by}", cut=True)
