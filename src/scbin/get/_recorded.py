"""What `tl.predict` noted about the slots that it wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from scbin import _keys
from scbin._anndata import read_obs
from scbin._errors import ScbinInputError
from scbin.encoding.phenotypes import age_labels, labels_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData


@dataclass(frozen=True)
class Recorded:
    """One entry of the record: where predictions stand, and what they are."""

    column: str  # of obs, or of var for genes
    asked: str  # what the model was asked for; another name than the entry's where key_added= gave it one
    kind: Literal["class", "number", "gene"] | None = None
    classes: tuple[str, ...] = ()
    model: str | None = None  # fingerprint
    age_groups: int | None = None  # years in a class, where the classes are those that ages are cut into
    learned: Mapping[str, str] = field(default_factory=dict)  # the cells that taught the model, as it remembers them


def recorded(adata: AnnData, name: str) -> Recorded:
    """Return what is known of the predictions called `name`, which need not be there."""
    entry = read_record(adata).get(name, {})
    kind, width = entry.get("kind"), entry.get("age_groups")
    return Recorded(
        column=str(entry.get("column", f"scbin_{name}")),
        asked=str(entry.get("asked", name)),
        kind=kind if kind in ("class", "number", "gene") else None,
        classes=tuple(str(each) for each in entry.get("classes", [])),
        model=None if entry.get("model") is None else str(entry["model"]),
        age_groups=None if width is None else int(width),
        learned=entry.get("learned", {}),
    )


def read_record(adata: AnnData) -> dict[str, dict[str, Any]]:
    """Return the whole record, by name."""
    record = adata.uns.get(_keys.UNS, {}).get(_keys.PREDICT)
    return {} if record is None else dict(json.loads(str(record)))


def predicted_targets(adata: AnnData) -> list[str]:
    """Return the names of what was predicted for the cells of `adata` and is still there."""
    made = {name: recorded(adata, name) for name in read_record(adata)}
    return [name for name, each in made.items() if each.kind != "gene" and each.column in adata.obs.columns]


def kind_of(given: pd.Series, record: Recorded) -> Literal["class", "number"]:
    """Say whether predictions are classes or numbers: as recorded, else by the type of the column."""
    if record.kind in ("class", "number"):
        return record.kind
    if isinstance(given.dtype, pd.CategoricalDtype):
        return "class"
    inferred = pd.api.types.infer_dtype(given, skipna=True)
    return "number" if inferred in ("floating", "integer", "mixed-integer-float") else "class"


def truth_column(adata: AnnData, target: str, record: Recorded, truth_key: str | None) -> pd.Series:
    """Return the column of `obs` with the truth: `truth_key`, else the one called as the target, or as what was asked for."""
    if truth_key is not None:
        return read_obs(adata, truth_key)
    found = truth_name(adata, target, record)
    if found is None:
        raise ScbinInputError(
            "E10",
            f"{record.asked!r} is not a column of adata.obs, so there is no truth to compare with. Pass truth_key= with the "
            "column that holds it.",
        )
    return read_obs(adata, found)


def truth_name(adata: AnnData, target: str, record: Recorded) -> str | None:
    """Return the name of the column with the truth, or None; the predictions themselves are never their own truth."""
    names = [name for name in (target, record.asked) if name in adata.obs.columns and name != record.column]
    return names[0] if names else None


def true_labels(column: pd.Series, name: str, record: Recorded) -> np.ndarray:
    """Return the label of each cell as the model knows it, None where it has none.

    Ages are cut into the classes of the phenotype, as when cells are tokenized; what names such a class already stays.
    """
    labels = labels_of(column, name)
    if record.age_groups is None:
        return labels
    cut, _ = age_labels(labels, record.age_groups)
    return np.where(pd.Series(labels, dtype=object).isin(record.classes), labels, cut)
