"""Measured perturbations as tables."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from scbin import _keys
from scbin._adata import check_adata
from scbin._arguments import checked
from scbin._errors import ScbinInputError

if TYPE_CHECKING:
    from anndata import AnnData

SLOTS = {
    "measured": (_keys.MEASURED, "fit_perturbations"),
    "predicted": (_keys.MEASURED_PREDICTED, "predict_perturbations"),
    "evaluated": (_keys.MEASURED_EVALUATED, "evaluate_perturbations"),
}


@dataclass(frozen=True, eq=False)
class Screen:
    """What `tl.fit_perturbations` left."""

    table: pd.DataFrame
    change: np.ndarray  # (perturbations, genes)
    genes: np.ndarray
    control: np.ndarray  # mean of the controls (genes,)
    variance: np.ndarray  # of a cell (genes,)
    features: dict[str, np.ndarray]  # (names, d)
    names: np.ndarray  # of the genes with features
    params: dict[str, Any]

    def rows(self, names: Any) -> dict[str, np.ndarray]:
        """Return the features of targets by block (targets, d), NaN where there are none."""
        at = pd.Index(self.names).get_indexer(list(names))
        return {key: np.where((at >= 0)[:, None], block[at], np.nan) for key, block in self.features.items()}


def read_screen(adata: AnnData) -> Screen:
    """Return what `tl.fit_perturbations` left, or say that it is to be called."""
    entry = read_entry(adata, "measured")
    numbers = {name: np.asarray(entry[name], dtype=float) for name in ("change", "control", "variance")}
    features = {name: np.asarray(block, dtype=float) for name, block in entry["features"].items()}
    genes, names = (np.asarray(entry[name], dtype=object) for name in ("genes", "feature_names"))
    table, params = entry["table"].reset_index(drop=True), json.loads(str(entry["params"]))
    return Screen(table, genes=genes, features=features, names=names, params=params, **numbers)


def read_entry(adata: AnnData, what: str) -> dict[str, Any]:
    """Return what one of the three verbs left in `uns`."""
    key, verb = SLOTS[what]
    entry = check_adata(adata).uns.get(key)
    if not hasattr(entry, "get") or not isinstance(entry.get("table"), pd.DataFrame):
        raise ScbinInputError("A06", f"adata.uns[{key!r}] is not there. Call scbin.tl.{verb}(adata) first.")
    return dict(entry)


@checked
def perturbations_df(
    adata: AnnData, what: Literal["measured", "predicted", "evaluated"] = "measured", *, reproducible: bool = False
) -> pd.DataFrame:
    """Return measured perturbations, predicted changes, or the scores of predictions, as a table.

    Parameters
    ----------
    adata
        The screen after :func:`scbin.tl.fit_perturbations`, `predict_perturbations` or `evaluate_perturbations`.
    what
        `"measured"`: one row per perturbation, the most reproducible first; `"predicted"`: one per perturbation and gene;
        `"evaluated"`: one per perturbation and method.
    reproducible
        Only perturbations whose change reproduces; not for `"predicted"`.

    Returns
    -------
    A copy of the table, see :doc:`/measured_perturbations`; `attrs["verdict"]` of `"evaluated"` is the verdict in one sentence.

    Raises
    ------
    ScbinInputError
        If there is no such table.

    Examples
    --------
    >>> import anndata, numpy, pandas, scbin
    >>> adata = anndata.AnnData(numpy.ones((2, 2)))
    >>> table = pandas.DataFrame({"perturbation": ["A", "B"], "split_half": [0.1, 0.8], "reproducible": [False, True]})
    >>> adata.uns["scbin_perturbations"] = {"table": table}
    >>> scbin.get.perturbations_df(adata)["perturbation"].tolist()
    ['B', 'A']
    """
    entry = read_entry(adata, what)
    table = entry["table"].copy()
    if reproducible and what != "predicted":
        table = table[table["reproducible"].to_numpy(dtype=bool)]
    if what == "measured":
        table = table.sort_values("split_half", ascending=False, kind="stable")
    if what == "evaluated":
        table.attrs = {"verdict": json.loads(str(entry["params"]))["verdict"]}
    return table.reset_index(drop=True)
