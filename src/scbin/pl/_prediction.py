"""`pl.prediction`: what the model thinks of every cell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scbin._anndata import check_adata
from scbin.get._predicted import read_predicted, read_unjudged
from scbin.get._recorded import recorded, truth_name
from scbin.pl import _classes, _style

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

    from scbin.get._predicted import Cells, Predicted

COPIES = 24


def prediction(
    adata: AnnData,
    target: str,
    *,
    truth_key: str | None = None,
    cells: Cells = "auto",
    cmap: str = "Blues",
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the probability of every class for every cell; for a number, the predictions against the truth.

    One row per cell and one column per class. The cells are ordered by their true class, within it by the class they were
    given and by how sure the model was: blocks on the diagonal are cells that were recognised, stripes beside them are what they
    were taken for. Where there is no truth, the cells are ordered by the class they were given, and numbers are drawn as a
    histogram.

    Parameters
    ----------
    adata
        Cells with predictions (:func:`scbin.tl.predict`).
    target
        What was predicted.
    truth_key
        Column of `obs` with the truth. Default: `target`, or none where there is no such column.
    cells
        `"test"`: those that `obs["scbin_split"]` calls test; `"all"`; `"auto"`: the test cells where there are any.
    cmap
        Colours of the probabilities.
    title
        Text above the axes. Default: the target.
    ax
        The axes to draw in.

    Returns
    -------
    The axes.

    Examples
    --------
    >>> import anndata, numpy, pandas, scbin
    >>> obs = pandas.DataFrame({"cell_type": list("AABB"), "scbin_cell_type": pandas.Categorical(list("AABA"))})
    >>> adata = anndata.AnnData(numpy.ones((4, 2)), obs=obs.set_axis(list("wxyz")))
    >>> adata.obsm["scbin_cell_type_probability"] = numpy.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    >>> scbin.pl.prediction(adata, "cell_type").get_ylabel()
    'cells, by true class'
    """
    has_truth = truth_key is not None or truth_name(check_adata(adata), target, recorded(adata, target)) is not None
    found = (
        read_predicted(adata, target, truth_key=truth_key, cells=cells)
        if has_truth
        else read_unjudged(adata, target, cells=cells)
    )
    if found.kind == "number":
        return _draw_numbers(found, title, ax) if has_truth else _draw_distribution(found, title, ax)
    _classes.of_classes(found, probabilities=True)
    probability = np.asarray(found.probability)
    order = order_cells(found)
    columns = _columns(found, probability)
    n_groups = len(np.unique(found.truth))
    names = [found.classes[place] for place in columns]
    ax = _classes.grid_axes(max(n_groups, 10), len(columns), names) if ax is None else ax
    # each column several times: thousands of rows are averaged where they share a pixel, columns stay sharp
    values = np.repeat(np.ma.masked_invalid(probability[order][:, columns]), COPIES, axis=1)
    extent = (-0.5, len(columns) - 0.5, len(order) - 0.5, -0.5)
    image = ax.imshow(values, cmap=cmap, vmin=0, vmax=1, aspect="auto", extent=extent)
    ax.set_facecolor(_style.MISSING_COLOUR)  # shows where a cell has no probabilities
    _mark_groups(ax, found, found.truth[order])
    _classes.name_columns(ax, np.arange(len(columns)), names)
    _classes.bare(ax)
    _classes.axis_label(ax, x="class", y="cells, by true class" if has_truth else "cells, by the class given")
    _style.colour_bar(ax, image, extend="neither")
    _classes.title(ax, f"{target}: probability" if title is None else title)
    return ax


def order_cells(found: Predicted) -> np.ndarray:
    """Order cells by their class, then the one they were given (their own first), then by how sure the model was."""
    probability = np.asarray(found.probability)
    best = np.nan_to_num(probability).max(axis=1)
    wrong = found.predicted != found.truth
    return np.lexsort((-best, found.predicted, wrong, found.truth))


def _columns(found: Predicted, probability: np.ndarray) -> np.ndarray:
    """Classes that some cell has, is given or might be."""
    possible = np.flatnonzero(np.nan_to_num(probability).max(axis=0, initial=0.0) >= 0.05)
    return np.union1d(found.used, possible)


def _mark_groups(ax: Axes, found: Predicted, truth: np.ndarray) -> None:
    """Draw a line between classes, and name those that have room for a name."""
    bounds = np.flatnonzero(np.diff(truth)) + 1
    starts, stops = np.append(0, bounds), np.append(bounds, len(truth))
    for bound in bounds:
        ax.axhline(bound - 0.5, color="white", linewidth=0.9)
        ax.axhline(bound - 0.5, color=_style.QUIET_COLOUR, linewidth=0.4)
    places = _spread(0.5 * (starts + stops) - 0.5, 0.036 * len(truth), len(truth))
    names = [found.classes[truth[start]] for start in starts]
    _classes.name_rows(ax, places, names, (stops - starts).tolist())


def _spread(places: np.ndarray, least: float, total: int) -> np.ndarray:
    """Move names apart that would lie on each other, keeping their order; small classes share the room of large ones."""
    least = min(least, 0.98 * total / max(len(places), 1))
    moved = places.astype(np.float64)
    for k in range(1, len(moved)):
        moved[k] = max(moved[k], moved[k - 1] + least)
    moved[-1] = min(moved[-1], total - 0.5)
    for k in range(len(moved) - 2, -1, -1):
        moved[k] = min(moved[k], moved[k + 1] - least)
    return moved


def _draw_distribution(found: Predicted, title: str | None, ax: Axes | None) -> Axes:
    """Draw how the predicted numbers are spread: without a truth there is nothing to hold them against."""
    predicted = found.predicted[np.isfinite(found.predicted)]
    ax = _classes.plain_axes(4.6, 4.4) if ax is None else ax
    n_bars = int(np.clip(np.sqrt(max(len(predicted), 1)), 5, 60))
    ax.hist(predicted, bins=n_bars, color=_style.MAIN_COLOUR, linewidth=0)
    _style.frame(ax)
    _classes.axis_label(ax, x=f"predicted {found.target}", y="cells")
    _classes.title(ax, f"{found.target}: predictions, no truth to compare" if title is None else title)
    return ax


def _draw_numbers(found: Predicted, title: str | None, ax: Axes | None) -> Axes:
    known = np.flatnonzero(np.isfinite(found.predicted))
    truth, predicted = found.truth[known], found.predicted[known]
    ax = _classes.plain_axes(4.6, 4.4) if ax is None else ax
    low = min(truth.min(initial=np.inf), predicted.min(initial=np.inf))
    high = max(truth.max(initial=-np.inf), predicted.max(initial=-np.inf))
    if len(known):
        ax.plot([low, high], [low, high], color=_style.QUIET_COLOUR, linewidth=0.8, linestyle=(0, (3, 3)))
    size = float(np.clip(8_000 / max(len(known), 1), 1.5, 18.0))
    ax.scatter(truth, predicted, s=size, color=_style.MAIN_COLOUR, alpha=0.5, linewidths=0, rasterized=True)
    _style.frame(ax)
    _classes.axis_label(ax, x=f"true {found.target}", y=f"predicted {found.target}")
    error = float(np.abs(predicted - truth).mean()) if len(known) else float("nan")
    spread = float(((truth - truth.mean()) ** 2).sum()) if len(known) else 0.0
    r2 = 1 - float(((predicted - truth) ** 2).sum()) / spread if spread else float("nan")
    text = f"{found.target}: off by {error:.3g} on average, R² {r2:.2f}" if title is None else title
    _classes.title(ax, text)
    return ax
