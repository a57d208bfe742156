"""`pl.embedding`, `pl.compare`, `pl.generated`: the cells as the model sees them, in two dimensions."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData

from scbin import _docs, _keys
from scbin._adata import check_adata, make_real, read_obs, write, write_uns
from scbin._errors import ScbinInputError
from scbin.pl import _style
from scbin.train.history import stage

if TYPE_CHECKING:
    from collections.abc import Sequence

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

    This calls :func:`scanpy.pl.embedding`, with all its arguments. The UMAP is computed once, from a neighbour graph of its own, and
    kept until the embedding changes. Neighbours and UMAP that scanpy left in `adata` do not change.

    Parameters
    ----------
    adata
        The cells, with an embedding in `obsm`.
    color
        A column of `obs` or a gene; a list of them gives one panel each.
    basis
        The embedding in `obsm`. If it has two columns it is drawn as it is, else as a UMAP.
    {ax}
    **kwargs
        For :func:`scanpy.pl.embedding`: `layer`, `palette`, `legend_loc`, `groups`, `vmin`, `vmax`, `cmap`, `size`, `title`,
        `ncols` and more. `show` and `save` are not among them: use `ax.figure.savefig(...)`.

    Returns
    -------
    The axes, or a list of them if `color` is a list. Sets the following fields:

    `adata.obsm["X_umap_scbin"]`
        Coordinates (`X_umap_scbin_<name>` for another `basis`), NaN for cells without an embedding.
    `adata.uns["scbin"]["X_umap_scbin"]`
        Fingerprints that tell whether the embedding has changed.
    `adata.uns["<color>_colors"]`
        Colours of the categories, as in scanpy.

    Examples
    --------
    >>> import anndata, numpy, scbin
    >>> adata = anndata.AnnData(numpy.eye(6), obs={"cell_type": list("AABBCC")})
    >>> adata.obsm["X_scbin"] = numpy.random.default_rng(0).normal(size=(6, 4)).astype("float32")
    >>> ax = scbin.pl.embedding(adata, color="cell_type")
    >>> ax.get_title()
    'cell_type'
    """
    import scanpy as sc

    check_adata(adata)
    genes = adata.var_names if adata.raw is None else adata.var_names.union(adata.raw.var_names)
    for key in [color] if isinstance(color, str) else color or ():
        if key not in genes and "gene_symbols" not in kwargs:  # before the UMAP: a typo costs nothing
            read_obs(adata, key)
    make_real(adata)
    matrix = read_embedding(adata, basis)
    slot = map_slot(adata, basis, matrix)
    short, name = (key.removeprefix("X_") for key in (slot, basis))  # scanpy writes UMAP1 for "umap"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)  # between scanpy and matplotlib
        drawn = sc.pl.embedding(adata, slot if short in adata.obsm else short, color=color, ax=ax, show=False, **kwargs)
    axes = drawn if isinstance(drawn, list) else [drawn]
    for panel in axes if slot != basis else ():
        panel.set(xlabel=f"{name} UMAP1", ylabel=f"{name} UMAP2")
    return axes[0] if color is None or isinstance(color, str) else axes


