"""Labels and splits, read from the columns of an AnnData or of any tokens."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
from sklearn.model_selection import KFold, StratifiedGroupKFold, StratifiedKFold, StratifiedShuffleSplit

from scbin import _keys
from scbin._adata import read_obs, warn
from scbin._arguments import choices, plain, shown
from scbin._errors import ScbinInputError, ScbinTypeError, count
from scbin.get.predictions import Column, numbers_of
from scbin.tl._edits import gene_names
from scbin.tokens.phenotypes import is_missing, labels_of, text_of, values_of

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from scbin.get.predictions import Kind
    from scbin.tokens.tokens import Tokens
    from scbin.tokens.vocabulary import Vocabulary

PARTS = ("train", "validation", "test")
DONORS = ("donor_id", "donor", "patient", "patient_id", "individual", "subject", "sample")
_FEW, _MOST_HELD_OUT = 3, 2_000  # cells of a class, cells
# what people call the parts; a test cell must never be trained on
_WORDS = {
    "train": "train training",
    "validation": "validation validate val valid dev development",
    "test": "test testing held-out heldout holdout hold-out",
}
_PART_OF = {word: part for part, words in _WORDS.items() for word in words.split()}
_IN_NAMES = ("train", "valid", "test", "held", "split")  # of a column of True and False, such as "is_train"


# ---- columns --------------------------------------------------------------------------------------------------------


def obs_column(data: ad.AnnData | Tokens, name: str) -> pd.Series:
    """Return what is known of the cells under a name."""
    if isinstance(data, ad.AnnData):
        return read_obs(data, name)
    try:
        return data.obs(name)
    except KeyError as error:
        raise ScbinInputError("A06", f"{name!r} is not a column of these cells.") from error


def has_column(data: ad.AnnData | Tokens, name: str) -> bool:
    """Whether anything is known of the cells under a name."""
    try:
        obs_column(data, name)
    except ScbinInputError:
        return False
    return True


def target_weights(target: object) -> dict[str, float]:
    """Return the names of the targets with their weights, from a name, a list of names or a mapping."""
    several = [target] if isinstance(target, str) else target if isinstance(target, Sequence | Mapping) else []
    names = [name for name in several if isinstance(name, str) and "/" not in name]
    weights = {name: plain(target[name] if isinstance(target, Mapping) else 1.0) for name in names}
    wrong = [w for w in weights.values() if isinstance(w, bool) or not isinstance(w, int | float) or not 0 < w < np.inf]
    if not names or len(names) < len(several) or wrong:
        raise ScbinInputError(
            "A02",
            f"target is {shown(target)}; pass a column of obs, a list of columns, or {{column: weight above 0}}. Names have no "
            "'/', which slots in a file cannot have.",
        )
    return {name: float(weight) for name, weight in weights.items()}


def _labels_of_cells(column: pd.Series, name: str, kind: Kind, usable: np.ndarray, learning: np.ndarray) -> Column:
    """Return a column as something to learn.

    `usable` cells can be read by the model (cells,); the classes are those of the cells that are also `learning` (cells,).
    """
    if kind == "class":
        values, classes = _classes(labels_of(column, name), name, "cell", usable & learning, column)
        return Column(name, "class", np.where(usable, values, np.nan), classes)
    numbers = numbers_of(column)
    wrong = sorted({str(value) for value in column[np.isnan(numbers)] if not is_missing(str(value))} - {"None", "NaT"})
    if wrong:
        raise ScbinInputError(
            "L01",
            f"{name!r} is to be learned as a number, but {count(len(wrong), 'value is', 'values are')} none: "
            f"{', '.join(map(repr, wrong[:5]))}. Make them numbers (or NaN), or learn classes: kind='class'.",
        )
    if len(np.unique(numbers[usable & learning & np.isfinite(numbers)])) < 2:
        raise ScbinInputError("L01", f"{name!r} does not vary among the cells to learn from, so it cannot be learned.")
    return Column(name, "number", np.where(usable, numbers, np.nan))


def _classes(
    texts: np.ndarray, name: str, unit: str, learning: np.ndarray, column: pd.Series | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the number of each label's class, NaN where it is none, and the classes."""
    known = np.array([text is not None for text in texts], dtype=bool) & learning
    sizes = pd.Series(texts[known]).value_counts()
    classes = tuple(values_of(texts[known]))
    if len(classes) < 2:
        found = [] if column is None else [text for text in column.dropna().astype(str).unique() if is_missing(text)]
        missing = f" These count as no label: {', '.join(map(repr, found))}." if found else ""
        raise ScbinInputError(
            "L01",
            f"two classes or more are needed; {name!r} has {classes[0] if classes else 'none'!r} among the {known.sum():,} labelled "
            f"{unit}s to learn from.{missing} Name another column, or add {unit}s of another class.",
        )
    few = [f"{text!r} ({sizes[text]})" for text in classes if sizes[text] < _FEW]
    if few:
        warn(
            "L02",
            f"{count(len(few), 'class', 'classes')} of {name!r} with fewer than {_FEW} {unit}s: {', '.join(few[:10])}. Nothing "
            "can be checked for them. Join them with others, or make their labels NaN.",
        )
    unseen = sorted({str(text) for text in texts[~learning] if text is not None} - set(classes))
    if unseen:
        warn(
            "L01",
            f"{name!r} has labels that no training {unit} carries, so they are never predicted: "
            f"{', '.join(map(repr, unseen[:10]))}.",
        )
    place = {text: float(k) for k, text in enumerate(classes)}
    return np.array([place.get(text, np.nan) for text in texts]), classes


