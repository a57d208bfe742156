"""`tl.age_gap`: how much older the cells of a donor look than the donor is."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scbin import _docs, _keys
from scbin._adata import read_obs, write_uns
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.get.predictions import Cells, read_predicted

if TYPE_CHECKING:
    from anndata import AnnData

    from scbin.get.predictions import Predicted

FEWEST = 4  # donors that a line can be fitted to


@_docs.shared
@checked
def age_gap(
    adata: AnnData, target: str = "age", *, truth_key: str | None = None, cells: Cells = "auto", donor_key: str,
    groupby: str | None = None, compare: str | None = None, reference: str | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Average a predicted number by donor, and compare it with the true one: the age gap, with donors as replicates.

    Predictions lean towards the mean, so that the young look too old and the old too young. The corrected gap is what is left beside a
    line through the donors, of the predicted number on the true one.

    Parameters
    ----------
    {predictions}
    donor_key
        Column of `obs` with donors, each of one age.
    groupby
        Column of `obs`, such as the cell type: a gap of each donor in each group, and a line for each.
    compare
        Column of `obs` that tells donors apart, such as a disease; it comes into the table.
    reference
        The line goes through the donors of this value of `compare`, such as the healthy ones. Default: all donors.

    Returns
    -------
    A table with a row for each donor (and group): `n_cells`, `truth`, `predicted` (the mean over the cells), `gap` (predicted - true),
    `expected` (the line at the true age) and `corrected_gap` (predicted - expected). Test on its rows, not on cells. Sets the field:

    `adata.uns["scbin"]["age_gap"]`
        The same table; :func:`scbin.pl.age_gap` and :func:`scbin.pl.clock` draw it.

    Classes of ages, as the control token `[age]` has them, count by their middles, weighted by their probabilities.

    Raises
    ------
    ScbinInputError
        If a donor has several ages, or fewer than four donors have different ones.

    Examples
    --------
    >>> import anndata, numpy, scbin
    >>> adata = anndata.AnnData(numpy.ones((4, 2)))
    >>> adata.obs["donor"] = list("abcd")
    >>> adata.obs["age"], adata.obs["scbin_age"] = [20.0, 40.0, 60.0, 80.0], [40.0, 45.0, 55.0, 60.0]
    >>> scbin.tl.age_gap(adata, donor_key="donor")["corrected_gap"].round(6).tolist()
    [0.5, -1.5, 1.5, -0.5]
    """
    found = read_predicted(adata, target, truth_key=truth_key, cells=cells)
    wanted = {"donor": donor_key, "group": groupby, "compare": compare}
    obs = pd.DataFrame({name: read_obs(adata, key).astype(object) for name, key in wanted.items() if key is not None})
    if reference is not None and (compare is None or reference not in set(obs["compare"])):
        raise ScbinInputError("A06", f"reference={reference!r} is no value of obs[{compare!r}]; name it in compare=.")
    obs = obs.iloc[found.cells].copy()
    obs["truth"], obs["predicted"] = _numbers(found)
    by = ["donor", "group"] if groupby else ["donor"]
    cells_of = obs.dropna(subset=["donor", "truth", "predicted", *by]).groupby(by, observed=True, sort=True)
    constant = ["truth", "compare"] if compare else ["truth"]
    several = cells_of[constant].nunique().max(axis=1)
    if (several > 1).any():
        raise ScbinInputError(
            "L01", f"the cells of {several.idxmax()!r} have several values of {constant}; donors need one."
        )
    first = {name: (name, "first") for name in constant}
    table = cells_of.agg(n_cells=("truth", "size"), **first, predicted=("predicted", "mean")).reset_index()
    table["gap"] = table["predicted"] - table["truth"]
    table["expected"] = np.nan
    for _, rows in table.groupby("group" if groupby else np.zeros(len(table))):
        fitted = rows if reference is None else rows[rows["compare"] == reference]
        if fitted["truth"].nunique() < FEWEST:
            found_ages = f"{fitted['truth'].nunique()} different ages"
            raise ScbinInputError("P02", f"a line needs {FEWEST} donors of different ages; there are {found_ages}.")
        slope, level = np.polyfit(fitted["truth"], fitted["predicted"], 1)
        table.loc[rows.index, "expected"] = level + slope * rows["truth"]
    table["corrected_gap"] = table["predicted"] - table["expected"]
    write_uns(adata, _keys.AGE_GAP, table)
    return table.copy()


def _numbers(found: Predicted) -> tuple[np.ndarray, np.ndarray]:
    """Return the true and the predicted number of each cell."""
    if found.kind == "number":
        return found.truth, found.predicted
    middles = np.array([_middle(name) for name in found.classes])
    if found.probability is None or np.isnan(middles).any():
        raise ScbinInputError(
            "A03", f"{found.target!r} was predicted as classes that are no ages: {found.classes[:4]}."
        )
    return middles[found.truth], found.probability @ middles


def _middle(name: str) -> float:
    """Return the middle of a class of ages; that of the last, such as ">=80", is taken to be five years on."""
    ends = [float(text) for text in re.findall(r"\d+", name)]
    if not ends or len(ends) > 2:
        return float("nan")
    return sum(ends) / 2 if len(ends) == 2 else ends[0] / 2 if "<" in name else ends[0] + 5 * (">" in name)
