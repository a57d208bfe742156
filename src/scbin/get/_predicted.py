"""What `tl.predict` left in an AnnData, beside the truth: read once, for tables and pictures alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from scbin import _keys
from scbin._anndata import check_adata
from scbin._errors import ScbinInputError
from scbin.encoding.phenotypes import values_of
from scbin.get._recorded import kind_of, predicted_targets, recorded, true_labels, truth_column

if TYPE_CHECKING:
    from anndata import AnnData

    from scbin.get._recorded import Recorded

Cells = Literal["auto", "test", "all"]


@dataclass(frozen=True, eq=False)
class Predicted:
    """Predictions of one target for the cells that have a truth, in the order of the rows.

    For classes `truth` and `predicted` are places in `classes`, which first lists what the model knows (`n_known`), then labels
    that only the cells have; `predicted` is -1 where the model gave no class. For numbers both are floats.
    """

    target: str
    kind: Literal["class", "number"]
    cells: np.ndarray  # (n,) rows of adata
    truth: np.ndarray  # (n,)
    predicted: np.ndarray  # (n,)
    classes: tuple[str, ...] = ()
    n_known: int = 0
    probability: np.ndarray | None = None  # (n, classes) float64, NaN where the cell could not be read

    @property
    def used(self) -> np.ndarray:
        """Places of the classes that some cell has or is given."""
        return np.union1d(self.truth, self.predicted[self.predicted >= 0]).astype(np.int64)


def read_predicted(adata: AnnData, target: str, *, truth_key: str | None = None, cells: Cells = "auto") -> Predicted:
    """Return the predictions of `target` for the cells whose truth is known.

    Parameters
    ----------
    adata
        Cells with predictions.
    target
        What was predicted; the slots are `obs["scbin_<target>"]` and its companions.
    truth_key
        Column of `obs` with the truth. Default: `target`.
    cells
        `"test"`: those that `obs["scbin_split"]` calls test; `"all"`; `"auto"`: the test cells where there are any.
    """
    check_adata(adata)
    record = recorded(adata, target)
    if record.column not in adata.obs.columns:
        raise ScbinInputError("E11", _not_predicted(adata, target, record))
    true = truth_column(adata, target, record, truth_key)
    given = adata.obs[record.column]
    chosen = _chosen(adata, cells)
    if kind_of(given, record) == "class":
        return _read_classes(adata, target, record, true, chosen)
    numbers = pd.to_numeric(true.astype(object), errors="coerce").to_numpy(dtype=np.float64)
    known = np.flatnonzero(np.isfinite(numbers) & chosen)
    _check_any(known, target)
    predicted = pd.to_numeric(given.astype(object), errors="coerce").to_numpy(dtype=np.float64)
    return Predicted(target, "number", known, numbers[known], predicted[known])


def read_unjudged(adata: AnnData, target: str, *, cells: Cells = "auto") -> Predicted:
    """Return the predictions of all cells that have one, with themselves in place of a truth."""
    return read_predicted(adata, target, truth_key=recorded(adata, target).column, cells=cells)


def _not_predicted(adata: AnnData, target: str, record: Recorded) -> str:
    if record.kind == "gene" and record.column in adata.var.columns:
        return (
            f"{target!r} was predicted for genes: see adata.var[{record.column!r}]. Pictures and tables are of cells."
        )
    made = ", ".join(repr(name) for name in predicted_targets(adata)) or "none"
    return (
        f"adata.obs has no {record.column!r}: {target!r} was not predicted here. Call scbin.tl.predict(adata, model, "
        f"target={record.asked!r}). Predicted so far: {made}."
    )


def _known_classes(given: pd.Series, record: Recorded) -> tuple[str, ...]:
    """Return the classes of the model; a subset of the cells has lost the categories that none of them has."""
    if isinstance(given.dtype, pd.CategoricalDtype):
        here = tuple(str(name) for name in given.cat.categories)
    else:
        here = values_of(given.dropna().astype(str).unique())
    return record.classes if set(here) <= set(record.classes) else here


def test_cells(adata: AnnData) -> np.ndarray | None:
    """Return which cells are for testing (cells,), or None where no split is known or none is."""
    if _keys.SPLIT not in adata.obs.columns:
        return None
    test = (adata.obs[_keys.SPLIT].astype(object) == "test").to_numpy(dtype=bool)
    return test if test.any() else None


def _chosen(adata: AnnData, cells: Cells) -> np.ndarray:
    if cells not in ("auto", "test", "all"):
        raise ScbinInputError("E12", f"cells is {cells!r}; choose 'auto', 'test' or 'all'.")
    test = None if cells == "all" else test_cells(adata)
    if cells == "test" and test is None:
        raise ScbinInputError(
            "E12", "cells='test', but adata.obs['scbin_split'] names no test cells. scbin.tl.finetune writes it."
        )
    return np.ones(adata.n_obs, dtype=bool) if test is None else test


def _read_classes(adata: AnnData, target: str, record: Recorded, true: pd.Series, chosen: np.ndarray) -> Predicted:
    given = adata.obs[record.column]
    labels = true_labels(true, target, record)
    rows = np.flatnonzero(np.array([label is not None for label in labels], dtype=bool) & chosen)
    _check_any(rows, target)
    known = _known_classes(given, record)
    only_true = tuple(sorted({str(label) for label in labels[rows]} - set(known)))
    classes = known + only_true
    place = {name: k for k, name in enumerate(classes)}
    truth = np.array([place[str(label)] for label in labels[rows]], dtype=np.int64)
    probability = None
    slot = f"{record.column}_probability"
    if slot in adata.obsm:
        stored = np.asarray(adata.obsm[slot], dtype=np.float64)
        if stored.shape[1] != len(known):
            raise ScbinInputError(
                "E13",
                f"adata.obsm[{slot!r}] has {stored.shape[1]} columns for {len(known)} classes: one of the two was changed. "
                "Predict again.",
            )
        padding = np.where(np.isfinite(stored[rows]).all(axis=1), 0.0, np.nan)[:, None]
        probability = np.hstack([stored[rows], np.repeat(padding, len(only_true), axis=1)])
    here = given.iloc[rows].astype(object)
    predicted = here.map(lambda name: -1 if pd.isna(name) else place[str(name)]).to_numpy(dtype=np.int64)
    return Predicted(target, "class", rows, truth, predicted, classes, len(known), probability)


def _check_any(rows: np.ndarray, target: str) -> None:
    if not len(rows):
        raise ScbinInputError("E14", f"no cell to compare has a known {target!r}: all are missing there.")
