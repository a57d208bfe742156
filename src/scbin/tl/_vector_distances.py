"""`tl.vector_distances`: how far the vectors of genes, or of the values of phenotypes, lie from each other."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.spatial.distance import pdist, squareform
from sklearn.covariance import LedoitWolf

from scbin import _keys
from scbin._arguments import checked
from scbin._errors import ScbinInputError


@checked
def vector_distances(
    vectors: AnnData | pd.DataFrame,
    *,
    metric: Literal["mahalanobis", "cosine", "variance"] = "mahalanobis",
    key: str | None = None,
) -> pd.DataFrame:
    """Return the distances between the vectors of genes, or of the values of phenotypes, or the variance of each vector.

    For a map or a clustering of genes, and to see which genes lie apart from all others. Neighbours of a gene, strongest first:
    :func:`scbin.tl.gene_network`.

    Parameters
    ----------
    vectors
        Cells after :func:`scbin.tl.embed_genes`, or a table with a row for each vector, such as that of
        :func:`scbin.tl.embed_phenotypes`.
    metric
        `"mahalanobis"`: the length of the difference in units of how all vectors scatter, so that no direction counts for its size alone.
        The covariance is shrunk as Ledoit and Wolf do, for it has no inverse where vectors are longer than they are many. `"cosine"`: 1 -
        cosine. `"variance"`: how widely the numbers of each vector scatter around their mean; small where a model knows little of a gene.
    key
        Of `varm`. Default: `"scbin_genes"`.

    Returns
    -------
    A square table, or one with the column `variance`. Genes without a vector are left out.

    Raises
    ------
    ScbinInputError
        If there are no vectors, or fewer than two.

    Notes
    -----
    Polygene's tables of genes. Its inverse covariance is not shrunk.

    Examples
    --------
    >>> import pandas, scbin
    >>> table = pandas.DataFrame([[0.0, 1.0], [0.0, 2.0], [3.0, 0.0]], index=["A", "B", "C"])
    >>> scbin.tl.vector_distances(table, metric="cosine").loc["A"].tolist()
    [0.0, 0.0, 1.0]
    """
    if isinstance(vectors, AnnData):
        slot = _keys.GENES if key is None else key
        if slot not in vectors.varm:
            raise ScbinInputError("A06", f"adata.varm has no {slot!r}. Run scbin.tl.embed_genes(adata, model) first.")
        vectors = pd.DataFrame(np.asarray(vectors.varm[slot]), index=vectors.var_names)
    table = vectors.astype(np.float64).dropna()
    if len(table) < 2:
        raise ScbinInputError("A02", f"{len(table)} of the {len(vectors)} vectors are known; two are needed.")
    if metric == "variance":
        return table.var(axis=1, ddof=0).to_frame("variance")
    whitening = {"VI": LedoitWolf().fit(table).precision_} if metric == "mahalanobis" else {}
    return pd.DataFrame(squareform(pdist(table, metric, **whitening)), index=table.index, columns=table.index)
