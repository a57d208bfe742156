"""What is to be learned, read from columns: classes or numbers of cells, classes of genes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from scbin._anndata import read_obs, warn
from scbin._arguments import plain
from scbin._errors import ScbinInputError, ScbinTypeError, count
from scbin.encoding.genes import clean_names, match_genes
from scbin.encoding.phenotypes import MISSING, is_missing, labels_of, values_of
from scbin.nn.heads import Target

if TYPE_CHECKING:
    from anndata import AnnData

    from scbin.encoding.vocabulary import Vocabulary

_log = logging.getLogger(__name__)

DONORS = ("donor_id", "donor", "patient", "patient_id", "individual", "subject", "sample")
_FEW = 3  # cells of a class
Kinds = Literal["class", "number"]


@dataclass(frozen=True, eq=False)
class Labels:
    """One column as it was read."""

    target: Target
    values: (
        np.ndarray
    )  # (cells,) or (genes,) float64: place of the class, or the standardised number; NaN where unknown
    weight: float = 1.0
    n_missing: int = 0


def target_weights(target: object) -> dict[str, float]:
    """Return the names of the targets with their weights, from a name, a list of names or a mapping."""
    if isinstance(target, str):
        weights: dict[Any, Any] = {target: 1.0}
    elif isinstance(target, Mapping):
        weights = dict(target)
    elif isinstance(target, Sequence) and all(isinstance(name, str) for name in target):
        weights = dict.fromkeys(target, 1.0)
    else:
        raise ScbinTypeError("F10", f"target is {target!r}; pass a column, a list of columns, or {{column: weight}}.")
    if not weights:
        raise ScbinInputError("F10", "target names no column; pass one, such as target='cell_type'.")
    for name, weight in weights.items():
        if "/" in str(name):
            raise ScbinInputError(
                "F33",
                f"target {name!r} has a '/', which no slot for its predictions may have in a file. Rename the column: "
                f"adata.obs[{str(name).replace('/', '_')!r}] = adata.obs[{name!r}].",
            )
        weight = plain(weight)
        if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise ScbinInputError("F10", f"the weight of {name!r} is {weight!r}; it needs a number above 0.")
    return {name: float(weight) for name, weight in weights.items()}


def read_cells(
    adata: AnnData,
    name: str,
    kind: Kinds,
    usable: np.ndarray,
    learning: np.ndarray,
    *,
    weight: float = 1.0,
    fewest: int = 1,
) -> Labels:
    """Return a column of `obs` as something to learn.

    Parameters
    ----------
    adata
        The cells.
    name
        The column.
    kind
        Classes or numbers.
    usable
        Whether each cell can be read by the model (cells,).
    learning
        Whether each cell may be learned from (cells,): the classes, and the mean of numbers, are those of these cells.
    weight
        Of the target.
    fewest
        Classes with fewer cells to learn from are left out.
    """
    column = read_obs(adata, name)
    if kind == "number":
        return _numbers(column, name, usable, learning, weight)
    texts = _texts(column, name)
    known = np.array([text is not None for text in texts])
    codes, classes = _classes(
        texts, name, "cell", known & usable & learning, fewest, _unlabelled(column[usable & learning])
    )
    values = np.where(usable & (codes >= 0), codes, np.nan)
    return Labels(Target(name, "class", classes), values, weight, int((~known & usable).sum()))


def read_genes(
    adata: AnnData, name: str, vocabulary: Vocabulary, gene_key: str | None, *, weight: float = 1.0, fewest: int = 1
) -> Labels:
    """Return a column of `var` as classes of the genes of a vocabulary."""
    column = _var_column(adata, name)
    places = gene_places(adata, vocabulary, gene_key)
    texts = np.full(len(vocabulary.genes), None, dtype=object)
    there = places >= 0
    texts[places[there]] = _texts(column, name)[there]
    known = np.array([text is not None for text in texts])
    if not known.any():
        raise ScbinInputError(
            "F11",
            f"none of the genes that the model knows has a label in adata.var[{name!r}]. Tokenize with the genes you mean "
            "(n_genes, mask_var), or pass gene_key= with the column that holds their names.",
        )
    codes, classes = _classes(texts, name, "gene", known, fewest, _unlabelled(column))
    return Labels(Target(name, "gene", classes), np.where(codes >= 0, codes, np.nan), weight, int((~known).sum()))


def gene_places(adata: AnnData, vocabulary: Vocabulary, gene_key: str | None) -> np.ndarray:
    """Return which gene of the vocabulary each column is (n_vars,), negative where none."""
    names: Any = adata.var_names if gene_key is None else _var_column(adata, gene_key).astype(object)
    where = "var_names" if gene_key is None else f"adata.var[{gene_key!r}]"
    cleaned = clean_names(list(names), where=where, is_column=gene_key is not None)
    return match_genes(cleaned, vocabulary.genes, name_map=vocabulary.aliases).columns.astype(np.int64)


def evident_donors(adata: AnnData, cells: np.ndarray) -> str | None:
    """Return the column that evidently names donors, if there is one with several among some cells."""
    for name in DONORS:
        if name in adata.obs.columns and adata.obs[name].iloc[cells].nunique() > 1:
            return name
    return None


def _var_column(adata: AnnData, name: str) -> pd.Series:
    if name not in adata.var.columns:
        there = ", ".join(repr(column) for column in adata.var.columns) or "none"
        raise ScbinInputError("I35", f"{name!r} is not a column of adata.var. Available: {there}.")
    return adata.var[name]


def _texts(column: pd.Series, name: str) -> np.ndarray:
    try:
        return labels_of(column, name)
    except ScbinInputError as error:
        if error.code != "I42":
            raise
        numbers = pd.to_numeric(pd.Series(column.astype(object).unique()), errors="coerce").dropna()
        raise ScbinInputError(
            "F12",
            f"{name!r} looks continuous: {len(numbers):,} different numbers, from {numbers.min():g} to {numbers.max():g}. "
            f"Learn it as a number, kind='number', or cut it into classes first, for example with pandas.cut.",
        ) from error


def _unlabelled(column: pd.Series) -> str:
    """Say which texts of a column count as no label."""
    counts = column.dropna().astype(str).value_counts()
    words = [f"{text!r} ({n:,})" for text, n in counts.items() if is_missing(str(text))]
    return f" No label are: {', '.join(words)}; rename what is meant as a class." if words else ""


def _classes(
    texts: np.ndarray, name: str, unit: Literal["cell", "gene"], learning: np.ndarray, fewest: int, unlabelled: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the place of each label among the classes, -1 where it is none of them, and the classes."""
    names, counts = np.unique(texts[learning].astype(str), return_counts=True)
    sizes = dict(zip(names.tolist(), counts.tolist(), strict=True))
    classes = tuple(text for text in values_of(texts[learning]) if sizes[text] >= fewest)
    if len(classes) < 2:
        found = f"only {classes[0]!r}" if classes else "none"
        missing = f" Of {count(len(sizes), 'class', 'classes')}, {len(sizes) - len(classes)} have fewer than {fewest}."
        raise ScbinInputError(
            "F13",
            f"telling classes apart needs two or more; {name!r} has {found} among the {learning.sum():,} labelled {unit}s to "
            f"learn from.{missing if len(sizes) > len(classes) else ''}{unlabelled} Name another column, or add {unit}s of another class.",
        )
    rare = [f"{text!r} ({sizes[text]})" for text in classes if sizes[text] < _FEW]
    if rare:
        shown = ", ".join(rare[:10]) + (" ..." if len(rare) > 10 else "")
        warn(
            "F14",
            f"{count(len(rare), 'class', 'classes')} of {name!r} with fewer than {_FEW} {unit}s to learn from: {shown}. Nothing "
            f"can be checked for them. Join them with others, or leave them out: fewest={_FEW}.",
        )
    place = {text: k for k, text in enumerate(classes)}
    unseen = sorted({str(text) for text in texts[~learning] if text is not None} - set(place) - set(sizes))
    if unseen:
        shown = ", ".join(map(repr, unseen[:10])) + (" ..." if len(unseen) > 10 else "")
        warn(
            "F15",
            f"{name!r} has labels that no {unit} to learn from carries, so they can never be predicted: {shown}. Split so that "
            "each label is on the training side, or take it for what it is: a class the model cannot know.",
        )
    return np.array([place.get(text, -1) for text in texts]), classes


