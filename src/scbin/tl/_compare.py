"""Simple methods on the cells that a model is scored on: what they learn from, what they answer, how well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from scbin._errors import ScbinInputError
from scbin.encoding.phenotypes import labels_of
from scbin.get._recorded import true_labels
from scbin.tl._baselines import class_probabilities, predicted_numbers
from scbin.tl._expression import log_normalised, variable_genes
from scbin.tl._metrics import classification_scores, regression_scores

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from scipy.sparse import csr_matrix

    from scbin.encoding.values import Values
    from scbin.get._recorded import Recorded
    from scbin.tl._folds import Folds
    from scbin.tl._metrics import F1


@dataclass(frozen=True, eq=False)
class Truth:
    """The cells whose truth is known: rows of the AnnData, and their labels (text) or numbers."""

    kind: Literal["class", "number"]
    rows: np.ndarray
    values: np.ndarray

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Return the truth of some of the rows."""
        return self.values[np.searchsorted(self.rows, rows)]


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a method learns from and what it is asked about: expression of the same genes, log-normalised."""

    train: csr_matrix
    learned: np.ndarray  # truth of the training cells
    test: csr_matrix
    asked: np.ndarray  # truth of the test cells


def read_truth(column: pd.Series, name: str, kind: Literal["class", "number"], record: Recorded | None = None) -> Truth:
    """Return the cells of a column of `obs` that have a value; `record` says how its labels are to be read."""
    if kind == "number":
        numbers = pd.to_numeric(column.astype(object), errors="coerce").to_numpy(dtype=np.float64)
        rows = np.flatnonzero(np.isfinite(numbers))
        truth = Truth("number", rows, numbers[rows])
    else:
        labels = labels_of(column, name) if record is None else true_labels(column, name, record)
        rows = np.flatnonzero(np.array([label is not None for label in labels], dtype=bool))
        truth = Truth("class", rows, labels[rows].astype(str))
    if len(rows) < 2:
        raise ScbinInputError("E14", f"fewer than two cells have a known {name!r}: there is nothing to compare.")
    return truth


def lessons(
    adata: AnnData,
    truth: Truth,
    folds: Folds,
    *,
    reference: tuple[AnnData, Truth] | None = None,
    n_genes: int = 2000,
    layer: str | None = None,
    values: Values = "auto",
) -> list[Lesson]:
    """Return what simple methods learn from in every fold; variable genes are chosen on its training cells.

    With a `reference`, its cells take the place of the training cells, on the genes that both name.
    """
    own = log_normalised(adata, layer=layer, values=values)
    if reference is None:
        pairs = [(own[train], truth.of(train), own[test], truth.of(test)) for train, test in folds.parts]
    else:
        other, known = reference
        shared = adata.var_names.intersection(other.var_names)
        if not len(shared) or not (adata.var_names.is_unique and other.var_names.is_unique):
            raise ScbinInputError(
                "E23",
                f"adata and reference share {len(shared)} of their var_names, which need to be unique gene names of one kind "
                "in both for the simple methods. Rename them, or pass baselines='none'.",
            )
        before = log_normalised(other, layer=layer, values=values)[known.rows]
        before = before[:, other.var_names.get_indexer(shared)]
        after = own[folds.test][:, adata.var_names.get_indexer(shared)]
        pairs = [(before, known.values, after, truth.of(folds.test))]
    made = []
    for train, learned, test, asked in pairs:
        genes = variable_genes(train, n_genes)
        made.append(Lesson(train[:, genes], learned, test[:, genes], asked))
    return made


def baseline_answers(
    taught: Sequence[Lesson], methods: Sequence[str], kind: str, *, seed: int = 0
) -> dict[str, np.ndarray]:
    """Let each method learn and answer in every fold; return numbers (cells,) or probabilities (cells, classes) in its order."""
    classes = _classes(taught) if kind == "class" and taught else np.zeros(0)
    answers = {}
    for method in methods:
        parts = []
        for one in taught:
            if kind == "number":
                parts.append(predicted_numbers(method, one.train, one.learned, one.test, seed=seed))
            else:
                codes = np.searchsorted(classes, one.learned)
                parts.append(class_probabilities(method, one.train, codes, one.test, len(classes), seed=seed))
        answers[method] = np.concatenate(parts)
    return answers


def baseline_scores(
    taught: Sequence[Lesson],
    answers: Mapping[str, np.ndarray],
    kind: str,
    scored: np.ndarray,
    *,
    f1: F1 = "macro",
) -> dict[str, dict[str, float]]:
    """Score the answers of all folds together, on those cells that are `scored` (cells,)."""
    if not taught:
        return {}
    asked = np.concatenate([lesson.asked for lesson in taught])[scored]
    fold = np.repeat(np.arange(len(taught)), [len(lesson.asked) for lesson in taught])[scored]
    if kind == "number":
        return {method: regression_scores(asked, given[scored], fold) for method, given in answers.items()}
    truth = np.searchsorted(_classes(taught), asked)
    return {
        method: classification_scores(truth, given[scored].argmax(axis=1), given[scored], f1=f1, fold=fold)
        for method, given in answers.items()
    }


def _classes(taught: Sequence[Lesson]) -> np.ndarray:
    return np.unique(np.concatenate([each for lesson in taught for each in (lesson.asked, lesson.learned)]))
