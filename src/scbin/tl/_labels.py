"""Labels of cells and genes, read from the columns of an AnnData or of any tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData

from scbin._adata import gene_names, obsm_columns, read_obs, warn
from scbin._arguments import instances, plain, shown
from scbin._errors import ScbinInputError, ScbinTypeError, count
from scbin.get.predictions import Column, codes_of, numbers_of
from scbin.tokens.phenotypes import is_missing, labels_of, text_of, values_of

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from scbin.get.predictions import Kind
    from scbin.tokens.tokens import Tokens
    from scbin.tokens.vocabulary import Vocabulary

_FEW = 3  # cells or genes of a class


def obs_column(data: AnnData | Tokens, name: str) -> pd.Series:
    """Return what is known of the cells under a name."""
    if isinstance(data, AnnData):
        return read_obs(data, name)
    try:
        return data.obs(name)
    except KeyError as error:
        raise ScbinInputError("A06", f"{name!r} is not a column of these cells.") from error


def has_column(data: AnnData | Tokens, name: str) -> bool:
    """Whether anything is known of the cells under a name."""
    try:
        obs_column(data, name)
    except ScbinInputError:
        return False
    return True


class MaskedPhenotypes:
    """Tokens with `[MASK]` in the slots of some phenotypes, by default all: the model is then told nothing about a cell."""

    def __init__(self, tokens: Tokens, phenotypes: Sequence[str] | None = None):
        self.tokens, self.vocabulary, self.n_cells = tokens, tokens.vocabulary, tokens.n_cells
        self.lengths, self.obs = tokens.lengths, tokens.obs
        if hasattr(tokens, "epoch_order"):  # rows on disk
            self.epoch_order = tokens.epoch_order
        slots = [slot for slot in self.vocabulary.phenotypes if phenotypes is None or slot.name in phenotypes]
        self.positions = [slot.position for slot in slots]

    @property
    def names(self) -> pd.Index:
        """Names of the cells."""
        return self.tokens.names

    def take(self, rows: np.ndarray) -> csr_matrix:
        """Return some rows, phenotypes masked."""
        matrix = self.tokens.take(rows)
        if self.positions:
            matrix = matrix.copy()
            matrix.data[np.isin(matrix.indices, self.positions)] = self.vocabulary.mask_id
        return matrix


# ---- what is learned ------------------------------------------------------------------------------------------------


def target_weights(target: object) -> dict[str, float]:
    """Return the names of the targets with their weights, from a name, a list of names or a mapping."""
    names = [target] if isinstance(target, str) else target if isinstance(target, Sequence | Mapping) else []
    weights = {name: plain(target[name]) if isinstance(target, Mapping) else 1.0 for name in names}
    named = all(isinstance(name, str) and "/" not in name for name in weights)
    if not weights or not named or not all(isinstance(w, int | float) and 0 < w < np.inf for w in weights.values()):
        need = "a column of obs, a list of columns, or {column: weight above 0}, with no '/' in a name"
        raise ScbinInputError("A02", f"target is {shown(target)}; pass {need}.")
    return {name: float(weight) for name, weight in weights.items()}


def kinds_of(names: Mapping[str, float], kind: object) -> dict[str, Any]:
    """Return what each target is learned as."""
    default = "class" if isinstance(kind, Mapping) else kind
    kinds = dict.fromkeys(names, default) | (dict(kind) if isinstance(kind, Mapping) else {})
    if set(kinds) != set(names) or not all(value in ("class", "number") for value in kinds.values()):
        need = f"'class', 'number', or a mapping of these by target: {', '.join(names)}"
        raise ScbinInputError("A02", f"kind is {shown(kind)}; pass {need}.")
    return kinds


def with_columns(
    data: AnnData | Tokens, weights: Mapping[str, float], kinds: Mapping[str, Any]
) -> dict[str, tuple[float, Any]]:
    """Return weight and kind of each target; a matrix in `obsm` becomes its columns, numbers that share its weight."""
    found: dict[str, tuple[float, Any]] = {}
    for name, weight in weights.items():
        if not isinstance(data, AnnData) or name in data.obs.columns or name not in data.obsm:
            found[name] = (weight, kinds[name])
            continue
        columns = list(obsm_columns(data, name))
        if kinds[name] != "number" or any("/" in column for column in columns):
            need = "kind='number', and no '/' in the names of its columns"
            raise ScbinInputError(
                "A02", f"{name!r} is a matrix in adata.obsm, which is learned as numbers: pass {need}."
            )
        found |= {column: (weight / len(columns), "number") for column in columns}
    return found


def cell_labels(column: pd.Series, name: str, kind: Kind, usable: np.ndarray, learning: np.ndarray) -> Column:
    """Return a column as something to learn: of cells that are `usable` (cells,), with the classes of those also `learning`."""
    if kind == "class":
        values, classes = _classes(labels_of(column, name), name, "cell", usable & learning)
        return Column(name, "class", np.where(usable, values, np.nan), classes)
    numbers = numbers_of(column)
    texts = {str(value) for value in column[np.isnan(numbers)] if not pd.isna(value)}
    wrong = sorted(text for text in texts if not is_missing(text))
    if wrong or len(np.unique(numbers[usable & learning & np.isfinite(numbers)])) < 2:
        found = f"it has {wrong[0]!r}" if wrong else "it does not vary among the cells to learn from"
        raise ScbinInputError("L01", f"{name!r} cannot be learned as a number: {found}. Try kind='class', or clean it.")
    return Column(name, "number", np.where(usable, numbers, np.nan))


def _classes(texts: np.ndarray, name: str, unit: str, learning: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the number of each label's class, NaN where it is none, and the classes."""
    known = np.array([text is not None for text in texts], dtype=bool) & learning
    sizes, classes = pd.Series(texts[known]).value_counts(), values_of(texts[known])
    if len(classes) < 2:
        found = f"{name!r} has {classes[0] if classes else 'none'!r} among the {known.sum():,} {unit}s to learn from"
        why = "'NA', 'unknown' and '' are no labels"
        raise ScbinInputError("L01", f"two classes or more are needed; {found} ({why}). Name another column.")
    few = [f"{text!r} ({sizes[text]})" for text in classes if sizes[text] < _FEW]
    if few:
        found = (
            f"{count(len(few), 'class', 'classes')} of {name!r} with fewer than {_FEW} {unit}s: {', '.join(few[:10])}"
        )
        warn("L02", f"{found}. Nothing can be checked for them. Join them with others, or make their labels NaN.")
    unseen = sorted({str(text) for text in texts[~learning] if text is not None} - set(classes))
    if unseen:
        found = f"{name!r} has labels that no training {unit} carries: {', '.join(map(repr, unseen[:10]))}"
        warn("L01", f"{found}. They are never predicted.")
    return codes_of(texts, classes), classes


