"""`tl.age_gap`: how much older the cells of a donor look than the donor is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scbin import _docs, _keys
from scbin._adata import read_obs, write_uns
from scbin._errors import ScbinInputError
from scbin.get import Cells, read_predicted

if TYPE_CHECKING:
    from anndata import AnnData

FEWEST = 4  # donors that a line can be fitted to


@_docs.shared
def age_gap(
    adata: AnnData,
    target: str = "age",
    *,
    truth_key: str | None = None,
    cells: Cells = "auto",
    donor_key: str,
    groupby: str | None = None,
    compare: str | None = None,
    reference: str | None = None,
) -> pd.DataFrame:
    """Compute the age gap: the mean prediction for each donor, compared with the true value.

    Predictions are biased towards the mean, so the young look too old and the old too young. The corrected gap is the residual of
    a regression over the donors, of predicted on true values.

    Parameters
    ----------
    {predictions}
    donor_key
        Column of `obs` with donors. A donor sampled at several ages counts as several.
    groupby
        Column of `obs`, such as the cell type, for a gap of each donor in each group.
    compare
        Column of `obs` by which donors are compared, such as a disease; it becomes a column of the table.
    reference
        The regression is fitted on donors with this value of `compare`, such as the healthy ones. Default: all donors.

    Returns
    -------
    A table with a row for each donor (and group): `n_cells`, `truth`, `predicted` (the mean over the cells), `gap` (predicted - true),
    `expected` (the line at the true age; NaN in groups of fewer than four donors of different ages) and `corrected_gap` (predicted -
    expected). Test on its rows, not on cells. Sets the field:

    `adata.uns["scbin"]["age_gap"]`
        The same table; :func:`scbin.pl.age_gap` and :func:`scbin.pl.clock` draw it.

    Raises
    ------
    ScbinInputError
        If classes were predicted, or no group has four donors of different ages.

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
    if found.kind == "class":
        raise ScbinInputError("A03", f"{target!r} was predicted as classes; learn it with tl.finetune(kind='number').")
    keys = {"donor": donor_key, "group": groupby, "compare": compare}
    obs = pd.DataFrame({name: read_obs(adata, key).astype(object) for name, key in keys.items() if key is not None})
    if reference is not None and reference not in set(obs.get("compare", ())):
        wrong = f"reference={reference!r} is not a value of obs[{compare!r}]"
        raise ScbinInputError("A06", f"{wrong}; name its column in compare=.")
    obs = obs.iloc[found.cells].assign(truth=found.truth, predicted=found.predicted).dropna(subset="predicted")
    by = [name for name in ("donor", "group", "truth", "compare") if name in obs]
    table = obs.groupby(by)["predicted"].agg(n_cells="size", predicted="mean").reset_index()
    table["gap"] = table["predicted"] - table["truth"]
    table["expected"] = np.nan
    for _, rows in table.groupby("group" if groupby else np.zeros(len(table))):
        fitted = rows if reference is None else rows[rows["compare"] == reference]
        if fitted["truth"].nunique() >= FEWEST:
            slope, level = np.polyfit(fitted["truth"], fitted["predicted"], 1)
            table.loc[rows.index, "expected"] = level + slope * rows["truth"]
    if table["expected"].isna().all():
        rule = f"a line needs {FEWEST} donors of different ages in a group"
        raise ScbinInputError("P02", f"{rule}; there are {table['truth'].nunique()} in all.")
    table["corrected_gap"] = table["predicted"] - table["expected"]
    write_uns(adata, _keys.AGE_GAP, table)
    return table.copy()
