"""`get.history_df`: how training went, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from scbin import _keys
from scbin._errors import ScbinInputError, ScbinTypeError

if TYPE_CHECKING:
    from anndata import AnnData

COLUMNS = ("step", "loss")


def history_df(source: AnnData | pd.DataFrame | Any) -> pd.DataFrame:
    """Return the training history, one row per logged step.

    Parameters
    ----------
    source
        The `Model` that was trained, or the `AnnData` that it was trained on.

    Returns
    -------
    A copy of the history: `step`, `epoch`, `loss`, `validation_loss` (NaN where it was not evaluated), `learning_rate`,
    `tokens_per_second` and more.

    Examples
    --------
    >>> import anndata, numpy, pandas, scbin
    >>> adata = anndata.AnnData(numpy.ones((2, 2)))
    >>> adata.uns["scbin"] = {"pretrain_history": pandas.DataFrame({"step": [1, 2], "loss": [2.1, 1.9]})}
    >>> float(scbin.get.history_df(adata)["loss"].min())
    1.9
    """
    if isinstance(source, pd.DataFrame):
        history = source
    elif isinstance(getattr(source, "history", None), pd.DataFrame):
        history = source.history
    elif hasattr(source, "uns"):
        entry = source.uns.get(_keys.UNS, {})
        if _keys.HISTORY not in entry:
            raise ScbinInputError(
                "P05", "this AnnData holds no training history. Run scbin.tl.pretrain(adata), or pass the model itself."
            )
        history = entry[_keys.HISTORY]
    else:
        raise ScbinTypeError("P06", f"a Model or an AnnData is needed here, not a {type(source).__name__}.")
    missing = [column for column in COLUMNS if column not in history.columns]
    if missing or history.empty:
        found = ", ".join(map(repr, history.columns)) or "none"
        raise ScbinInputError(
            "P07",
            f"the training history needs the columns 'step' and 'loss' and a row; it has {len(history)} rows of {found}.",
        )
    return history.reset_index(drop=True)