def _gene_classes(data: ad.AnnData | Tokens, target: Any, vocabulary: Vocabulary) -> Column:
    """Return classes of the genes of a vocabulary, from `{class: genes}` or a column of `var`."""
    texts = np.full(len(vocabulary.genes), None, dtype=object)
    columns = gene_names(data, vocabulary).columns if isinstance(data, ad.AnnData) else np.full(len(texts), -1)
    name = target if isinstance(target, str) else "gene_class"
    if isinstance(target, Mapping):
        known = {gene: k for k, gene in enumerate(vocabulary.genes)}
        known |= {alias: known[gene] for alias, gene in vocabulary.aliases.items() if gene in known}
        if isinstance(data, ad.AnnData):
            known |= {str(data.var_names[column]): k for k, column in enumerate(columns) if column >= 0}
        for label, genes in target.items():
            if isinstance(genes, str) or not all(isinstance(gene, str) for gene in genes):
                raise ScbinTypeError("A01", f"target[{label!r}] needs a list of gene names.")
            found = [known[gene] for gene in genes if gene in known]
            twice = [vocabulary.genes[gene] for gene in found if texts[gene] not in (None, str(label))]
            if twice:
                raise ScbinInputError("L01", f"{twice[0]!r} is in two classes; a gene can have one.")
            texts[found] = str(label)
    elif isinstance(target, str) and isinstance(data, ad.AnnData):
        if target not in data.var.columns:
            there = ", ".join(map(repr, data.var.columns)) or "none"
            raise ScbinInputError("A06", f"{target!r} is not a column of adata.var. Available: {there}.")
        texts[columns >= 0] = labels_of(data.var[target], target)[columns[columns >= 0]]
    else:
        raise ScbinTypeError("A01", f"target is {shown(target)}; pass {{class: genes}} or a column of adata.var.")
    return Column(name, "class", *_classes(texts, name, "gene", np.ones(len(texts), dtype=bool)))


# ---- tokens ---------------------------------------------------------------------------------------------------------


class MaskedPhenotypes:
    """Tokens with `[MASK]` in the slots of some phenotypes, by default all: the model is then told nothing about a cell."""

    def __init__(self, tokens: Tokens, phenotypes: Sequence[str] | None = None):
        self.tokens, self.vocabulary, self.n_cells, self.lengths = (
            tokens,
            tokens.vocabulary,
            tokens.n_cells,
            tokens.lengths,
        )
        self.names, self.obs = tokens.names, tokens.obs
        slots = [p for p in self.vocabulary.phenotypes if phenotypes is None or p.name in phenotypes]
        self.positions = [slot.position for slot in slots]

    def take(self, rows: np.ndarray) -> csr_matrix:
        """Return some rows, phenotypes masked."""
        matrix = self.tokens.take(rows)
        if self.positions:
            matrix = matrix.copy()
            matrix.data[np.isin(matrix.indices, self.positions)] = self.vocabulary.mask_id
        return matrix


# ---- splits ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Split:
    """Which cells are for training, validation and testing; cells in none are not used."""

    train: np.ndarray  # (cells,) bool
    validation: np.ndarray  # (cells,) bool
    test: np.ndarray  # (cells,) bool
    donors: np.ndarray | None = None  # (cells,) text, where donors (or batches) are kept apart

    @property
    def open(self) -> np.ndarray:
        """Cells that may be learned from or chosen by (cells,)."""
        return self.train | self.validation

    def column(self, before: Split | None = None) -> pd.Categorical:
        """Return the split as a column of `obs`; cells not used now keep the part that they had before."""
        names = np.full(len(self.train), None, dtype=object)
        for split in (self,) if before is None else (before, self):
            for name in PARTS:
                names[getattr(split, name)] = name
        return pd.Categorical(names, categories=list(PARTS))


