"""Predictions that `tl.predict` left in an AnnData, beside the truth."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from scbin import _keys
from scbin._adata import check_adata, read_obs, read_uns
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.tokens.phenotypes import age_labels, labels_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData

Cells = Literal["auto", "all"]
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
    return read_uns(adata, _keys.PREDICT, dict)


def recorded(adata: AnnData, name: str) -> Record:
    """Return what is known of the predictions called `name`: as recorded, else as their column of obs tells."""
    entry = {"column": f"scbin_{name}", "asked": name, **read_record(adata).get(name, {})}
    given = adata.obs.get(entry["column"])
    if given is not None and pd.api.types.is_numeric_dtype(given):
        entry = {"kind": "number", **entry}
    elif given is not None and not entry.get("classes"):
        entry["classes"] = given.astype("category").cat.categories.astype(str)
    return Record(**{**entry, "classes": tuple(entry.get("classes", ()))})


def predicted_targets(adata: AnnData) -> list[str]:
    """Return the names of what was predicted for the cells of an AnnData and is still there."""
    made = {name: recorded(adata, name) for name in read_record(adata)}
    return [name for name, each in made.items() if each.kind != "gene" and each.column in adata.obs]


def read_truth(adata: AnnData, target: str, record: Record, truth_key: str | None) -> Column:
    """Return the truth: the column `truth_key`, or the one named after the target or what was asked for."""
    if truth_key is None:
        truth_key = target if target in adata.obs and target != record.column else record.asked
    return true_values(read_obs(adata, truth_key), target, record.kind, record.classes, record.age_groups)


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


@checked
def read_predicted(adata: AnnData, target: str, *, truth_key: str | None = None, cells: Cells = "auto") -> Predicted:
    """Return the predictions of `target` for the cells whose truth is known: the test cells where there are any, or all."""
    record = recorded(check_adata(adata), target)
    if record.kind == "gene" or record.column not in adata.obs:
        made = ", ".join(map(repr, predicted_targets(adata))) or "none"
        fix = f"Predicted so far: {made}. Call scbin.tl.predict(adata, model, target={record.asked!r})."
        raise ScbinInputError("A06", f"{target!r} was not predicted for these cells. {fix}")
    true, given = read_truth(adata, target, record, truth_key), adata.obs[record.column]
    test = np.zeros(adata.n_obs, dtype=bool)
    if _keys.SPLIT in adata.obs and cells == "auto":
        test = adata.obs[_keys.SPLIT].astype(str).eq("test").to_numpy()
    rows = np.flatnonzero(true.known & test if test.any() else true.known)
    if not len(rows):
        raise ScbinInputError("L01", f"no cell to compare has a known {target!r}: all are missing.")
    if true.kind == "number":
        return Predicted(target, "number", rows, true.values[rows], numbers_of(given)[rows])
    predicted = pd.Index(true.classes, dtype=object).get_indexer(given.iloc[rows].astype(str))
    probability, slot = None, f"{record.column}_probability"
    if slot in adata.obsm:
        stored = np.asarray(adata.obsm[slot], dtype=np.float64)[rows]
        probability = np.pad(stored, ((0, 0), (0, len(true.classes) - stored.shape[1])))
        probability[np.isnan(stored).any(axis=1)] = np.nan
    return Predicted(target, "class", rows, true.codes(rows), predicted, true.classes, probability)