def _numbers(column: pd.Series, name: str, usable: np.ndarray, learning: np.ndarray, weight: float) -> Labels:
    numbers = pd.to_numeric(column.astype(object), errors="coerce").to_numpy(dtype=np.float64)
    texts = [None if pd.isna(value) else str(value).strip().lower() for value in column.astype(object)]
    wrong = sorted(
        {text for text, x in zip(texts, numbers, strict=True) if text is not None and np.isnan(x)} - MISSING - {"none"}
    )
    if wrong:
        raise ScbinInputError(
            "F18",
            f"{name!r} is to be learned as a number, but {count(len(wrong), 'value is', 'values are')} none: "
            f"{', '.join(map(repr, wrong[:5]))}. Make them numbers (or NaN), or learn classes: kind='class'.",
        )
    numbers = np.where(np.isfinite(numbers), numbers, np.nan)
    known = np.isfinite(numbers) & usable & learning
    if len(np.unique(numbers[known])) < 2:
        raise ScbinInputError(
            "F17",
            f"{name!r} has {count(len(np.unique(numbers[known])), 'value')} among the {known.sum():,} cells to learn from; "
            "a number that does not vary cannot be learned.",
        )
    mean, scale = float(numbers[known].mean()), float(numbers[known].std())
    values = np.where(usable, (numbers - mean) / scale, np.nan)
    return Labels(
        Target(name, "number", mean=mean, scale=scale), values, weight, int((np.isnan(numbers) & usable).sum())
    )