def named_parts(column: pd.Series, name: str) -> np.ndarray | None:
    """Return the part that a column names for each cell (cells,), `""` for none; `None` where it is no split."""
    codes, distinct = pd.factorize(column.astype(object).to_numpy(), use_na_sentinel=True)
    words = [str(value).strip().lower().replace("_", "-").replace(" ", "-") for value in distinct]
    parts = [_PART_OF.get(word, "" if is_missing(word) else None) for word in words]
    if None not in parts and any(parts):
        return np.array([*parts, ""], dtype=object)[codes].astype(str)
    marks = pd.api.types.is_bool_dtype(column.dtype) and any(word in name.lower() for word in _IN_NAMES)
    if "train" in parts or marks:
        wrong = [repr(str(value)) for value, part in zip(distinct, parts, strict=True) if part is None]
        raise ScbinInputError(
            "L03",
            f"{name!r} looks like a split, but {', '.join(wrong[:5])} is no part of one. Call the parts 'train', 'validation' "
            "and 'test', and leave cells that are not to be used NaN.",
        )
    return None


def read_donors(data: ad.AnnData | Tokens, key: str) -> np.ndarray:
    """Return the donor or batch of each cell as text; a cell without one is a group by itself."""
    column = obs_column(data, key).astype(object)
    return np.array([f"\0{row}" if pd.isna(value) else str(value) for row, value in enumerate(column)])


def known_split(data: ad.AnnData | Tokens, split_key: str | None) -> Split | None:
    """Return the split that a column names: `split_key`, or `scbin_split` where that names test cells."""
    key = _keys.SPLIT if split_key is None else split_key
    if split_key is None and not has_column(data, key):
        return None
    parts = named_parts(obs_column(data, key), key)
    if parts is None or (split_key is None and "test" not in parts):
        return None
    return Split(parts == "train", parts == "validation", parts == "test")


def split_and_donors(data: ad.AnnData | Tokens, split_key: str | None) -> tuple[Split | None, np.ndarray | None]:
    """Return the split that is known, and the donors that must not be in two parts (cells,).

    `split_key` may name donors: they then divide the cells that `scbin_split` does not keep for testing.
    """
    split = known_split(data, split_key)
    if split is not None:
        return split, _donors_apart(data, split)
    if split_key is None:
        return None, None
    donors = read_donors(data, split_key)
    split = known_split(data, None)
    if split is not None and np.isin(donors[split.validation], donors[split.train]).any():
        split = Split(split.open, np.zeros_like(split.validation), split.test)
    return split, donors


def _donor_keys(data: ad.AnnData | Tokens, used: np.ndarray) -> list[str]:
    """Return columns that name several donors: the one that the split was made by, then those whose name says so."""
    record = {}
    if isinstance(data, ad.AnnData):
        record = json.loads(str(data.uns.get(_keys.UNS, {}).get(_keys.SPLIT_RECORD, "{}")))
    keys = [key for key in (record.get("split_key"), *DONORS) if key is not None and has_column(data, key)]
    return [key for key in dict.fromkeys(keys) if obs_column(data, key)[used].nunique() > 1]


def _donors_apart(data: ad.AnnData | Tokens, split: Split) -> np.ndarray | None:
    """Return the donor of each cell if the split goes by donor: two parts or more, no donor in two of them."""
    parts = [part for part in (split.train, split.validation, split.test) if part.any()]
    for key in _donor_keys(data, split.open | split.test)[:2] if len(parts) > 1 else []:
        donors = read_donors(data, key)
        in_parts = [set(donors[part]) for part in parts]
        if sum(map(len, in_parts)) == len(set.union(*in_parts)):
            return donors
    return None


def warn_of_donors(data: ad.AnnData | Tokens, split: Split, split_key: str | None) -> None:
    """Warn where cells of one donor are in training and among the held-out cells."""
    keys = _donor_keys(data, split.open | split.test)
    if split_key is not None and named_parts(obs_column(data, split_key), split_key) is None:
        keys = [split_key]
    if not keys:
        return
    column = obs_column(data, keys[0]).astype(object)
    names = [{str(value) for value in column[part].dropna()} for part in (split.train, split.validation | split.test)]
    both = sorted(name for name in names[0] & names[1] if not is_missing(name))
    if both and len(names[0] | names[1]) > 1:
        warn(
            "L03",
            f"{count(len(both), 'value')} of {keys[0]!r} ({', '.join(both[:3])} ...) are in training and among the held-out cells. "
            f"Scores on such cells are too good for new donors: divide by donor with split_key={keys[0]!r}, in scbin.tl.split "
            "where there are test cells.",
        )


