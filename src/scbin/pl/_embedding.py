"""`pl.embedding`: the cells as the model sees them, in two dimensions."""

from __future__ import annotations

import difflib
import sys
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scbin import _docs, _keys
from scbin._adata import check_adata, make_real, read_uns, write, write_uns
from scbin._arguments import texts
from scbin._errors import ScbinInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes

FEWEST_FOR_UMAP = 10


@_docs.shared
def embedding(
    adata: AnnData,
    *,
    color: str | Sequence[str] | None = None,
    basis: str = _keys.EMBEDDING,
    ax: Axes | None = None,
    **kwargs: Any,
) -> Axes | list[Axes]:
    """Draw the cells of an embedding as a UMAP.

    It is :func:`scanpy.pl.embedding` that draws, so colours, legends and all its arguments are as you know them. The UMAP is
    computed once (its own neighbour graph, the same for the same embedding) and kept; it is computed again only when the
    embedding has changed. Neighbours and UMAP that scanpy left in `adata` stay as they are.

    Parameters
    ----------
    adata
        The cells, with an embedding in `obsm`.
    color
        A column of `obs` or a gene; a list of them gives one panel each.
    basis
        The embedding in `obsm`. One with two columns is drawn as it is, a wider one through a UMAP.
    {ax}
    **kwargs
        For :func:`scanpy.pl.embedding`: `layer`, `palette`, `legend_loc`, `groups`, `vmin`, `vmax`, `cmap`, `size`, `title`,
        `ncols` and more. `show` and `save` are not among them: use `ax.figure.savefig(...)`.

    Returns
    -------
    The axes, or a list of them if `color` is a list. Sets the following fields:

    `adata.obsm["X_umap_scbin"]`
        Coordinates (`X_umap_scbin_<name>` for another `basis`), NaN for cells without an embedding.
    `adata.uns["scbin"]["umap"]`
        Fingerprints that tell whether the coordinates still belong to the embedding.
    `adata.uns["<color>_colors"]`
        Colours of the categories, as scanpy keeps them.

    Raises
    ------
    ScbinInputError
        If the embedding is missing, or a name in `color` is neither a column nor a gene.

    Examples
    --------
    >>> import anndata, numpy, scbin
    >>> adata = anndata.AnnData(numpy.eye(6), obs={"cell_type": list("AABBCC")})
    >>> adata.obsm["X_scbin"] = numpy.random.default_rng(0).normal(size=(6, 4)).astype("float32")
    >>> ax = scbin.pl.embedding(adata, color="cell_type")
    >>> ax.get_title()
    'cell_type'
    """
    check_adata(adata)
    several = color is not None and not isinstance(color, str)
    colors: Any = [] if color is None else color if several and np.iterable(color) else [color]
    known = {*map(str, adata.obs.columns), *adata.var_names, *(adata.raw.var_names if adata.raw is not None else ())}
    for key in colors:
        texts(color=key)
        if key not in known and "gene_symbols" not in kwargs:  # before the UMAP: a typo costs nothing
            close = ", ".join(map(repr, difflib.get_close_matches(key, known, n=3, cutoff=0.0))) or "none"
            raise ScbinInputError("A06", f"color={key!r} is no column of adata.obs and no gene. Closest: {close}.")
    make_real(adata)
    matrix = read_embedding(adata, basis)
    slot = basis if matrix.shape[1] == 2 else umap_slot(adata, basis, matrix)
    import scanpy as sc

    with warnings.catch_warnings():
        for category in (PendingDeprecationWarning, DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)  # between scanpy and its libraries
        drawn = sc.pl.embedding(adata, slot, color=color, ax=ax, show=False, **kwargs)
    axes = drawn if isinstance(drawn, list) else [drawn]
    name = basis.removeprefix("X_").replace("_", " ") + (" UMAP" if slot != basis else "")
    left_out = int((~np.isfinite(matrix).all(axis=1)).sum())
    for panel in axes:
        panel.set_xlabel(name + " 1" + (f"\n{left_out:,} cells have no embedding" if left_out else ""))
        panel.set_ylabel(f"{name} 2")
        legend = panel.get_legend()
        for text in [panel.title, *([] if legend is None else legend.get_texts())]:
            text.set_parse_math(False)  # labels are no formulas
    return axes if several else axes[0]


