"""Example data without a download: real cells and a simulated screen."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from scbin.datasets._perturbseq import perturbseq

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["pbmc68k_reduced", "perturbseq"]


def pbmc68k_reduced() -> AnnData:
    """Return 700 human blood cells with 765 genes and 10 cell types.

    They come with scanpy (:cite:t:`zheng2017`, reduced), so nothing is downloaded.

    Returns
    -------
    A new AnnData with log1p values of counts, rounded to three digits, in `X` (CSR), and the cell types in `obs["bulk_labels"]`.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()
    >>> adata.shape
    (700, 765)
    """
    import scanpy as sc  # takes seconds
    from anndata import AnnData
    from scipy.sparse import csr_matrix

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the file is in an old format, which anndata remarks on
        shipped = sc.datasets.pbmc68k_reduced()
    # only the measured cells: neighbours, PCA and colours in the file belong to another analysis
    obs = shipped.obs[["bulk_labels", "louvain", "phase", "n_genes", "n_counts", "percent_mito"]].copy()
    return AnnData(csr_matrix(shipped.raw.X), obs=obs, var=shipped.raw.var[[]].copy(), uns={"log1p": {}})