# ---- drawing --------------------------------------------------------------------------------------------------------


def hold_out(
    classes: np.ndarray, fraction: float, *, donors: np.ndarray | None = None, most: int | None = None, seed: int = 0
) -> np.ndarray:
    """Return which cells are held out (cells,): about a fraction of them, of each class alike; with donors, whole donors.

    A class of a single cell is never held out.
    """
    held_out = np.zeros(len(classes), dtype=bool)
    fraction = fraction if most is None else min(fraction, most / max(len(classes), 1))
    if fraction <= 0 or len(classes) < 2:
        return held_out
    codes = np.unique(classes, return_inverse=True)[1]
    if donors is not None:
        part = Fraction(fraction).limit_denominator(min(len(np.unique(donors)), 20))
        folds = folds_of(codes, max(part.denominator, 2) if part else 20, donors=donors, seed=seed)
        n_held = min(max(part.numerator, 1), folds.max())
        return np.isin(folds, np.random.default_rng(seed).permutation(folds.max() + 1)[:n_held])
    rows = np.flatnonzero(np.bincount(codes)[codes] > 1)
    n_held = min(max(round(fraction * len(classes)), 1), len(rows) - 1)
    if n_held < 1:
        return held_out
    stratified = min(n_held, len(rows) - n_held) >= len(np.unique(codes[rows]))
    draw = StratifiedShuffleSplit(1, test_size=n_held, random_state=seed)
    held_out[rows[next(draw.split(rows[:, None], codes[rows] * stratified))[1]]] = True
    return held_out