def gene_labels(data: AnnData | Tokens, target: Any, vocabulary: Vocabulary) -> Column:
    """Return classes of the genes of a vocabulary, from `{class: genes}` or a column of `var`."""
    texts = np.full(len(vocabulary.genes), None, dtype=object)
    names = gene_names(data, vocabulary) if isinstance(data, AnnData) else None
    if isinstance(target, Mapping):
        known = {gene: k for k, gene in enumerate(vocabulary.genes)} if names is None else names.places
        for label, genes in target.items():
            found = [known[gene] for gene in genes if gene in known]
            if isinstance(genes, str) or any(texts[gene] is not None for gene in found):
                need = "a list of genes for each class, and no gene in two of them"
                raise ScbinInputError("L01", f"target[{label!r}] does not fit; pass {need}.")
            texts[found] = str(label)
    elif names is not None and isinstance(data, AnnData) and isinstance(target, str):
        if target not in data.var.columns:
            there = ", ".join(map(repr, data.var.columns)) or "none"
            raise ScbinInputError("A06", f"{target!r} is not a column of adata.var. Available: {there}.")
        texts[names.columns >= 0] = labels_of(data.var[target], target)[names.columns[names.columns >= 0]]
    else:
        raise ScbinTypeError("A01", f"target is {shown(target)}; pass {{class: genes}} or a column of adata.var.")
    name = target if isinstance(target, str) else "gene_class"
    return Column(name, "class", *_classes(texts, name, "gene", np.ones(len(texts), dtype=bool)))


def class_weights_of(column: Column, class_weights: Any, rows: np.ndarray) -> np.ndarray:
    """Return the weight of each class in the loss (classes,), with mean 1 over some rows (cells or genes,)."""
    codes, n_classes = column.codes(np.flatnonzero(rows)), max(len(column.classes), 1)
    if class_weights is None or column.kind == "number":
        return np.ones(n_classes)
    if class_weights == "balanced":
        return balanced_weights(codes, n_classes)
    instances(Mapping, "'balanced', a mapping by class, or None", class_weights=class_weights)
    named = {str(text_of(name)): float(weight) for name, weight in class_weights.items()}
    if unknown := sorted(set(named) - set(column.classes)):
        there = ", ".join(column.classes)
        raise ScbinInputError(
            "A06", f"class_weights names {unknown[0]!r}; the classes of {column.name!r} are: {there}."
        )
    weights = np.array([named.get(name, 1.0) for name in column.classes])
    if not weights[codes].sum() > 0 or weights.min() < 0:
        raise ScbinInputError("A02", f"class_weights is {shown(class_weights)}; no weight may be below 0, nor all 0.")
    return weights * len(codes) / weights[codes].sum()


def balanced_weights(codes: np.ndarray, n_classes: int) -> np.ndarray:
    """Return the weight of each class by which all count alike (classes,), with mean 1 over the cells."""
    counts = np.bincount(codes, minlength=n_classes)
    weights = 1 / np.maximum(counts, 1)
    return weights * len(codes) / max(float(weights @ counts), 1e-12)
