"""`tl.roll_up`: labels as specific as the model is sure of, along an ontology."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scbin._adata import check_adata, check_writable, copied, write
from scbin._arguments import checked, instances
from scbin._errors import ScbinInputError
from scbin.get.predictions import recorded

if TYPE_CHECKING:
    from anndata import AnnData


@checked
def roll_up(
    adata: AnnData, target: str, parents: Mapping[str, str] | pd.DataFrame, *, threshold: float = 0.5,
    key_added: str | None = None, copy: bool = False,
) -> AnnData | None:  # fmt: skip
    """Abstain to the parent: give every cell the most specific term of an ontology that is probable enough.

    The probability of a term is the sum over the predicted classes below it: a cell that may be a CD4 or a CD8 T cell is surely a T cell.

    Parameters
    ----------
    adata
        Cells with predicted classes (:func:`scbin.tl.predict`).
    target
        What was predicted.
    parents
        The parent of each term, `{"CD4 T cell": "T cell", "T cell": "lymphocyte"}`, or a table with the columns `term` and
        `parent`, in which a term may have several. Classes without a parent are roots.
    threshold
        Least probability of a term.
    key_added
        Name of the column. Default: `"scbin_<target>_rolled"`.
    copy
        Return a changed copy instead of changing `adata`.

    Returns
    -------
    Returns `None` if `copy=False`, else returns an `AnnData` object. Sets the following fields:

    `adata.obs["scbin_<target>_rolled"]`
        The term with the fewest classes below it among those that reach the threshold; NaN where none does.
    `adata.obs["scbin_<target>_rolled_probability"]`
        Its probability.

    Raises
    ------
    ScbinInputError
        If classes were not predicted, or a term is its own ancestor.

    Examples
    --------
    >>> import anndata, numpy, pandas, scbin
    >>> adata = anndata.AnnData(numpy.ones((2, 2)))
    >>> adata.obs["scbin_type"] = pandas.Categorical(["CD4", "B"], categories=["B", "CD4", "CD8"])
    >>> adata.obsm["scbin_type_probability"] = numpy.array([[0.1, 0.5, 0.4], [0.9, 0.1, 0.0]])
    >>> scbin.tl.roll_up(adata, "type", {"CD4": "T", "CD8": "T"}, threshold=0.8)
    >>> adata.obs["scbin_type_rolled"].tolist()
    ['T', 'B']
    """
    check_adata(adata)
    instances((Mapping, pd.DataFrame), "a mapping, or a table with the columns term and parent", parents=parents)
    if not 0 <= threshold <= 1:
        raise ScbinInputError("A02", f"threshold is {threshold}; a probability lies between 0 and 1.")
    record = recorded(adata, target)
    slot = f"{record.column}_probability"
    if record.column not in adata.obs or slot not in adata.obsm:
        raise ScbinInputError("A06", f"adata.obsm has no {slot!r}: predict classes first with scbin.tl.predict.")
    classes = record.classes or tuple(adata.obs[record.column].cat.categories.astype(str))
    key = f"{record.column}_rolled" if key_added is None else key_added
    for name in (key, f"{key}_probability"):
        check_writable(adata, "obs", name)
    if isinstance(parents, pd.DataFrame) and not {"term", "parent"} <= set(parents.columns):
        raise ScbinInputError("A06", f"parents has the columns {list(parents.columns)}; it needs 'term' and 'parent'.")
    pairs = parents[["term", "parent"]].values if isinstance(parents, pd.DataFrame) else parents.items()
    terms, below = classes_below(classes, [(str(term), str(parent)) for term, parent in pairs if not pd.isna(parent)])
    chosen, probability = most_specific(np.asarray(adata.obsm[slot], dtype=np.float64), below, threshold)
    target_adata = copied(adata) if copy else adata
    write(target_adata, "obs", key, pd.Categorical.from_codes(chosen, categories=terms).remove_unused_categories())
    write(target_adata, "obs", f"{key}_probability", probability.astype(np.float32))
    return target_adata if copy else None


def classes_below(classes: tuple[str, ...], pairs: list[tuple[str, str]]) -> tuple[list[str], np.ndarray]:
    """Return the terms at or above some classes, and which classes each holds (terms, classes)."""
    above: dict[str, set[str]] = {}
    for term, parent in pairs:
        above.setdefault(term, set()).add(parent)

    def ancestors(term: str, path: tuple[str, ...]) -> set[str]:
        if term in path:
            raise ScbinInputError("L01", f"{term!r} is its own ancestor: {' > '.join((*path, term))}.")
        return {term}.union(*(ancestors(parent, (*path, term)) for parent in above.get(term, ())))

    of = [ancestors(name, ()) for name in classes]
    terms = list(classes) + sorted(set().union(*of) - set(classes))
    return terms, np.array([[term in each for each in of] for term in terms])


def most_specific(probability: np.ndarray, below: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Return for each row of probabilities (cells, classes) the smallest term that is probable enough, -1: none, and its probability."""
    of_terms = np.nan_to_num(probability) @ below.T  # (cells, terms)
    size = np.where(
        of_terms >= threshold - 1e-9, below.sum(axis=1) - of_terms / 2, np.inf
    )  # of equal size the more probable one
    chosen = size.argmin(axis=1)
    known = np.isfinite(size.min(axis=1)) & np.isfinite(probability).all(axis=1)
    return np.where(known, chosen, -1), np.where(known, of_terms[np.arange(len(chosen)), chosen], np.nan)
