"""`pl.perturbation_map`: where perturbed cells go, as arrows on the map of the cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from scbin import _keys
from scbin._anndata import check_adata
from scbin._errors import ScbinInputError
from scbin.pl import _style
from scbin.pl._embedding import embedding
from scbin.pl._umap import read_embedding, umap_of

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

N_NEIGHBORS = 30
GRID = 26  # arrows along the longer side
FEWEST_PER_ARROW = 3.0  # cells, by weight
MOST_ARROWS = 1_500


def perturbation_map(
    adata: AnnData,
    *,
    color: str | None = None,
    key: str | None = None,
    basis: str = _keys.EMBEDDING,
    perturbed: str | None = None,
    arrows: Literal["grid", "cells"] = "grid",
    scale: float | None = None,
    n_neighbors: int = N_NEIGHBORS,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw on the UMAP where a perturbation moves the cells.

    A map has no place for a cell that was never laid out. So a perturbed cell is placed among the cells that lie near it in the
    embedding: the weights of its neighbours before and after the perturbation give two places on the map, and the arrow leads
    from one to the other. A cell that did not move has no arrow.

    Parameters
    ----------
    adata
        Cells after `scbin.tl.perturb` of a set of genes together.
    color
        A column of `obs` or a gene, drawn in pale dots under the arrows.
    key
        Entry of `uns` with the perturbation, whose vectors are drawn. Default: `"scbin_perturb"`.
    basis
        The embedding in `obsm` that was perturbed. One with two columns is drawn as it is, a wider one through its UMAP.
    perturbed
        The slot in `obsm` that holds the vectors after the perturbation. Default: that of `key`.
    arrows
        `"grid"`: means over the cells around each point of a grid; `"cells"`: one arrow a cell (at most 1,500 of them).
    scale
        How many times as long as the shift to draw the arrows. Default: so that the longest spans about two steps of the grid; the factor
        is written below the map.
    n_neighbors
        Neighbours of a cell, before and after, that say where it lies.
    title
        Text above the axes.
    ax
        The axes to draw in.

    Returns
    -------
    The axes. Where the UMAP was not there yet, sets `adata.obsm["X_umap_scbin"]` as :func:`scbin.pl.embedding` does.

    Examples
    --------
    >>> import anndata, numpy, scbin
    >>> rng = numpy.random.default_rng(0)
    >>> adata = anndata.AnnData(numpy.ones((80, 1)))
    >>> adata.obsm["X_scbin"] = rng.normal(size=(80, 2)).astype("float32")
    >>> adata.obsm["X_scbin_perturbed"] = adata.obsm["X_scbin"] + numpy.float32([1, 0])
    >>> ax = scbin.pl.perturbation_map(adata)
    >>> ax.get_title()
    'Where the perturbation moves cells'
    """
    check_adata(adata)
    if arrows not in ("grid", "cells"):
        raise ScbinInputError("P64", f"arrows is {arrows!r}; choose 'grid' or 'cells'.")
    if n_neighbors < 1 or (scale is not None and scale <= 0):
        raise ScbinInputError("P74", f"n_neighbors={n_neighbors} and scale={scale} need to be above 0.")
    before = read_embedding(adata, basis)
    if perturbed is None:
        perturbed = _keys.of_perturbation(_keys.PERTURB if key is None else key)[1]
    after = _read_perturbed(adata, perturbed, before)
    coordinates = before if before.shape[1] == 2 else umap_of(adata, basis)
    moved = np.isfinite(after).all(axis=1) & np.isfinite(before).all(axis=1)
    places, steps = displacements(before, after, coordinates, moved, n_neighbors)
    text = "Where the perturbation moves cells" if title is None else title
    ax = embedding(adata, color=color, basis=basis, title=text, ax=ax)
    for dots in ax.collections:  # the cells are the ground that the arrows stand on
        dots.set_alpha(0.35 if color is not None else 1.0)
        dots.set_zorder(1)
        if color is None:
            dots.set_facecolor("#d5d9df")
    if arrows == "grid":
        places, steps = grid_means(places, steps, coordinates)
    elif len(places) > MOST_ARROWS:
        some = np.sort(np.random.default_rng(0).permutation(len(places))[:MOST_ARROWS])
        places, steps = places[some], steps[some]
    _draw_arrows(ax, places, steps, coordinates, scale, fine=arrows == "cells")
    return ax