def folds_of(classes: np.ndarray, n_folds: int, *, donors: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """Return the fold of each cell (cells,), with the classes in similar fractions and no donor in two folds."""
    n_folds = min(n_folds, len(classes) if donors is None else len(np.unique(donors)))
    if n_folds < 2:
        return np.zeros(len(classes), dtype=np.int64)
    largest = np.unique(classes, return_counts=True)[1].max()
    splitter: Any = KFold if largest < n_folds else StratifiedKFold
    if donors is not None:
        splitter, n_folds = StratifiedGroupKFold, min(n_folds, largest)
    folds = np.zeros(len(classes), dtype=np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes with fewer cells than folds
        draw = splitter(n_folds, shuffle=True, random_state=seed)
        for number, (_, test) in enumerate(draw.split(np.zeros((len(classes), 1)), classes, donors)):
            folds[test] = number
    return np.unique(folds, return_inverse=True)[1]


# ---- what is learned ------------------------------------------------------------------------------------------------


def kinds_of(weights: Mapping[str, float], kind: object, level: str = "cell") -> dict[str, Any]:
    """Return what each target is learned as."""
    if not isinstance(kind, str | Mapping):
        raise ScbinTypeError("A01", f"kind is {shown(kind)}; pass 'class', 'number', or a mapping by column.")
    kinds = dict.fromkeys(weights, kind) if isinstance(kind, str) else {**dict.fromkeys(weights, "class"), **kind}
    for value in kinds.values():
        choices({"kind": ("class", "number")}, kind=value)
    if set(kinds) != set(weights) or (level == "gene" and "number" in kinds.values()):
        targets = "classes of genes" if level == "gene" else ", ".join(weights)
        raise ScbinInputError("A03", f"kind is {shown(kind)}, which does not fit what is learned: {targets}.")
    return kinds


class Labels(NamedTuple):
    """Labels as they were read, and the cells to learn them from."""

    columns: list[Column]
    weights: list[float]  # of the columns
    class_weights: list[np.ndarray | None]  # by column, of each class (classes,)
    without: np.ndarray  # (columns,) cells or genes without a label
    split: Split
    before: Split | None  # the split that was known

    def report(self) -> dict[str, Any]:
        """Return what the model shall remember of them."""
        names, split = [column.name for column in self.columns], self.split
        kinds = {column.name: column.kind for column in self.columns}
        sizes = {"n_cells": int(split.train.sum()), "n_held_out": int(split.validation.sum())}
        return {"targets": kinds, "without_label": dict(zip(names, map(int, self.without), strict=True)), **sizes}


def read_cell_labels(
    data: ad.AnnData | Tokens, tokens: Tokens, weights: Mapping[str, float], kinds: Mapping[str, Any], split_key: str | None,
    class_weights: object, validation: float, seed: int,
) -> Labels:  # fmt: skip
    """Read the labels of cells, and take or draw the cells to learn them from."""
    known, donors = split_and_donors(data, split_key)
    usable = tokens.lengths > 0
    learning = np.ones_like(usable) if known is None else known.open
    columns = [_labels_of_cells(obs_column(data, name), name, kinds[name], usable, learning) for name in weights]
    is_known = np.stack([column.known for column in columns])
    first = columns[0].values if columns[0].kind == "class" else np.zeros(len(usable))
    split, known = _plan_split(
        known, donors, np.asarray(is_known.any(axis=0)), np.nan_to_num(first, nan=-1), validation, seed
    )
    warn_of_donors(data, split, split_key)
    by_class = [_class_weights(column, class_weights, column.known & split.train) for column in columns]
    return Labels(columns, list(weights.values()), by_class, (usable & learning & ~is_known).sum(axis=1), split, known)


def read_gene_labels(
    data: ad.AnnData | Tokens, tokens: Tokens, target: object, split_key: str | None, class_weights: object,
    validation: float, seed: int,
) -> Labels:  # fmt: skip
    """Read the classes of genes, and take or draw the cells to read the genes in."""
    column, usable = _gene_classes(data, target, tokens.vocabulary), tokens.lengths > 0
    split, known = _plan_split(*split_and_donors(data, split_key), usable, np.zeros(len(usable)), validation, seed)
    by_class = [_class_weights(column, class_weights, column.known)]
    return Labels([column], [1.0], by_class, np.array([(~column.known).sum()]), split, known)


def _plan_split(
    known: Split | None,
    donors: np.ndarray | None,
    usable: np.ndarray,
    classes: np.ndarray,
    validation: float,
    seed: int,
) -> tuple[Split, Split | None]:
    """Return the cells for training and validation, drawn now unless the split names them; and the split that was known."""
    test = np.zeros_like(usable) if known is None else known.test
    open_to = usable if known is None else known.open & usable
    held_out = np.zeros_like(usable) if known is None else known.validation & usable
    if validation and not held_out.any():
        rows = np.flatnonzero(open_to)
        own = None if donors is None else donors[rows]
        held_out[rows[hold_out(classes[rows], validation, donors=own, most=_MOST_HELD_OUT, seed=seed)]] = True
        if known is not None and donors is not None:  # unlabelled cells of held-out donors go with them
            with_them = known.open & np.isin(donors, donors[held_out])
            known = Split(known.open & ~with_them, with_them, known.test)
    split = Split(open_to & ~held_out, held_out, test, donors)
    if (n := int(split.train.sum())) < 2:
        raise ScbinInputError(
            "L03", f"{n} cells to train on: they need tokens, a label, and to be in the training part."
        )
    return split, known


def _class_weights(column: Column, class_weights: object, rows: np.ndarray) -> np.ndarray | None:
    """Return the weight of each class in the loss (classes,), with mean 1 over some rows (cells or genes,)."""
    if class_weights is None or column.kind == "number":
        return None
    codes = column.codes(np.flatnonzero(rows))
    if class_weights == "balanced":
        return balanced_weights(codes, len(column.classes))
    if not isinstance(class_weights, Mapping):
        raise ScbinTypeError(
            "A01", f"class_weights is {shown(class_weights)}; pass 'balanced', a mapping by class, or None."
        )
    named = {str(text_of(name)): plain(weight) for name, weight in class_weights.items()}
    if unknown := sorted(set(named) - set(column.classes)):
        there = ", ".join(column.classes)
        raise ScbinInputError(
            "A06", f"class_weights names {unknown[0]!r}, which {column.name!r} has not. It has: {there}."
        )
    numbers = all(isinstance(weight, int | float) and 0 <= weight < float("inf") for weight in named.values())
    weights = (
        np.array([float(named.get(name, 1.0)) for name in column.classes]) if numbers else np.zeros(len(column.classes))
    )
    if not weights[codes].sum() > 0:
        raise ScbinInputError(
            "A02", f"class_weights is {shown(class_weights)}; pass numbers, not below 0 and not all 0."
        )
    return weights * len(codes) / weights[codes].sum()


def balanced_weights(codes: np.ndarray, n_classes: int) -> np.ndarray:
    """Return the weight of each class by which all count alike (classes,), with mean 1 over the cells."""
    counts = np.bincount(codes, minlength=n_classes)
    weights = 1 / np.maximum(counts, 1)
    return weights * len(codes) / max(float(weights @ counts), 1e-12)
