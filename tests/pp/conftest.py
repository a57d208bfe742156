"""Every container a matrix can come in."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from pathlib import Path

CONTAINERS = [
    "dense_c", "dense_f", "csr_matrix", "csr_array", "csc_matrix", "csc_array", "int64_indices", "read_only", "memmap",
    "view_rows", "view_columns", "view_both", "dask_dense", "dask_csr", "backed_dense", "backed_csr", "backed_csc",
    "backed_view", "zarr",
]  # fmt: skip


def in_container(adata: ad.AnnData, kind: str, folder: Path) -> ad.AnnData:
    """Return the same cells and genes with `X` (dense in `adata`) in another container."""
    x = np.asarray(adata.X)
    made = ad.AnnData(x.copy(), obs=adata.obs.copy(), var=adata.var.copy())
    if kind.startswith("view"):
        return _view(adata, x, kind)
    if kind.startswith("backed"):
        made.X = {"backed_csc": sparse.csc_matrix, "backed_dense": np.asarray}.get(kind, sparse.csr_matrix)(x)
        made.write_h5ad(folder / f"{kind}.h5ad")
        backed = ad.read_h5ad(folder / f"{kind}.h5ad", backed="r")
        return backed[np.arange(len(x))] if kind == "backed_view" else backed
    if kind == "zarr":
        return _zarr(made, x, folder)
    made.X = _matrix(x, kind, folder)
    return made


def _matrix(x: np.ndarray, kind: str, folder: Path):
    if kind.startswith("dask"):
        import dask.array as da

        array = da.from_array(x, chunks=(7, x.shape[1]))
        return array.map_blocks(sparse.csr_matrix, dtype=x.dtype) if kind == "dask_csr" else array
    if kind == "memmap":
        np.save(folder / "x.npy", x)
        return np.load(folder / "x.npy", mmap_mode="r")
    if kind in ("int64_indices", "read_only"):
        matrix = sparse.csr_matrix(x)
        if kind == "int64_indices":
            matrix.indices, matrix.indptr = matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64)
        for part in (matrix.data, matrix.indices, matrix.indptr):
            part.setflags(write=kind != "read_only")
        return matrix
    makers = {"dense_f": np.asfortranarray, "dense_c": np.ascontiguousarray}
    return makers[kind](x) if kind in makers else getattr(sparse, kind)(x)


def _view(adata: ad.AnnData, x: np.ndarray, kind: str) -> ad.AnnData:
    """A view with the same content, of a parent with other rows and columns between."""
    rows = np.arange(len(x)) * (2 if kind != "view_columns" else 1)
    columns = np.arange(x.shape[1]) * (2 if kind != "view_rows" else 1)
    parent = np.ones((rows[-1] + 1, columns[-1] + 1), dtype=x.dtype) if len(x) else x
    parent[np.ix_(rows, columns)] = x
    big = ad.AnnData(sparse.csr_matrix(parent))
    big.obs_names = [f"other{k}" for k in range(big.n_obs)]
    names = np.array([f"OTHER{k}x" for k in range(big.n_vars)], dtype=object)
    names[columns] = adata.var_names
    big.var_names = names
    for column in adata.obs.columns:
        big.obs[column] = (
            adata.obs[column].iloc[np.minimum(np.searchsorted(rows, range(big.n_obs)), len(x) - 1)].tolist()
        )
    return big[rows, columns]


def _zarr(made: ad.AnnData, x: np.ndarray, folder: Path) -> ad.AnnData:
    import zarr

    made.X = sparse.csr_matrix(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr remarks on its own formats
        made.write_zarr(folder / "a.zarr")
        group = zarr.open(str(folder / "a.zarr"), mode="r")
        lazy = ad.AnnData(obs=made.obs, var=made.var)
        lazy.X = ad.io.sparse_dataset(group["X"])
    return lazy
