"""Temperatures for phenotypes that a model tells without a head: fitted on validation cells, never on test cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scbin import _keys
from scbin._anndata import read_obs
from scbin._errors import ScbinInputError
from scbin.get._recorded import Recorded, true_labels
from scbin.nn.prediction import calibrated
from scbin.pp._phenotypes import own_column
from scbin.tl._sides import named_sides

if TYPE_CHECKING:
    from anndata import AnnData

    from scbin.encoding.vocabulary import Phenotype

FEWEST = 10  # cells; fewer say little about how sure one may be


@dataclass(frozen=True, eq=False)
class Judges:
    """The cells that say how sure a model may be, and the column with their truth."""

    validation: np.ndarray  # (cells,) bool
    truth_key: str | None = None  # Default: the column called as the phenotype

    def temperature(self, adata: AnnData, phenotype: Phenotype, logits: np.ndarray) -> float:
        """Return the temperature at which the logits (cells, values) promise what comes true; 1 where too few cells say."""
        classes = self._classes(adata, phenotype)
        rows = np.flatnonzero(self.validation & (classes >= 0) & np.isfinite(logits).all(axis=1))
        return calibrated(logits[rows], classes[rows]) if len(rows) >= FEWEST else 1.0

    def _classes(self, adata: AnnData, phenotype: Phenotype) -> np.ndarray:
        """Return the true value of each cell as its place among those of the phenotype (cells,), -1 where there is none."""
        unknown = np.full(adata.n_obs, -1, dtype=np.int64)
        column = own_column(adata, phenotype.name) if self.truth_key is None else self.truth_key
        if column is None or column not in adata.obs.columns or not self.validation.any():
            return unknown
        how = Recorded("", phenotype.name, "class", phenotype.values, age_groups=phenotype.age_groups)
        try:
            labels = true_labels(read_obs(adata, column), column, how)
        except ScbinInputError:  # a column of that name that holds no labels
            return unknown
        place = {value: k for k, value in enumerate(phenotype.values)}
        return np.array([-1 if label is None else place.get(str(label), -1) for label in labels], dtype=np.int64)


def judges_of(adata: AnnData, split_key: str | None, truth_key: str | None = None) -> Judges:
    """Return the validation cells of a split: `split_key`, or `"scbin_split"` where it is there."""
    key = _keys.SPLIT if split_key is None else split_key
    nobody = np.zeros(adata.n_obs, dtype=bool)
    if split_key is None and key not in adata.obs.columns:
        return Judges(nobody, truth_key)
    sides = named_sides(read_obs(adata, key), key)
    return Judges(nobody if sides is None else sides == "validation", truth_key)
