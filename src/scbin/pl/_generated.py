"""`pl.generated`: real and generated cells on one map."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scbin import _docs, _keys
from scbin._adata import check_adata, read_obs
from scbin._errors import ScbinInputError
from scbin.pl import _style
from scbin.pl._embedding import compute_umap, read_embedding

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes


@_docs.shared
def generated(
    adata: AnnData,
    made: AnnData,
    *,
    color: str | None = None,
    basis: str = _keys.EMBEDDING,
    size: float | None = None,
    title: str | None = None,
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draw real and generated cells on one map, to see whether the generated ones lie where they should.

    Generated cells that cover the cluster of their type, and not only its centre, vary as real ones do. The map is a UMAP of
    both together, computed for the plot and stored nowhere.

    Parameters
    ----------
    adata
        Real cells with an embedding.
    made
        Cells from :func:`scbin.tl.generate`, with the embedding of the same model.
    color
        Column of both `obs`, such as the phenotype that was asked for. Real cells are pale dots, generated ones rings.
    basis
        The embedding, in `obsm` of both.
    size
        Area of a dot in square points. Default: smaller the more cells there are.
    title
        Text above the axes. Default: `color`.
    {seed}
    {ax}

    Returns
    -------
    The axes.

    Raises
    ------
    ScbinInputError
        If an embedding is missing, the two have different widths, or `made` holds cells that were not generated.

    Examples
    --------
    >>> import anndata, numpy, scbin
    >>> rng = numpy.random.default_rng(0)
    >>> real, made = (anndata.AnnData(numpy.eye(8)) for _ in range(2))
    >>> made.obs["scbin_generated"] = True
    >>> for adata in (real, made):
    ...     adata.obsm["X_scbin"] = rng.normal(size=(8, 4)).astype("float32")
    >>> scbin.pl.generated(real, made).get_title()
    'real and generated cells'
    """
    both = [check_adata(adata), check_adata(made)]
    if not made.obs.get(_keys.GENERATED, pd.Series([False])).eq(True).all():
        fix = "Pass real cells first, then those that scbin.tl.generate returned."
        raise ScbinInputError("A02", f"made.obs[{_keys.GENERATED!r}] is not True for all cells. {fix}")
    parts = [read_embedding(cells, basis) for cells in both]
    if parts[0].shape[1] != parts[1].shape[1]:
        found = f"{basis!r} has {parts[0].shape[1]} columns for real cells and {parts[1].shape[1]} for generated ones"
        fix = "Call scbin.tl.embed(adata, model) with the model that made the cells."
        raise ScbinInputError("I53", f"{found}: they come from different models. {fix}")
    matrix = np.concatenate(parts)
    xy = matrix if matrix.shape[1] == 2 else compute_umap(matrix, seed=seed)
    is_real = np.arange(len(xy)) < adata.n_obs
    colours = np.where(is_real, _style.MISSING, _style.MAIN).astype(object)
    grey, ink = (_style.MISSING, _style.MAIN) if color is None else (_style.QUIET, "#333333")
    dots: dict[str, Any] = {"real": {"color": grey}, "generated": {"markerfacecolor": "none", "markeredgecolor": ink}}
    if color is not None:
        labels = pd.concat([read_obs(cells, color).astype("object") for cells in both])
        codes, known = pd.factorize(labels.where(labels.isna(), labels.astype(str)), sort=True)
        palette = _style.colours_of(both[0], color, list(known))
        colours = np.array([*palette, _style.MISSING], dtype=object)[codes]  # -1: missing
        dots |= {name: {"color": colour} for name, colour in zip(known, palette, strict=True)}

    ax = _style.new_axes(6.0, 4.2) if ax is None else ax
    size = float(np.clip(30_000 / len(xy), 2.0, 22.0)) if size is None else size
    # in a random (but always the same) order, so that no class hides the others
    order = np.random.default_rng(0).permutation(np.flatnonzero(np.isfinite(xy).all(axis=1)))
    real, rings = order[is_real[order]], order[~is_real[order]]
    (x, y), alpha = xy.T, 1 if color is None else 0.35
    ax.scatter(x[real], y[real], s=size, c=list(colours[real]), alpha=alpha, linewidths=0)
    ax.scatter(x[rings], y[rings], s=1.6 * size, facecolors="none", edgecolors=list(colours[rings]), linewidths=0.7)
    lines = [line for style in dots.values() for line in ax.plot([], [], marker="o", linestyle="", **style)]
    _style.legend_beside(ax, lines, list(dots))
    name = "UMAP" if matrix.shape[1] > 2 else basis.removeprefix("X_")
    ax.set(xlabel=f"{name} 1", ylabel=f"{name} 2", xticks=[], yticks=[])
    ax.set_title(title if title is not None else (color or "real and generated cells"), parse_math=False)
    return ax
