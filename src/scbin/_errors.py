"""Every error and warning scbin raises, each finding with a stable code."""

from __future__ import annotations

CODES = {
    "A01": "an argument is of the wrong type",
    "A02": "an argument has a value that is not allowed",
    "A03": "arguments contradict each other",
    "A04": "an output would replace something that scbin did not write",
    "A05": "an optional package is not installed",
    "A06": "a name is not there: a column, layer, gene, group or entry",
    "V01": "the cells are not tokenized",
    "V02": "tokens are damaged or do not fit their vocabulary",
    "V03": "tokens were made with another vocabulary than the model's",
    "V04": "a vocabulary cannot be made or read",
    "V05": "a dictionary of a published model cannot be read",
    "M01": "there is no model",
    "M02": "a model directory is damaged",
    "M03": "a model directory is unsafe or larger than allowed",
    "M04": "a network does not fit what it shall read or do",
    "M05": "a model cannot be saved here",
    "M06": "the model was not trained for what is asked of it",
    "F01": "a file is missing, cannot be read, or was changed meanwhile",
    "F02": "a file cannot be written",
    "T01": "training had to stop: loss or gradient were not finite",
    "T02": "memory was short",
    "T03": "a checkpoint is damaged or belongs to another run",
    "T04": "processes that train together do not agree",
    "T05": "training is not done as asked, or not as it should be",
    "L01": "labels cannot be learned or scored as they are",
    "L02": "a class has too few cells",
    "L03": "a split of the cells is not usable",
    "L04": "scores are on cells that the model has learned from",
    "P01": "a perturbation cannot be made with these tokens",
    "P02": "there are too few cells, genes or donors to judge a perturbation",
    "I01": "values taken for log1p, or normalised otherwise than the vocabulary's",
    "I02": "values normalised but not logged, or square roots",
    "I03": "negative fractions, as after scaling",
    "I04": "negative whole numbers",
    "I05": "NaN or infinite values",
    "I07": "counts that are not whole",
    "I08": "values too large to be counts",
    "I13": "a matrix of a kind that cannot be read",
    "I19": "cells without any count",
    "I20": "cells without a gene of the vocabulary",
    "I22": "gene names that occur twice",
    "I23": "gene names made unique by a suffix",
    "I24": "cell names that occur twice",
    "I25": "gene names that are no text",
    "I27": "genes of another species",
    "I28": "gene symbols in another case",
    "I30": "symbols where Ensembl ids are needed, or the reverse",
    "I31": "no gene in common with the vocabulary",
    "I32": "few genes in common with the vocabulary",
    "I33": "features that are not genes",
    "I34": "genes and cells exchanged",
    "I36": "values of a phenotype that the vocabulary does not know",
    "I39": "ages that cannot be read",
    "I40": "categories with very few cells",
    "I41": "labels that are too long",
    "I42": "labels that look continuous",
    "I43": "a damaged sparse matrix",
    "I47": "too few cells",
    "I48": "no genes, or no matrix",
    "I53": "an embedding that cannot be read",
    "I55": "not an AnnData",
}
"""Kinds of faults: the codes that errors and warnings carry, stable between versions."""


class _Coded(Exception):
    """Errors and warnings, each with a code at the beginning of its text."""

    def __init__(self, code: str, message: str):
        super().__init__(f"[{code}] {message}")
        self.code, self.message = code, message


class ScbinError(_Coded):
    """Base class of all errors scbin raises. `code` is one of `CODES` and stable between versions; the text is not."""


class ScbinInputError(ScbinError, ValueError):
    """The data or an argument cannot be used as given. Nothing was computed or written."""


class ScbinTypeError(ScbinInputError, TypeError):
    """An argument is of a type scbin does not take."""


class ScbinModelError(ScbinError, ValueError):
    """A model directory or checkpoint is damaged, unsafe or does not fit."""


class ScbinTrainingError(ScbinError, RuntimeError):
    """Training had to stop. What was learned until the last checkpoint is kept."""


class ScbinInputWarning(_Coded, UserWarning):
    """The data are used, but something about them deserves a look. `code` as in the errors."""


class ScbinTrainingWarning(_Coded, UserWarning):
    """Training goes on, but not exactly as asked. `code` as in the errors."""


def count(n: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun, for messages.

    Examples
    --------
    >>> count(1, "cell"), count(1204, "cell"), count(2, "label is", "labels are")
    ('1 cell', '1,204 cells', '2 labels are')
    """
    return f"{n:,} {one if n == 1 else many or one + 's'}"
