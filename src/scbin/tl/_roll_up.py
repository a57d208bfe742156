"""`tl.roll_up`: labels as specific as the model is sure of, along an ontology."""

from __future__ import annotations

from typing import TYPE_CHECKING

import networkx as nx
import numpy as np
import pandas as pd

from scbin import _docs
from scbin._adata import check_adata, copied, write
from scbin._errors import ScbinInputError
from scbin.get import recorded

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData


@_docs.shared
def roll_up(
    adata: AnnData, target: str, parents: Mapping[str, str], *, threshold: float = 0.5, copy: bool = False
) -> AnnData | None:
    """Give every cell the most specific term of an ontology that is probable enough.

    The probability of a term is the sum over the predicted classes below it: a cell that is a CD4 or a CD8 T cell is a T cell.

    Parameters
    ----------
    adata
        Cells with predicted classes (:func:`scbin.tl.predict`).
    target
        What was predicted.
    parents
        The parent of each term, `{"CD4 T cell": "T cell", "T cell": "lymphocyte"}`; of a table, `dict(table[["term", "parent"]].values)`.
        A term without a parent is a root.
    threshold
        Minimum probability of a term.
    {copy}

    Returns
    -------
    {returns_copy}

    `adata.obs["scbin_<target>_rolled"]`
        The term with the fewest classes below it among those that reach the threshold; NaN if none does.
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
    record = recorded(check_adata(adata), target)
    slot = f"{record.column}_probability"
    if slot not in adata.obsm or not record.classes:
        raise ScbinInputError("A06", f"adata.obsm has no {slot!r}: predict classes first with scbin.tl.predict.")
    terms, below = classes_below(record.classes, parents)
    of_terms = np.asarray(adata.obsm[slot], dtype=np.float64) @ below.T  # (cells, terms), NaN where a cell has none
    # of terms with equally many classes the more probable one
    size = np.where(of_terms >= threshold - 1e-9, below.sum(axis=1) - of_terms / 2, np.inf)
    chosen = np.where(np.isfinite(size.min(axis=1)), size.argmin(axis=1), -1)
    probability = np.where(chosen < 0, np.nan, of_terms[np.arange(len(chosen)), chosen])
    changed = copied(adata) if copy else adata
    rolled = pd.Categorical.from_codes(chosen, categories=terms).remove_unused_categories()
    write(changed, "obs", f"{record.column}_rolled", rolled)
    write(changed, "obs", f"{record.column}_rolled_probability", probability.astype(np.float32))
    return changed if copy else None


def classes_below(classes: tuple[str, ...], parents: Mapping[str, str]) -> tuple[list[str], np.ndarray]:
    """Return the terms at or above some classes, and which classes each holds (terms, classes)."""
    tree = nx.DiGraph([(term, parent) for term, parent in parents.items() if isinstance(parent, str)])
    tree.add_nodes_from(classes)
    if not nx.is_directed_acyclic_graph(tree):
        raise ScbinInputError("L01", f"a term is its own ancestor: {nx.find_cycle(tree)}.")
    above = [{name} | nx.descendants(tree, name) for name in classes]
    terms = [*classes, *sorted(set().union(*above) - set(classes))]
    return terms, np.array([[term in each for each in above] for term in terms])
