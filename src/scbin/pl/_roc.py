"""`pl.roc`: how well each class is told from all others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scbin._errors import ScbinInputError
from scbin.get._predicted import read_predicted
from scbin.pl import _classes, _style

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

    from scbin.get._predicted import Cells


def roc(
    adata: AnnData,
    target: str,
    *,
    truth_key: str | None = None,
    cells: Cells = "auto",
    classes: Sequence[str] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the ROC curve of each class against all others, with the area under it in the legend.

    An area of 1 means that every cell of the class was given a higher probability of it than any other cell, .5 is what a guess
    reaches. The area says nothing about rare classes drowning among many others: see :func:`scbin.pl.confusion` for that.

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
    classes
        Which classes to draw. Default: all that some cells have and others have not.
    title
        Text above the axes. Default: the target, and the mean area.
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
    >>> scbin.pl.roc(adata, "cell_type").get_title()
    'cell_type: mean area 1.000'
    """
    found = _classes.of_classes(read_predicted(adata, target, truth_key=truth_key, cells=cells), probabilities=True)
    probability = np.asarray(found.probability)
    known = np.isfinite(probability).all(axis=1)
    truth, probability = found.truth[known], probability[known]
    present = np.unique(truth)
    if len(present) < 2:
        raise ScbinInputError(
            "E28",
            f"the cells compared have one {target!r} only: a ROC curve needs cells of a class and cells of others.",
        )
    chosen = present if classes is None else _places(found.classes, present, classes)
    ax = _classes.plain_axes(7.2 + 2.8 * ((len(chosen) - 1) // _style.LEGEND_ROWS), 4.2) if ax is None else ax
    ax.plot([0, 1], [0, 1], color=_style.QUIET_COLOUR, linewidth=0.8, linestyle=(0, (3, 3)))
    areas, lines, labels = [], [], []
    for place, colour in zip(chosen, _style.palette(len(chosen)), strict=True):
        area, line = _curve(ax, truth == place, probability[:, place], colour)
        areas.append(area)
        lines.append(line)
        count = f"({int((truth == place).sum()):,})"
        name = _style.shorten(found.classes[place], _style.LONGEST_LABEL - len(count) - 7)
        labels.append(f"{area:.3f} {name} {count}")
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), box_aspect=1)
    _style.frame(ax)
    _classes.axis_label(ax, x="share of other cells called it", y="share of its cells called it")
    _style.legend_beside(ax, lines, labels)
    _classes.title(ax, f"{target}: mean area {np.mean(areas):.3f}" if title is None else title)
    return ax


def _places(names: tuple[str, ...], present: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    known = {names[place]: place for place in present}
    for name in classes:
        if name not in known:
            listed = ", ".join(map(repr, list(known)[:20]))
            raise ScbinInputError("E29", f"no cell compared here has the class {name!r}. There are: {listed}.")
    return np.array([known[name] for name in classes], dtype=np.int64)


def _curve(ax: Axes, positive: np.ndarray, score: np.ndarray, colour: str) -> tuple[float, Line2D]:
    from sklearn.metrics import auc, roc_curve

    false, true, _ = roc_curve(positive, score)
    return float(auc(false, true)), ax.plot(false, true, color=colour, linewidth=1.4)[0]