@_docs.shared
def compare(
    adata: AnnData,
    bases: Sequence[str] = (_keys.EMBEDDING, "X_pca"),
    *,
    color: str | None = None,
    interactive: bool | None = None,
    **kwargs: Any,
) -> list[Axes] | Any:
    """Draw several embeddings of the same cells side by side, in the same colours.

    Parameters
    ----------
    adata
        The cells, with the embeddings in `obsm`.
    bases
        The embeddings, each drawn as by :func:`scbin.pl.embedding`.
    {color}
    interactive
        Link the maps with jupyter-scatter: cells selected in one are selected in all. Default: in notebooks, if it is installed.
    **kwargs
        For :func:`scanpy.pl.embedding`, or for `jscatter.Scatter`.

    Returns
    -------
    The axes, one per embedding, or the widget.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()
    >>> adata.obsm["X_scbin"], adata.obsm["X_pca"] = adata.X[:, :2].toarray(), adata.X[:, 2:4].toarray()
    >>> [ax.get_title() for ax in scbin.pl.compare(adata, color="louvain")]
    ['X_scbin', 'X_pca']
    """
    import matplotlib.pyplot as plt

    matrices = {basis: read_embedding(check_adata(adata), basis) for basis in bases}
    if interactive or (interactive is None and "ipykernel" in sys.modules and find_spec("jscatter")):
        return _linked(adata, matrices, color, kwargs)
    axes = plt.subplots(1, len(bases), figsize=(4 * len(bases) + 1.2, 3.6), layout="constrained", squeeze=False)[1][0]
    for ax, basis in zip(axes, bases, strict=True):
        once = {} if ax is axes[-1] else {"legend_loc": None, "colorbar_loc": None}
        embedding(adata, color=color, basis=basis, ax=ax, **{"title": basis, **once, **kwargs})
    return list(axes)


def _linked(adata: AnnData, matrices: dict[str, np.ndarray], color: str | None, options: dict[str, Any]) -> Any:
    """Return a widget with one map per embedding; the cells that are in all of them, selected together."""
    import scanpy as sc

    if not find_spec("jscatter"):
        fix = 'Install it, pip install "scbin[interactive]", or pass interactive=False.'
        raise ScbinInputError("A05", f"an interactive plot needs jupyter-scatter. {fix}")
    jscatter = import_module("jscatter")
    make_real(adata)
    slots = [map_slot(adata, basis, matrix) for basis, matrix in matrices.items()]
    xy = np.hstack([adata.obsm[slot] for slot in slots])
    table = sc.get.obs_df(adata, [] if color is None else [color])
    if color is not None:
        options = {"color_by": color, "legend": True} | options
        if hasattr(table[color], "cat"):
            options = {"color_map": _style.colours(adata, color, table[color].cat.categories)} | options
    table[[f"{axis}{i}" for i in range(len(slots)) for axis in "xy"]] = xy
    table = table[np.isfinite(xy).all(axis=1)].reset_index(drop=True)
    maps = [(jscatter.Scatter(f"x{i}", f"y{i}", data=table, **options), basis) for i, basis in enumerate(matrices)]
    return jscatter.compose(maps, sync_selection=True, sync_hover=True)