def displacements(
    before: np.ndarray, after: np.ndarray, coordinates: np.ndarray, moved: np.ndarray, n_neighbors: int = N_NEIGHBORS
) -> tuple[np.ndarray, np.ndarray]:
    """Return place and step on the map (cells that moved, 2) of each perturbed cell.

    Both its places, before and after, are means over the same neighbours: those of the cell and those of its perturbed vector,
    weighted by a bell as wide as the distance to the middle one of them. So the step is smooth in the shift, and zero without one.
    """
    from sklearn.neighbors import NearestNeighbors

    known = np.flatnonzero(np.isfinite(before).all(axis=1) & np.isfinite(coordinates).all(axis=1))
    cells = np.flatnonzero(moved & np.isfinite(coordinates).all(axis=1))
    if len(known) < 3 or not len(cells):
        return np.empty((0, 2)), np.empty((0, 2))
    k = min(n_neighbors, len(known) - 1)
    index = NearestNeighbors(n_neighbors=k + 1).fit(before[known].astype(np.float64))
    steps = np.empty((len(cells), 2))
    for start in range(0, len(cells), 2_000):
        part = cells[start : start + 2_000]
        from_distance, ours = index.kneighbors(before[part])
        to_distance, theirs = index.kneighbors(after[part])
        both = np.concatenate([ours, theirs], axis=1)  # (cells, 2 k + 2)
        seen = np.concatenate([np.ones_like(ours, bool), ~_contained(theirs, ours)], axis=1)
        width = np.maximum(np.maximum(from_distance[:, k // 2], to_distance[:, k // 2]), 1e-12)[:, None]
        ends = []
        for vectors in (before[part], after[part]):
            distance = np.linalg.norm(before[known][both] - vectors[:, None], axis=2)
            nearest = np.where(seen, distance, np.inf).min(axis=1, keepdims=True)
            weight = np.where(seen, np.exp(-0.5 * (distance**2 - nearest**2) / width**2), 0.0)
            weight /= weight.sum(axis=1, keepdims=True)
            ends.append((weight[..., None] * coordinates[known][both]).sum(axis=1))
        steps[start : start + 2_000] = ends[1] - ends[0]
    return coordinates[cells].astype(np.float64), steps


def grid_means(places: np.ndarray, steps: np.ndarray, coordinates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average steps around the points of a regular grid; points with hardly a cell around them are left out."""
    if not len(places):
        return places, steps
    shown = coordinates[np.isfinite(coordinates).all(axis=1)]
    low, high = shown.min(axis=0), shown.max(axis=0)
    spacing = max(float((high - low).max()) / GRID, 1e-12)
    axes = [np.arange(low[i] + spacing / 2, high[i] + spacing / 2, spacing) for i in range(2)]
    points = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2)
    result = np.empty((len(points), 3))
    for start in range(0, len(points), 200):
        part = points[start : start + 200]
        square = ((part[:, None] - places[None]) ** 2).sum(axis=2)
        weight = np.exp(-0.5 * square / (0.5 * spacing) ** 2)
        total = weight.sum(axis=1)
        result[start : start + 200, 0] = total
        result[start : start + 200, 1:] = weight @ steps / np.maximum(total, 1e-12)[:, None]
    crowded = result[:, 0] >= min(FEWEST_PER_ARROW, 0.5 * result[:, 0].max())
    return points[crowded], result[crowded, 1:]


def _draw_arrows(
    ax: Axes, places: np.ndarray, steps: np.ndarray, coordinates: np.ndarray, scale: float | None, *, fine: bool
) -> None:
    lengths = np.linalg.norm(steps, axis=1)
    longest = float(np.quantile(lengths, 0.98)) if len(lengths) else 0.0
    note = "no cell moves"
    if longest > 1e-9:
        shown = coordinates[np.isfinite(coordinates).all(axis=1)]
        spacing = float((shown.max(axis=0) - shown.min(axis=0)).max()) / GRID
        scale = (1.5 if fine else 2.0) * spacing / longest if scale is None else scale
        ax.quiver(
            *places.T,
            *(scale * steps).T,
            angles="xy",
            scale_units="xy",
            scale=1,
            color=_style.TEXT_COLOUR,
            width=0.0013 if fine else 0.0026,
            alpha=0.75 if fine else 1.0,
            headwidth=4.2,
            headlength=4.6,
            headaxislength=4.0,
            minlength=0.6,
            zorder=5,
        )
        note = "arrows as long as the shift" if abs(scale - 1) < 0.05 else f"arrows {scale:.2g} times the shift"
    label = ax.get_xlabel()
    ax.set_xlabel(f"{label}\n{note}", fontsize=8, color=_style.QUIET_COLOUR, loc="left")


def _contained(theirs: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """Whether each of their neighbours is among our neighbours of the same cell."""
    n = int(max(theirs.max(), ours.max())) + 1
    offset = n * np.arange(len(ours))[:, None]
    return np.isin(theirs + offset, ours + offset)


def _read_perturbed(adata: AnnData, slot: str, before: np.ndarray) -> np.ndarray:
    if slot not in adata.obsm:
        raise ScbinInputError(
            "P59",
            f"adata.obsm has no {slot!r}. scbin.tl.perturb writes it when a list of genes is perturbed together; where each gene is "
            "perturbed in turn there is no one place that a cell goes to.",
        )
    after = np.asarray(adata.obsm[slot], dtype=np.float32)
    if after.shape != before.shape:
        raise ScbinInputError(
            "P73",
            f"adata.obsm[{slot!r}] has shape {after.shape}, the embedding {before.shape}: they are of two models.",
        )
    return after
