"""Networks of genes as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from scbin import _keys
from scbin._adata import check_adata, read_uns
from scbin._arguments import checked
from scbin._errors import ScbinInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData


@checked
def network_df(
    adata: AnnData, genes: str | Sequence[str] | None = None, *, group: str | None = None, key: str | None = None
) -> pd.DataFrame:
    """Return the edges of a network of genes, the strongest first.

    Parameters
    ----------
    adata
        Cells with a network (:func:`scbin.tl.gene_network`).
    genes
        Edges from these genes, such as transcription factors. Default: all edges.
    group
        The network of this group of cells. Default: that of all cells.
    key
        The slot of `varp`. Default: `"scbin_network"`.

    Returns
    -------
    A table with the columns `source`, `target` and `weight`, sorted by the absolute weight.

    Raises
    ------
    ScbinInputError
        If there is no such network, or an unknown gene.

    Examples
    --------
    >>> import anndata, numpy, scbin
    >>> from scipy.sparse import csr_matrix
    >>> adata = anndata.AnnData(numpy.ones((1, 2)))
    >>> adata.var_names = ["TF", "gene"]
    >>> adata.varp["scbin_network"] = csr_matrix([[0, 0.5], [0, 0]])
    >>> scbin.get.network_df(adata).values.tolist()
    [['TF', 'gene', 0.5]]
    """
    check_adata(adata)
    slot = _keys.NETWORK if key is None else key
    if group is not None:
        groups = read_uns(adata, slot, dict).get("groups", [])
        if group not in groups:
            raise ScbinInputError("A06", f"there is no network of the group {group!r}. There are: {groups}.")
        slot = f"{slot}_{groups.index(group)}"
    if slot not in adata.varp:
        raise ScbinInputError(
            "A06", f"adata.varp has no {slot!r}. Call scbin.tl.gene_network(adata, model), name group=."
        )
    edges = sparse.coo_matrix(adata.varp[slot])
    names = adata.var_names.to_numpy().astype(object)
    if genes is not None:
        asked = [genes] if isinstance(genes, str) else list(genes)
        if unknown := [name for name in asked if name not in adata.var_names]:
            raise ScbinInputError("A06", f"{unknown[0]!r} is not in adata.var_names.")
        kept = np.isin(edges.row, adata.var_names.get_indexer(asked))
        edges = sparse.coo_matrix((edges.data[kept], (edges.row[kept], edges.col[kept])), edges.shape)
    order = np.argsort(-np.abs(edges.data), kind="stable")
    parts = {"source": names[edges.row[order]], "target": names[edges.col[order]], "weight": edges.data[order]}
    return pd.DataFrame(parts)
