"""The expression that simple methods read: log1p of counts per 10,000, whatever the matrix holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from scbin.encoding.fitting import TARGET, GeneMoments
from scbin.encoding.values import Reading
from scbin.pp._source import Source

if TYPE_CHECKING:
    from anndata import AnnData

    from scbin.encoding.values import Values


def log_normalised(
    adata: AnnData, *, layer: str | None = None, values: Values = "auto", cells: np.ndarray | None = None
) -> sparse.csr_matrix:
    """Return log1p of counts per 10,000 (cells, genes) as float32; log1p values are brought to the natural log.

    What the matrix holds is found out as in :func:`scbin.pp.tokenize`. Columns that are no gene counts are empty.

    Parameters
    ----------
    adata
        Cells by genes.
    layer, values
        As for :func:`scbin.pp.tokenize`.
    cells
        The rows to return. Default: all.
    """
    source = Source(adata, layer)
    reading = source.read(source.scan(), values)
    blocks = []
    for block in source.blocks():
        part = block.csr().astype(np.float64)
        if not source.used.all():
            part = (part @ sparse.diags_array(source.used.astype(np.float64))).tocsr()
        if reading.log_factor:
            part.data *= reading.log_factor
        else:
            totals = np.asarray(part.sum(axis=1)).ravel()
            part.data *= np.repeat(TARGET / np.where(totals > 0, totals, 1.0), np.diff(part.indptr))
            np.log1p(part.data, out=part.data)
        blocks.append(sparse.csr_matrix(part[_inside(cells, block.start, block.n_rows)], dtype=np.float32))
    joined = sparse.vstack(blocks, format="csr") if blocks else sparse.csr_matrix((0, adata.n_vars), dtype=np.float32)
    if cells is None:
        return joined
    rows = np.asarray(cells)
    return joined[np.argsort(np.argsort(rows, kind="stable"), kind="stable")]


def _inside(cells: np.ndarray | None, start: int, n_rows: int) -> np.ndarray:
    """Rows of a block that are asked for, in their order."""
    if cells is None:
        return np.arange(n_rows)
    wanted = np.sort(np.asarray(cells))
    return wanted[(wanted >= start) & (wanted < start + n_rows)] - start


def variable_genes(log1p: sparse.csr_matrix, n_genes: int) -> np.ndarray:
    """Return the columns of the most variable genes, by the rule of :func:`scbin.pp.tokenize`."""
    n_columns = log1p.shape[1]
    moments = GeneMoments(n_columns, Reading("log1p"))
    rows = (log1p.data.astype(np.float32), log1p.indices.astype(np.int32), log1p.indptr.astype(np.int64))
    moments.add(rows, np.arange(n_columns, dtype=np.int32))
    return moments.most_variable(n_genes)
