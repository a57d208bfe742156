"""`pl.generated`: real and made cells on one map."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scbin import _keys
from scbin._anndata import check_adata, read_obs
from scbin._errors import ScbinInputError
from scbin.pl import _style
from scbin.pl._umap import compute_umap, read_embedding

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D


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
    """Draw real cells and made ones on one map, to see whether these lie where they should.

    Made cells that fill the islands of their type, and not only their middles, vary as real ones do. The map is a UMAP of both
    together, computed for the picture and kept nowhere; what does not lie together there differs to the model.

    Parameters
    ----------
    adata
        Real cells with an embedding.
    made
        Cells from :func:`scbin.tl.generate`, with the embedding of the same model.
    color
        Column of both `obs`, such as the phenotype that was asked for: colours for its values. Real cells are pale dots, made
        ones rings. Default: real cells grey, made ones blue.
    basis
        The embedding, in `obsm` of both.
    size
        Of a dot, in points squared. Default: by the number of cells.
    title
        Default: the name of the column.
    seed
        Of the UMAP.
    ax
        Axes to draw into. Default: new ones.

    Returns
    -------
    The `Axes`.

    Raises
    ------
    ScbinInputError
        If an embedding is missing, the two are of different widths, or `made` holds cells that were not made.

    Examples
    --------
    >>> import anndata, numpy, scbin
    >>> rng = numpy.random.default_rng(0)
    >>> real, made = (anndata.AnnData(numpy.eye(8)) for _ in range(2))
    >>> made.obs["scbin_generated"] = True
    >>> for adata in (real, made):
    ...     adata.obsm["X_scbin"] = rng.normal(size=(8, 4)).astype("float32")
    >>> ax = scbin.pl.generated(real, made)
    >>> ax.get_title()
    'real and generated cells'
    """
    check_adata(adata)
    check_adata(made)
    if _keys.GENERATED not in made.obs or not made.obs[_keys.GENERATED].fillna(False).astype(bool).all():
        raise ScbinInputError(
            "S11",
            f"made.obs[{_keys.GENERATED!r}] is not True for all cells. Pass real cells first, then those that "
            "scbin.tl.generate returned.",
        )
    both = [read_embedding(adata, basis), read_embedding(made, basis)]
    if both[0].shape[1] != both[1].shape[1]:
        raise ScbinInputError(
            "S12",
            f"{basis!r} has {both[0].shape[1]} columns for the real cells and {both[1].shape[1]} for the made ones: they come "
            "from different models. Call scbin.tl.embed(adata, model) with the model that made the cells.",
        )
    labels = None if color is None else [read_obs(cells, color).astype("object") for cells in (adata, made)]
    together = np.concatenate(both)
    coordinates = together if together.shape[1] == 2 else compute_umap(together, seed=seed)
    ax = _new_axes(labels) if ax is None else ax
    _style.quiet_axes(ax)
    ax.set_xlabel("UMAP 1" if together.shape[1] > 2 else "1", fontsize=8, color=_style.QUIET_COLOUR, loc="left")
    ax.set_ylabel("UMAP 2" if together.shape[1] > 2 else "2", fontsize=8, color=_style.QUIET_COLOUR, loc="bottom")
    _draw(ax, coordinates, adata.n_obs, labels, size)
    text = title if title is not None else (color or "real and generated cells")
    ax.set_title(_style.shorten(text, 48), fontsize=11, parse_math=False)
    return ax


def _new_axes(labels: list[pd.Series] | None) -> Axes:
    import matplotlib.pyplot as plt

    longest = 14 if labels is None else max(14, *(len(str(value)) for part in labels for value in part.unique()))
    width = 4.3 + 0.066 * min(longest, _style.LONGEST_LABEL)
    return plt.subplots(figsize=(width, 4.0), layout="constrained")[1]


def _draw(ax: Axes, coordinates: np.ndarray, n_real: int, labels: list[pd.Series] | None, size: float | None) -> None:
    is_made = np.arange(len(coordinates)) >= n_real
    size = float(np.clip(30_000 / len(coordinates), 2.0, 22.0)) if size is None else size
    entries = [_style.dot("#b0b0b0"), _ring(_style.TEXT_COLOUR if labels is not None else _style.MAIN_COLOUR)]
    names = ["real", "generated"]
    if labels is None:
        colours = np.where(is_made, _style.MAIN_COLOUR, "#c4c4c4")
    else:
        values = pd.concat(labels, ignore_index=True)
        known = sorted({str(value) for value in values.dropna()} - {"", "unknown"})
        by_name = dict(zip(known, _style.palette(len(known)), strict=True))
        colours = np.array([by_name.get(str(value), _style.MISSING_COLOUR) for value in values], dtype=object)
        entries += [_style.dot(by_name[name]) for name in known]
        names += known
        if any(str(value) not in by_name for value in values):
            entries, names = [*entries, _style.dot(_style.MISSING_COLOUR)], [*names, "missing"]
    finite = np.isfinite(coordinates).all(axis=1)
    rng = np.random.default_rng(0)  # in a random (but always the same) order, so that no class hides the others
    for mine in (finite & ~is_made, finite & is_made):
        cells = rng.permutation(np.flatnonzero(mine))
        x, y = coordinates[cells].T
        if is_made[cells].any():
            ax.scatter(
                x, y, s=1.6 * size, facecolors="none", edgecolors=list(colours[cells]), linewidths=0.7, rasterized=True
            )
        else:
            pale = 1.0 if labels is None else 0.35
            ax.scatter(x, y, s=size, c=list(colours[cells]), alpha=pale, linewidths=0, rasterized=True)
    _style.legend_beside(ax, entries, names)


def _ring(colour: str) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], marker="o", linestyle="", markersize=6, markerfacecolor="none", markeredgecolor=colour)