@_docs.shared
def generated(
    adata: AnnData,
    made: AnnData,
    *,
    color: str | None = None,
    basis: str = _keys.EMBEDDING,
    ax: Axes | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw real and generated cells on one UMAP, the generated ones with rings.

    Generated cells should cover the whole cluster of their type, not only its centre. The UMAP is computed for the plot and not
    stored.

    Parameters
    ----------
    adata
        Real cells with an embedding.
    made
        Cells from :func:`scbin.tl.generate`, with the embedding of the same model.
    color
        A column of both `obs`, such as the requested phenotype.
    basis
        The embedding, in both `obsm`.
    {ax}
    **kwargs
        For :func:`scanpy.pl.embedding`: `palette`, `size`, `title` and more.

    Returns
    -------
    The axes.

    Examples
    --------
    >>> import anndata, numpy, scbin
    >>> rng = numpy.random.default_rng(0)
    >>> real, made = (anndata.AnnData(numpy.eye(8)) for _ in range(2))
    >>> for adata in (real, made):
    ...     adata.obsm["X_scbin"] = rng.normal(size=(8, 4)).astype("float32")
    >>> scbin.pl.generated(real, made).get_title()
    'ringed cells are generated'
    """
    parts = [read_embedding(check_adata(cells), basis) for cells in (adata, made)]
    if parts[0].shape[1] != parts[1].shape[1]:
        raise ScbinInputError("A03", f"obsm[{basis!r}] of real and generated cells are of different models.")
    matrix = np.concatenate(parts)
    cells = AnnData(np.zeros((len(matrix), 1), dtype=np.float32))
    cells.obsm["X_umap"] = matrix if matrix.shape[1] == 2 else compute_umap(matrix)
    style = {"title": f"{'' if color is None else f'{color}: '}ringed cells are generated"} | kwargs
    if color is not None:
        labels = pd.concat([read_obs(part, color).astype(object) for part in (adata, made)])
        cells.obs[color] = labels.map(str, na_action="ignore").to_numpy()
        style = {"palette": _style.colours(adata, color, labels.dropna().map(str).unique())} | style
    drawn: Any = embedding(cells, color=color, basis="X_umap", ax=ax or _style.new_axes(6.0, 4.2), **style)
    rings = {"facecolors": "none", "edgecolors": _style.MAIN if color is None else "#333333", "linewidths": 0.7}
    drawn.scatter(*cells.obsm["X_umap"][adata.n_obs :].T, s=0.4 * drawn.collections[0].get_sizes()[0], **rings)
    return drawn


def read_embedding(adata: AnnData, basis: str) -> np.ndarray:
    """Return `obsm[basis]` as a dense float32 matrix (cells, dimensions) that can be drawn."""
    if basis not in adata.obsm:
        advice = (
            "scbin.tl.pretrain(adata) or scbin.tl.embed(adata, model) writes 'X_scbin', scanpy.pp.pca(adata) 'X_pca'."
        )
        raise ScbinInputError("A06", f"{basis!r} is not in adata.obsm. Available: {list(adata.obsm)}. {advice}")
    matrix = np.asarray(adata.obsm[basis], dtype=np.float32)
    if matrix.ndim != 2 or matrix.shape[1] < 2 or not np.isfinite(matrix).all(axis=1).any():
        need = "a plot needs two columns and a cell without NaN"
        raise ScbinInputError("I53", f"adata.obsm[{basis!r}] has shape {matrix.shape}; {need}.")
    return matrix


# ---- the UMAP: computed once, kept as long as it belongs to the embedding --------------------------------------------


def map_slot(adata: AnnData, basis: str, matrix: np.ndarray) -> str:
    """Return the slot to draw: the embedding itself if it has two columns, else its UMAP, computed where it is missing or outdated.

    Fingerprints are kept per cell, not for the matrix, so that a subset of the cells keeps the coordinates it had.
    """
    if matrix.shape[1] == 2:
        return basis
    slot = _keys.UMAP + ("" if basis == _keys.EMBEDDING else "_" + basis.removeprefix("X_").removeprefix("scbin_"))
    known = adata.uns.get(_keys.UNS, {}).get(slot, ())
    if slot in adata.obsm and np.isin(_fingerprints(adata.obsm[slot], matrix), known).all():
        return slot
    with stage("computing the UMAP", shown=sys.stderr.isatty()):
        coordinates = compute_umap(matrix)
    write(adata, "obsm", slot, coordinates)
    write_uns(adata, slot, _fingerprints(coordinates, matrix))
    return slot


def compute_umap(matrix: np.ndarray, *, n_neighbors: int = 15, seed: int = 0) -> np.ndarray:
    """Lay out the finite rows of an embedding in two dimensions (cells, 2); the other rows are NaN."""
    import scanpy as sc

    finite = np.isfinite(matrix).all(axis=1)
    coordinates = np.full((len(matrix), 2), np.nan, dtype=np.float32)
    if finite.sum() < FEWEST_FOR_UMAP:  # a neighbour graph says nothing; the first two principal components
        centred = matrix[finite] - matrix[finite].mean(axis=0)
        coordinates[finite] = centred @ np.linalg.svd(centred)[2][:2].T
        return coordinates
    cells = AnnData(matrix[finite])  # an object of our own: neighbours and UMAP of the user's stay as they are
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks of scanpy and umap on themselves, for instance on equal cells
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
