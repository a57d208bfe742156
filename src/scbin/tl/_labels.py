"""Labels of cells and genes, read from the columns of an AnnData or of any tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData

from scbin._adata import gene_names, obsm_columns, read_obs, warn
from scbin._arguments import shown
from scbin._errors import ScbinInputError, ScbinTypeError
from scbin.get import Column, codes_of, numbers_of
from scbin.tokens.phenotypes import labels_of, values_of

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from scbin.get import Kind
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
        self.lengths, self.obs, self.epoch_order = tokens.lengths, tokens.obs, tokens.epoch_order
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


def cell_columns(
    data: AnnData | Tokens, target: Any, kind: Any, usable: np.ndarray, learning: np.ndarray
) -> tuple[list[Column], list[float]]:
    """Return what is to be learned of the cells that are `usable` (cells,), by the labels of those also `learning`; and weights.

    A matrix in `obsm` becomes its columns, numbers that share its weight.
    """
    names = [target] if isinstance(target, str) else target if isinstance(target, Sequence) else []
    kinds = dict.fromkeys(names, "class") | dict(kind) if isinstance(kind, Mapping) else dict.fromkeys(names, kind)
    if not names or set(kinds) != set(names) or not set(kinds.values()) <= {"class", "number"}:
        need = "a column of obs or several, and as kind 'class', 'number' or {column: kind}"
        raise ScbinInputError("A02", f"target is {shown(target)} and kind {shown(kind)}; pass {need}.")
    columns, weights = [], []
    for name in names:
        parts = [name]
        if kinds[name] == "number" and isinstance(data, AnnData) and name in data.obsm and name not in data.obs:
            parts = list(obsm_columns(data, name))
        columns += [_cell_labels(obs_column(data, part), part, kinds[name], usable, learning) for part in parts]
        weights += [1 / len(parts)] * len(parts)
    return columns, weights


def _cell_labels(column: pd.Series, name: str, kind: Kind, usable: np.ndarray, learning: np.ndarray) -> Column:
    if kind == "class":
        values, classes = _classes(labels_of(column, name), name, usable & learning)
        return Column(name, "class", np.where(usable, values, np.nan), classes)
    numbers = np.where(usable, numbers_of(column), np.nan)
    if len(np.unique(numbers[learning & np.isfinite(numbers)])) < 2:
        raise ScbinInputError("L01", f"{name!r} has no numbers that vary among the cells to learn from.")
    return Column(name, "number", numbers)


def gene_labels(data: AnnData | Tokens, target: Any, vocabulary: Vocabulary) -> Column:
    """Return classes of the genes of a vocabulary, from `{class: genes}` or a column of `var`."""
    texts = np.full(len(vocabulary.genes), None, dtype=object)
    if isinstance(target, Mapping):
        places = {gene: k for k, gene in enumerate(vocabulary.genes)}
        places = gene_names(data, vocabulary).places if isinstance(data, AnnData) else places
        for label, genes in target.items():
            found = [places[gene] for gene in genes if gene in places]
            if isinstance(genes, str) or any(text is not None for text in texts[found]):
                raise ScbinInputError("L01", f"target[{label!r}]: pass a list of genes, none of them in two of them.")
            texts[found] = str(label)
    elif isinstance(data, AnnData) and isinstance(target, str):
        if target not in data.var:
            there = ", ".join(map(repr, data.var)) or "none"
            raise ScbinInputError("A06", f"{target!r} is not a column of adata.var. Available: {there}.")
        columns = gene_names(data, vocabulary).columns
        texts[columns >= 0] = labels_of(data.var[target], target)[columns[columns >= 0]]
    else:
        raise ScbinTypeError("A01", f"target is {shown(target)}; pass {{class: genes}} or a column of adata.var.")
    name = target if isinstance(target, str) else "gene_class"
    return Column(name, "class", *_classes(texts, name, np.ones(len(texts), dtype=bool)))


def _classes(texts: np.ndarray, name: str, learning: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the number of each label's class, NaN where it is none, and the classes."""
    known = texts[learning & (texts != None)]  # noqa: E711 (by element)
    sizes, classes = pd.Series(known).value_counts(), values_of(known)
    if len(classes) < 2:
        found = f"{name!r} has {classes[0] if classes else 'none'!r} where it is to be learned from"
        why = "'NA', 'unknown' and '' do not count as labels"
        raise ScbinInputError("L01", f"two classes or more are needed; {found} ({why}). Name another column.")
    if few := [f"{text!r} ({sizes[text]})" for text in classes if sizes[text] < _FEW]:
        found = f"fewer than {_FEW} have the labels {', '.join(few[:10])} of {name!r}"
        warn("L02", f"{found}. Nothing can be checked for them. Join them with others, or make them NaN.")
    return codes_of(texts, classes), classes


def balanced_weights(codes: np.ndarray, n_classes: int) -> np.ndarray:
    """Return the weight of each class by which all count alike (classes,), with mean 1 over the cells."""
    counts = np.bincount(codes, minlength=n_classes)
    weights = 1 / np.maximum(counts, 1)
    return weights * len(codes) / max(float(weights @ counts), 1e-12)
