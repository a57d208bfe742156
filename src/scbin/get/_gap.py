"""`get.gap_df`: how far predicted numbers are from the true ones, such as ages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scbin._errors import ScbinInputError
from scbin.get._predicted import read_predicted

if TYPE_CHECKING:
    from anndata import AnnData

    from scbin.get._predicted import Cells


def gap_df(adata: AnnData, target: str, *, truth_key: str | None = None, cells: Cells = "auto") -> pd.DataFrame:
    """Return the gap between a predicted number and the true one, such as the age gap of every cell.

    Average it over the cells of a donor before donors are compared: cells of one donor are not independent. Predictions lean
    towards the mean, so the gap falls with the true number; compare groups of the same age, or correct for it first.

    Parameters
    ----------
    adata
        Cells for which :func:`scbin.tl.predict` predicted a number.
    target
        What was predicted.
    truth_key
        Column of `obs` with the truth. Default: `target`.
    cells
        `"test"`: those that `obs["scbin_split"]` calls test; `"all"`; `"auto"`: the test cells where there are any.

    Returns
    -------
    A table with the names of the cells as index and the columns `truth`, `predicted`, `gap` (predicted - true) and `z`, the gap
    less its mean over the table, in its standard deviations (0 where all gaps are alike). Cells without a truth are left out;
    those without a prediction have NaN.

    Raises
    ------
    ScbinInputError
        If nothing was predicted, or classes were.

    Examples
    --------
    >>> import anndata, numpy, scbin
    >>> adata = anndata.AnnData(numpy.ones((3, 2)))
    >>> adata.obs["age"], adata.obs["scbin_age"] = [30.0, 40.0, 50.0], [33.0, 40.0, 47.0]
    >>> scbin.get.gap_df(adata, "age")["gap"].tolist()
    [3.0, 0.0, -3.0]
    """
    found = read_predicted(adata, target, truth_key=truth_key, cells=cells)
    if found.kind == "class":
        raise ScbinInputError(
            "E41", f"{target!r} was predicted as classes, which have no gap. See scbin.pl.confusion for them."
        )
    gap = found.predicted - found.truth
    known = gap[np.isfinite(gap)]
    spread = known.std() if len(known) else 0.0
    z = (gap - known.mean()) / spread if spread > 0 else np.where(np.isfinite(gap), 0.0, np.nan)
    columns = {"truth": found.truth, "predicted": found.predicted, "gap": gap, "z": z}
    return pd.DataFrame(columns, index=adata.obs_names[found.cells])
