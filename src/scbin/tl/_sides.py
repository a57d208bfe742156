"""Which cells learn and which are asked, as columns of `obs` say it, and whether donors stand on one side each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scbin import _keys
from scbin._anndata import read_obs, warn
from scbin._errors import ScbinInputError, count
from scbin.encoding.phenotypes import is_missing
from scbin.tl._targets import evident_donors

if TYPE_CHECKING:
    from anndata import AnnData

SIDES = ("train", "validation", "test")
# what people call them; held-out cells may have been meant for validation, but a test cell must never be learned from
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "validate", "val", "valid", "dev", "development"),
    "test": ("test", "testing", "held-out", "heldout", "holdout", "hold-out"),
}
_IN_NAMES = ("train", "valid", "test", "held", "split")  # of a column of True and False, such as "is_train"
_SIDE_OF = {word: side for side, words in _WORDS.items() for word in words}


@dataclass(frozen=True, eq=False)
class Sides:
    """Which cells are on which side; cells on neither are not used."""

    training: np.ndarray  # (cells,) bool
    held_out: np.ndarray  # (cells,) bool
    test: np.ndarray  # (cells,) bool
    groups: np.ndarray | None = None  # (cells,)
    known: Sides | None = None  # where cells stand that are not used now

    def column(self) -> pd.Categorical:
        """Return the sides as a column of `obs`."""
        names = np.full(len(self.training), None, dtype=object)
        for sides in (self.known, self):
            if sides is not None:
                for name, side in zip(SIDES, (sides.training, sides.held_out, sides.test), strict=True):
                    names[side] = name
        return pd.Categorical(names, categories=SIDES)


def named_sides(column: pd.Series, name: str) -> np.ndarray | None:
    """Return the side that a column names for each cell (cells,), `""` for none; `None` where it holds something else.

    Small and capital letters are alike, and so are the usual words, such as "val" and "validation".
    """
    codes, distinct = pd.factorize(column.astype(object).to_numpy(), use_na_sentinel=True)
    words = [str(value).strip().lower().replace("_", "-").replace(" ", "-") for value in distinct]
    sides = [_SIDE_OF.get(word, "" if is_missing(word) else None) for word in words]
    if None not in sides and any(sides):
        return np.array([*sides, ""], dtype=object)[codes].astype(str)
    marks = pd.api.types.is_bool_dtype(column.dtype) and any(word in name.lower() for word in _IN_NAMES)
    if "train" in sides or marks:
        wrong = [repr(str(value)) for value, side in zip(distinct, sides, strict=True) if side is None]
        raise ScbinInputError(
            "F27",
            f"adata.obs[{name!r}] looks like a split, but does not say on which side cells of {', '.join(wrong[:5])} are. "
            "Call the sides 'train', 'validation' and 'test', and leave cells that are not to be used NaN.",
        )
    return None


def read_groups(adata: AnnData, key: str) -> np.ndarray:
    """Return the donor or batch of each cell as text; a cell without one is a group of its own."""
    column = read_obs(adata, key).astype(object)
    names = [f"\0{row}" if pd.isna(value) else str(value) for row, value in enumerate(column)]
    return np.array(names, dtype=object).astype(str)


def given_sides(adata: AnnData, split_key: str | None) -> Sides | None:
    """Return the sides that a column of `obs` names: `split_key`, or `scbin_split` where it names test cells."""
    own = split_key is None
    key = _keys.SPLIT if split_key is None else split_key
    if own and key not in adata.obs.columns:
        return None
    names = named_sides(read_obs(adata, key), key)
    if names is None or (own and "test" not in names):
        return None
    return Sides(names == "train", names == "validation", names == "test")


def known_split(adata: AnnData, split_key: str | None) -> tuple[Sides | None, np.ndarray | None]:
    """Return the sides that are known, and the donors none of whom is to stand on two (cells,).

    A column of donors divides the cells that `scbin_split` does not keep for testing; its validation cells are taken where they
    go by these donors too.
    """
    sides = given_sides(adata, split_key)
    if sides is not None:
        return sides, donors_kept_apart(adata, sides)
    if split_key is None:
        return None, None
    donors = read_groups(adata, split_key)
    sides = given_sides(adata, None)
    if sides is not None and np.isin(donors[sides.held_out], donors[sides.training]).any():
        sides = Sides(sides.training | sides.held_out, np.zeros_like(sides.held_out), sides.test)
    return sides, donors


def donors_kept_apart(adata: AnnData, sides: Sides) -> np.ndarray | None:
    """Return the donor of each cell as text, if the sides go by donor: there are two or more, none is on two.

    Donors are those that :func:`scbin.tl.split` divided by, or those of a column whose name is evident.
    """
    used = np.stack([sides.training, sides.held_out, sides.test])
    if used.any(axis=1).sum() < 2:
        return None
    for key in _donor_keys(adata, sides.training | sides.held_out | sides.test):
        donors = read_groups(adata, key)
        on_sides = [set(donors[side]) for side in used]
        if sum(map(len, on_sides)) == len(set.union(*on_sides)):
            return donors
    return None


def warn_of_donors(adata: AnnData, sides: Sides, split_key: str | None) -> None:
    """Warn where cells of one donor stand on several sides: by `split_key` if it names donors, else evidently."""
    keys = _donor_keys(adata, sides.training | sides.held_out | sides.test)
    if split_key is not None and named_sides(read_obs(adata, split_key), split_key) is None:
        keys = [split_key]
    if not keys:
        return
    column = adata.obs[keys[0]].astype(object)
    held = [{str(value) for value in column[side].dropna()} for side in (sides.training, sides.held_out | sides.test)]
    both = {name for name in held[0] & held[1] if not is_missing(name)}
    if both and len(held[0] | held[1]) > 1:
        warn(
            "F22",
            f"{count(len(both), 'value')} of adata.obs[{keys[0]!r}] ({', '.join(sorted(both)[:3])} ...) stand both in training "
            "and among the held-out cells. Scores on such cells are too good for new donors: divide by donor with "
            f"split_key={keys[0]!r}, in scbin.tl.split where there are test cells.",
        )


def _donor_keys(adata: AnnData, used: np.ndarray) -> list[str]:
    """Return columns that name donors: the one that a split was made by, then one whose name says so."""
    cells = np.flatnonzero(used)
    record = json.loads(str(adata.uns.get(_keys.UNS, {}).get(_keys.SPLIT_RECORD, "{}")))
    recorded, evident = record.get("split_key"), evident_donors(adata, cells)
    if recorded not in adata.obs.columns or adata.obs[recorded].iloc[cells].nunique() < 2:
        recorded = None
    return [key for key in dict.fromkeys((recorded, evident)) if key is not None]


def with_donors(sides: Sides, held_out: np.ndarray, donors: np.ndarray | None) -> Sides:
    """Return the sides of all cells after some were held out anew: the other cells of their donors go with them."""
    to_learn_from = sides.training | sides.held_out
    if donors is not None:
        held_out = to_learn_from & np.isin(donors, donors[held_out])
    return Sides(to_learn_from & ~held_out, held_out, sides.test, donors)
