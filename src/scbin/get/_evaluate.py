"""`get.evaluate_df`: how well a model does, beside the simple methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from scbin import _keys
from scbin._anndata import check_adata
from scbin._errors import ScbinInputError

if TYPE_CHECKING:
    from anndata import AnnData

# the order of the columns, whichever target was scored first
FIRST = ("target", "method", "n_cells", "n_genes", "accuracy", "exact", "within_one", "mae", "r2", "pearson")
LAST = ("macro_precision", "macro_recall", "macro_f1", "roc_auc", "calibration_error", "brier", "log_loss", "scored_on")


def evaluate_df(adata: AnnData, target: str | None = None) -> pd.DataFrame:
    """Return what :func:`scbin.tl.evaluate` found: one row per method, one column per score.

    Parameters
    ----------
    adata
        Cells that were evaluated on.
    target
        Which evaluation, where there were several. Default: all of them, with `target` as first column.

    Returns
    -------
    A table with the methods as index, scbin first.

    Examples
    --------
    >>> import anndata, numpy, pandas, scbin
    >>> adata = anndata.AnnData(numpy.ones((2, 2)))
    >>> table = {"target": ["cell_type"] * 2, "method": ["scbin", "majority class"], "accuracy": [0.9, 0.4]}
    >>> adata.uns["scbin"] = {"evaluate": pandas.DataFrame(table)}
    >>> float(scbin.get.evaluate_df(adata, "cell_type").loc["scbin", "accuracy"])
    0.9
    """
    check_adata(adata)
    stored = adata.uns.get(_keys.UNS, {}).get(_keys.EVALUATE)
    if stored is None:
        raise ScbinInputError(
            "E15", "nothing was evaluated here. Call scbin.tl.evaluate(adata, model, target=...) first."
        )
    table = pd.DataFrame(stored).reset_index(drop=True)
    between = [name for name in table.columns if name not in FIRST + LAST]
    table = table[[name for name in (*FIRST, *between, *LAST) if name in table.columns]]
    targets = list(dict.fromkeys(table["target"]))
    if target is None:
        return table.set_index("method").dropna(axis=1, how="all")
    if target not in targets:
        found = ", ".join(map(repr, targets))
        raise ScbinInputError("E15", f"{target!r} was not evaluated here. Evaluated so far: {found}.")
    table = table[table["target"] == target].drop(columns="target")
    return table.set_index("method").dropna(axis=1, how="all")
