"""What `tl.predict` and `tl.evaluate` left in an AnnData, as tables."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from scbin import _docs, _keys
from scbin._adata import check_adata, obsm_column, read_obs, read_uns
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.tokens.phenotypes import age_labels, labels_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData

Cells = Literal["auto", "test", "all"]
Kind = Literal["class", "number"]


@dataclass(frozen=True, eq=False)
class Column:
    """Labels of cells (or genes) as they were read: the number of each one's class, or its number; NaN where unknown."""

    name: str
    kind: Kind
    values: np.ndarray  # (cells,) or (genes,) float64
    classes: tuple[str, ...] = ()

    @property
    def known(self) -> np.ndarray:
        """Whether the label is known (cells,)."""
        return np.isfinite(self.values)

    def codes(self, rows: np.ndarray) -> np.ndarray:
        """Return the class of some cells as whole numbers; 0 for all where the column is one of numbers."""
        return self.values[rows].astype(np.int64) if self.kind == "class" else np.zeros(len(rows), dtype=np.int64)


def numbers_of(column: pd.Series) -> np.ndarray:
    """Return a column as numbers (cells,), NaN where there is none."""
    values = pd.to_numeric(column.astype(object), errors="coerce").to_numpy(dtype=np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def codes_of(texts: Any, classes: Sequence[str]) -> np.ndarray:
    """Return the number of each text's class (n,), NaN where it is none of them."""
    codes = pd.Index(classes, dtype=object).get_indexer(pd.Index(texts, dtype=object))
    return np.where(codes < 0, np.nan, codes)


def true_values(
    column: pd.Series, name: str, kind: str, classes: Sequence[str] = (), age_groups: int | None = None
) -> Column:
    """Return the truth to compare predictions with; labels that the model does not know are classes behind its own.

    With `age_groups`, ages are cut into the classes of the phenotype; what names such a class already stays.
    """
    if kind == "number":
        return Column(name, "number", numbers_of(column))
    labels = labels_of(column, name)
    if age_groups is not None:
        labels = np.where(np.isfinite(codes_of(labels, classes)), labels, age_labels(labels, age_groups)[0])
    names = (*classes, *sorted({str(label) for label in labels if label is not None} - set(classes)))
    return Column(name, "class", codes_of(labels, names), names)


# ---- predictions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """What predictions of one target are, as `uns` remembers it."""

    column: str  # of obs, or of var for genes
    asked: str  # what the model was asked for; the entry has another name where key_added= gave it one
    kind: Literal["class", "number", "gene"] = "class"
    classes: tuple[str, ...] = ()
    model: str | None = None  # fingerprint
    age_groups: int | None = None  # years in a class, where the classes are classes of ages
    cells: Mapping[str, str] = field(default_factory=dict)  # the training cells of the model, as it remembers them


def read_record(adata: AnnData) -> dict[str, dict[str, Any]]:
    """Return the whole record, by name."""
    return {name: entry for name, entry in read_uns(adata, _keys.PREDICT, dict).items() if isinstance(entry, dict)}


def recorded(adata: AnnData, name: str) -> Record:
    """Return what is known of the predictions called `name`, which need not be there."""
    entry = {"column": f"scbin_{name}", "asked": name, **read_record(adata).get(name, {})}
    given = adata.obs.get(entry["column"])
    is_number = given is not None and pd.api.types.is_numeric_dtype(given)
    entry = {"kind": "number" if is_number else "class", **entry, "classes": tuple(entry.get("classes", ()))}
    return Record(**{item.name: entry[item.name] for item in fields(Record) if item.name in entry})


def predicted_targets(adata: AnnData) -> list[str]:
    """Return the names of what was predicted for the cells of an AnnData and is still there."""
    made = {name: recorded(adata, name) for name in read_record(adata)}
    return [name for name, each in made.items() if each.kind != "gene" and each.column in adata.obs.columns]


def read_truth(
    adata: AnnData,
    target: str,
    record: Record,
    truth_key: str | None,
    *,
    classes: Sequence[str] = (),
    needed: bool = True,
) -> tuple[Column, bool]:
    """Return the truth: the column `truth_key`, or the one named after the target or what was asked for; and whether it is one.

    Where there is none and none is `needed`, the predictions themselves.
    """
    names = [name for name in (target, record.asked) if name in adata.obs.columns and name != record.column]
    names += [record.asked] if obsm_column(adata, record.asked) is not None else []
    if truth_key is None and not names and needed:
        found = f"{record.asked!r} is not a column of adata.obs, so there is no truth to compare with"
        raise ScbinInputError("A06", f"{found}. Pass truth_key=.")
    key = [*names, record.column][0] if truth_key is None else truth_key
    return true_values(read_obs(adata, key), target, record.kind, classes, record.age_groups), key != record.column


@dataclass(frozen=True, eq=False)
class Predicted:
    """Predictions of one target for the cells whose truth is known, in the order of the rows.

    For classes `truth` and `predicted` are numbers of `classes`, which first lists what the model knows, then labels that only
    the cells have; `predicted` is -1 where there is none. For numbers both are floats.
    """

    target: str
    kind: Kind
    cells: np.ndarray  # (n,) rows of adata
    truth: np.ndarray  # (n,)
    predicted: np.ndarray  # (n,)
    classes: tuple[str, ...] = ()
    probability: np.ndarray | None = None  # (n, classes) float64, NaN where the cell could not be read
    has_truth: bool = True


@checked
def read_predicted(
    adata: AnnData, target: str, *, truth_key: str | None = None, cells: Cells = "auto", need_truth: bool = True
) -> Predicted:
    """Return the predictions of `target` for the cells whose truth is known.

    `cells` are those that `scbin_split` calls test, all, or with `"auto"` the test cells where there are any. Without
    `need_truth`, where there is none, the predictions stand in its place.
    """
    record = recorded(check_adata(adata), target)
    if record.kind == "gene" or record.column not in adata.obs.columns:
        made = ", ".join(map(repr, predicted_targets(adata))) or "none"
        found = f"{target!r} was not predicted for these cells. Predicted so far: {made}"
        raise ScbinInputError("A06", f"{found}. Call scbin.tl.predict(adata, model, target={record.asked!r}).")
    given = adata.obs[record.column]
    here = () if record.kind == "number" else tuple(given.astype("category").cat.categories.astype(str))
    # a subset of the cells has lost the categories that none of them has
    known = record.classes if set(here) <= set(record.classes) else here
    true, has_truth = read_truth(adata, target, record, truth_key, classes=known, needed=need_truth)
    test = np.zeros(adata.n_obs, dtype=bool)
    if _keys.SPLIT in adata.obs.columns and cells != "all":
        test = (adata.obs[_keys.SPLIT].astype(object) == "test").to_numpy(dtype=bool)
    if cells == "test" and not test.any():
        raise ScbinInputError("L03", "cells='test', but obs['scbin_split'] names no test cells. Call scbin.tl.split.")
    rows = np.flatnonzero(true.known & test if test.any() else true.known)
    if not len(rows):
        raise ScbinInputError("L01", f"no cell to compare has a known {target!r}: all are missing.")
    if true.kind == "number":
        return Predicted(target, "number", rows, true.values[rows], numbers_of(given)[rows], has_truth=has_truth)
    texts = given.iloc[rows].astype(object).map(str, na_action="ignore")
    predicted = np.nan_to_num(codes_of(texts, true.classes), nan=-1).astype(np.int64)
    probability, slot = None, f"{record.column}_probability"
    if slot in adata.obsm:
        stored = np.asarray(adata.obsm[slot], dtype=np.float64)[rows]
        if stored.shape[1] != len(known):
            found = f"{stored.shape[1]} columns for {len(known)} classes"
            raise ScbinInputError("A03", f"adata.obsm[{slot!r}] has {found}. Predict again.")
        probability = np.pad(stored, ((0, 0), (0, len(true.classes) - len(known))))
        probability[np.isnan(stored).any(axis=1)] = np.nan
    return Predicted(target, "class", rows, true.codes(rows), predicted, true.classes, probability, has_truth)


# ---- tables ---------------------------------------------------------------------------------------------------------


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
    table = read_uns(adata, _keys.EVALUATE, pd.DataFrame).reset_index(drop=True)
    if not {"target", "method"} <= set(table.columns):
        raise ScbinInputError("A06", "nothing was evaluated here. Call scbin.tl.evaluate(adata, model, target=...).")
    if target is not None:
        if target not in set(table["target"]):
            made = ", ".join(map(repr, dict.fromkeys(table["target"])))
            raise ScbinInputError("A06", f"{target!r} was not evaluated here. Evaluated so far: {made}.")
        table = table[table["target"] == target].drop(columns="target")
    return table.set_index("method").dropna(axis=1, how="all")


@_docs.shared
def gap_df(adata: AnnData, target: str, *, truth_key: str | None = None, cells: Cells = "auto") -> pd.DataFrame:
    """Return the gap between a predicted number and the true one, such as the age gap of every cell.

    Average it over the cells of a donor before donors are compared: cells of one donor are not independent. Predictions lean
    towards the mean, so the gap falls with the true number; compare groups of the same age, or correct for it first.

    Parameters
    ----------
    {predictions}

    Returns
    -------
    A table with the names of the cells as index and the columns `truth`, `predicted`, `gap` (predicted - true) and `z`, the gap
    less its mean over the table, in its standard deviations (0 where all gaps are equal). Cells without a truth are left out;
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
        raise ScbinInputError("A03", f"{target!r} was predicted as classes, which have no gap. See scbin.pl.confusion.")
    gap = found.predicted - found.truth
    z = (gap - np.nanmean(gap)) / (np.nanstd(gap) or 1.0) if np.isfinite(gap).any() else gap
    columns = {"truth": found.truth, "predicted": found.predicted, "gap": gap, "z": z}
    return pd.DataFrame(columns, index=adata.obs_names[found.cells])
