"""The UMAP behind `pl.embedding`: computed once, kept in a slot, computed again only when it no longer fits."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from scbin import _keys
from scbin._anndata import warn, write_obsm, write_uns
from scbin._errors import ScbinInputError

if TYPE_CHECKING:
    from anndata import AnnData

FEWEST_FOR_UMAP = 10
ROWS_AT_ONCE = 65_536


def umap_of(adata: AnnData, basis: str, *, n_neighbors: int = 15, seed: int = 0) -> np.ndarray:
    """Return the UMAP coordinates of `obsm[basis]` (cells, 2), from the slot if they still belong to the embedding.

    The fingerprints are kept per cell, not for the matrix, so that a subset of the cells keeps the coordinates it had.
    """
    slot = _keys.UMAP if basis == _keys.EMBEDDING else f"X_umap_{basis.removeprefix('X_')}"
    embedding = read_embedding(adata, basis)
    record = adata.uns.get(_keys.UNS, {}).get(_keys.UMAP_RECORD, {})
    if slot in adata.obsm:
        kept = np.asarray(adata.obsm[slot])
        if slot in record and _belongs(kept, embedding, np.asarray(record[slot])):
            return kept
        if slot not in record and slot != _keys.UMAP:
            warn(
                "I54",
                f"adata.obsm[{slot!r}] exists and nothing says that scbin wrote it (anndata.concat drops such notes), so it is not "
                f"replaced: the UMAP of {basis!r} is computed for this plot alone. Plot what is there with basis={slot!r}, or delete "
                "it to have the new one kept.",
            )
            return compute_umap(embedding, n_neighbors=n_neighbors, seed=seed)
    coordinates = compute_umap(embedding, n_neighbors=n_neighbors, seed=seed)
    write_obsm(adata, slot, coordinates)
    write_uns(adata, _keys.UMAP_RECORD, {**record, slot: _fingerprints(coordinates, embedding)})
    return coordinates


def read_embedding(adata: AnnData, basis: str) -> np.ndarray:
    """Return `obsm[basis]` as a dense float32 matrix (cells, dimensions)."""
    if basis not in adata.obsm:
        there = ", ".join(repr(key) for key in adata.obsm) or "none"
        advice = "scbin.tl.pretrain(adata) or scbin.tl.embed(adata, model) writes it."
        advice = advice if basis == _keys.EMBEDDING else "Pass one of them as basis=."
        raise ScbinInputError("P01", f"{basis!r} is not in adata.obsm. Available: {there}. {advice}")
    embedding = adata.obsm[basis]
    embedding = np.asarray(embedding.toarray() if hasattr(embedding, "toarray") else embedding, dtype=np.float32)
    if embedding.ndim != 2 or embedding.shape[1] < 2:
        raise ScbinInputError(
            "I53", f"adata.obsm[{basis!r}] has shape {embedding.shape}; a plot needs two columns or more."
        )
    if not np.isfinite(embedding).all(axis=1).any():
        raise ScbinInputError("P02", f"no cell has a finite row in adata.obsm[{basis!r}]: there is nothing to plot.")
    return embedding


def compute_umap(embedding: np.ndarray, *, n_neighbors: int = 15, seed: int = 0) -> np.ndarray:
    """Lay out the finite rows of an embedding in two dimensions (cells, 2); the other rows are NaN."""
    finite = np.isfinite(embedding).all(axis=1)
    coordinates = np.full((len(embedding), 2), np.nan, dtype=np.float32)
    if finite.sum() < FEWEST_FOR_UMAP:
        coordinates[finite] = _first_two_components(embedding[finite])
        return coordinates
    import scanpy as sc
    from anndata import AnnData

    # an object of our own: neighbours and UMAP of the user's stay as they are
    cells = AnnData(embedding[finite])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks of scanpy on its own insides, for instance when cells are equal
        sc.pp.neighbors(cells, n_neighbors=min(n_neighbors, cells.n_obs - 1), use_rep="X", random_state=seed)
        sc.tl.umap(cells, random_state=seed)
    coordinates[finite] = cells.obsm["X_umap"]
    return coordinates


def _first_two_components(embedding: np.ndarray) -> np.ndarray:
    """Coordinates of a handful of cells, for which a neighbour graph says nothing."""
    centred = embedding - embedding.mean(axis=0)
    left, scale, _ = np.linalg.svd(np.pad(centred, ((0, 1), (0, 0))), full_matrices=False)
    return (left * scale)[:-1, :2]


def _belongs(coordinates: np.ndarray, embedding: np.ndarray, record: np.ndarray) -> bool:
    """Whether every row of coordinates was computed for the row of the embedding that it stands beside."""
    if coordinates.shape != (len(embedding), 2):
        return False
    finite = np.isfinite(embedding).all(axis=1)
    if not np.array_equal(finite, np.isfinite(coordinates).all(axis=1)):
        return False
    return bool(np.isin(_fingerprints(coordinates, embedding), record).all())


def _fingerprints(coordinates: np.ndarray, embedding: np.ndarray) -> np.ndarray:
    """32-bit fingerprint of coordinates and embedding of each embedded cell (cells with finite rows,)."""
    n_columns = coordinates.shape[1] + embedding.shape[1]
    factors = np.random.default_rng(0).integers(2**63, size=n_columns, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    blocks = []
    for start in range(0, len(embedding), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        rows = np.column_stack([coordinates[part], embedding[part]]).astype(np.float32)
        bits = np.ascontiguousarray(rows[np.isfinite(rows).all(axis=1)]).view(np.uint32).astype(np.uint64)
        blocks.append((bits @ factors >> np.uint64(32)).astype(np.uint32))
    return np.concatenate(blocks)