def read_embedding(adata: AnnData, basis: str) -> np.ndarray:
    """Return `obsm[basis]` as a dense float32 matrix (cells, dimensions) that can be drawn."""
    texts(basis=basis)
    if basis not in adata.obsm:
        there = ", ".join(repr(key) for key in adata.obsm) or "none"
        advice = "scbin.tl.pretrain(adata) or scbin.tl.embed(adata, model) writes it."
        advice = advice if basis == _keys.EMBEDDING else "Pass one of them as basis=."
        raise ScbinInputError("A06", f"{basis!r} is not in adata.obsm. Available: {there}. {advice}")
    matrix = adata.obsm[basis]
    matrix = np.asarray(matrix.toarray() if hasattr(matrix, "toarray") else matrix, dtype=np.float32)
    if matrix.ndim != 2 or matrix.shape[1] < 2 or not np.isfinite(matrix).all(axis=1).any():
        need = "a plot needs two columns and a cell without NaN"
        raise ScbinInputError("I53", f"adata.obsm[{basis!r}] has shape {matrix.shape}; {need}.")
    return matrix


# ---- the UMAP: computed once, kept as long as it belongs to the embedding --------------------------------------------


def umap_slot(adata: AnnData, basis: str, matrix: np.ndarray) -> str:
    """Return the slot with the UMAP of an embedding, which is computed where there is none or an outdated one.

    Fingerprints are kept per cell, not for the matrix, so that a subset of the cells keeps the coordinates it had.
    """
    slot = _keys.UMAP + ("" if basis == _keys.EMBEDDING else "_" + basis.removeprefix("X_").removeprefix("scbin_"))
    record = read_uns(adata, _keys.UMAP_RECORD, dict)
    if slot in adata.obsm and slot in record:
        kept = np.asarray(adata.obsm[slot])
        if kept.shape == (len(matrix), 2) and np.isin(_fingerprints(kept, matrix), np.asarray(record[slot])).all():
            return slot
    coordinates = compute_umap(matrix)
    write(adata, "obsm", slot, coordinates)
    write_uns(adata, _keys.UMAP_RECORD, {**record, slot: _fingerprints(coordinates, matrix)})
    return slot


def compute_umap(matrix: np.ndarray, *, n_neighbors: int = 15, seed: int = 0) -> np.ndarray:
    """Lay out the finite rows of an embedding in two dimensions (cells, 2); the other rows are NaN."""
    finite = np.isfinite(matrix).all(axis=1)
    coordinates = np.full((len(matrix), 2), np.nan, dtype=np.float32)
    if finite.sum() < FEWEST_FOR_UMAP:  # a neighbour graph says nothing; the first two principal components
        centred = matrix[finite] - matrix[finite].mean(axis=0)
        left, scale, _ = np.linalg.svd(np.pad(centred, ((0, 1), (0, 0))), full_matrices=False)
        coordinates[finite] = (left * scale)[:-1, :2]
        return coordinates
    import scanpy as sc
    from anndata import AnnData

    cells = AnnData(matrix[finite])  # an object of our own: neighbours and UMAP of the user's stay as they are
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # remarks of scanpy and umap on their own insides, for instance when cells are equal
        import_umap()
        sc.pp.neighbors(cells, n_neighbors=min(n_neighbors, cells.n_obs - 1), use_rep="X", random_state=seed)
        sc.tl.umap(cells, random_state=seed)
    coordinates[finite] = cells.obsm["X_umap"]
    return coordinates


def import_umap() -> None:
    """Import umap so that what it compiles is kept on disk: all later processes have it ready, 14 CPU-seconds earlier."""
    import numba

    compiler = numba.njit
    if "umap.umap_" not in sys.modules:
        numba.njit = lambda *given, **options: compiler(*given, **{"cache": True, **options})
        try:
            import umap.umap_  # noqa: F401
        finally:
            numba.njit = compiler


def _fingerprints(coordinates: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return a 32-bit fingerprint of the coordinates and the embedding of each cell (cells,); cells without one share theirs."""
    rows = np.column_stack([coordinates, matrix]).astype(np.float32)
    rows[~np.isfinite(matrix).all(axis=1), 2:] = np.nan
    return (pd.util.hash_pandas_object(pd.DataFrame(rows), index=False).to_numpy() >> 32).astype(np.uint32)
