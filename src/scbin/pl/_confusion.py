"""`pl.confusion`: which classes are taken for which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from scbin._errors import ScbinInputError
from scbin.get._predicted import read_predicted
from scbin.pl import _classes

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

    from scbin.get._predicted import Cells, Predicted

MOST_WRITTEN = 26  # columns; beyond that the numbers do not fit into their squares


def confusion(
    adata: AnnData,
    target: str,
    *,
    truth_key: str | None = None,
    cells: Cells = "auto",
    write: Literal["percent", "count", "nothing"] = "percent",
    cmap: str = "Blues",
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw what the cells of each class were taken for.

    Each row is a true class, with its number of cells; its squares say which share of them was given which class. Classes that
    are taken for each other share dark squares beside the diagonal; a rare class that vanishes has a light diagonal square, which
    the accuracy over all cells would not show.

    Parameters
    ----------
    adata
        Cells with predictions (:func:`scbin.tl.predict`).
    target
        What was predicted.
    truth_key
        Column of `obs` with the truth. Default: `target`.
    cells
        `"test"`: those that `obs["scbin_split"]` calls test; `"all"`; `"auto"`: the test cells where there are any.
    write
        What stands in the squares: the `"percent"` of the row, the `"count"` of cells, or `"nothing"`.
    cmap
        Colours of the shares.
    title
        Text above the axes. Default: the target, and how many cells are right.
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
    >>> [text.get_text() for text in scbin.pl.confusion(adata, "cell_type").get_yticklabels()]
    ['A  (2)', 'B  (2)']
    """
    if write not in ("percent", "count", "nothing"):
        raise ScbinInputError("E27", f"write is {write!r}; choose 'percent', 'count' or 'nothing'.")
    found = _classes.of_classes(read_predicted(adata, target, truth_key=truth_key, cells=cells))
    counts = count_pairs(found)
    used, n_classes = found.used, len(found.classes)
    rows = used[counts[used].sum(axis=1) > 0]
    columns = np.append(used, n_classes) if counts[:, n_classes].any() else used
    totals = counts[rows].sum(axis=1)
    shares = (counts[rows] / totals[:, None])[:, columns]
    names = [*found.classes, _classes.NONE_GIVEN]
    ax = _classes.grid_axes(len(rows), len(columns), [names[place] for place in columns]) if ax is None else ax
    ax.imshow(shares, cmap=cmap, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    if write != "nothing" and len(columns) <= MOST_WRITTEN:
        _write(ax, shares, counts[rows][:, columns], write)
    _classes.name_rows(ax, np.arange(len(rows)), [names[place] for place in rows], totals.tolist())
    _classes.name_columns(ax, np.arange(len(columns)), [names[place] for place in columns])
    _classes.bare(ax)
    _classes.axis_label(ax, x="predicted", y="true (cells)")
    right, total = int(np.trace(counts)), int(counts.sum())
    _classes.title(ax, f"{target}: {right:,} of {total:,} cells right" if title is None else title)
    return ax


def count_pairs(found: Predicted) -> np.ndarray:
    """Count cells by true and given class (classes, classes + 1); the last column is for cells that were given none."""
    n_classes = len(found.classes)
    given = np.where(found.predicted < 0, n_classes, found.predicted)
    flat = np.bincount(found.truth * (n_classes + 1) + given, minlength=n_classes * (n_classes + 1))
    return flat.reshape(n_classes, n_classes + 1)


def _write(ax: Axes, shares: np.ndarray, counts: np.ndarray, what: str) -> None:
    """Write a number into each square that is not empty, light on dark ones."""
    size = 8 if shares.shape[1] <= 12 else 6.5
    for (row, column), share in np.ndenumerate(shares):
        count = int(counts[row, column])
        if count:
            percent = f"{100 * share:.0f}" if share >= 0.005 else "<1"
            colour = "white" if share > 0.55 else "#333333"
            text = percent if what == "percent" else f"{count:,}"
            ax.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
