"""`pl.calibration`: whether a probability of .9 is right nine times in ten."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scbin._errors import ScbinInputError
from scbin.get._predicted import read_predicted
from scbin.get._reliability import reliability
from scbin.pl import _classes, _style

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

    from scbin.get._predicted import Cells

HEIGHT = 0.24  # of the counts below the curve


def calibration(
    adata: AnnData,
    target: str,
    *,
    truth_key: str | None = None,
    cells: Cells = "auto",
    n_bins: int = 10,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw how often predictions were right against how sure they were.

    Cells are put into bins by the probability of the class they were given. On the diagonal, what is promised comes true;
    below it the model is too sure, above it too modest. The bars say how many cells each dot stands for: a dot of few cells
    proves little.

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
    n_bins
        Number of bins between 0 and 1.
    title
        Text above the axes. Default: the target, and the expected calibration error in these bins.
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
    >>> scbin.pl.calibration(adata, "cell_type").get_xlabel()
    'probability of the class given'
    """
    if n_bins < 1:
        raise ScbinInputError("E30", f"n_bins is {n_bins}; it needs to be at least 1.")
    found = _classes.of_classes(read_predicted(adata, target, truth_key=truth_key, cells=cells), probabilities=True)
    probability = np.asarray(found.probability)
    known = np.isfinite(probability).all(axis=1)
    if not known.any():
        raise ScbinInputError("E26", f"no cell compared has probabilities of {target!r}.")
    right = probability[known].argmax(axis=1) == found.truth[known]
    bins = reliability(probability[known].max(axis=1), right, n_bins=n_bins)
    ax = _classes.plain_axes(4.6, 4.4) if ax is None else ax
    middle = bins.left + 0.5 / n_bins
    heights = HEIGHT * bins.count / bins.count.max()
    ax.bar(middle, heights, width=0.92 / n_bins, color="#e4e4e4", linewidth=0, zorder=1)
    for x, height, count in zip(middle, heights, bins.count, strict=True):
        ax.text(x, height + 0.012, f"{count:,}", ha="center", va="bottom", fontsize=6.5, color=_style.QUIET_COLOUR)
    ax.plot([0, 1], [0, 1], color=_style.QUIET_COLOUR, linewidth=0.8, linestyle=(0, (3, 3)), zorder=2)
    ax.vlines(bins.confidence, bins.confidence, bins.accuracy, color=_style.SECOND_COLOUR, linewidth=1.2, zorder=2)
    ax.plot(bins.confidence, bins.accuracy, color=_style.MAIN_COLOUR, linewidth=1.6, marker="o", markersize=5, zorder=3)
    ax.set(xlim=(0, 1), ylim=(0, 1.02))
    _style.frame(ax)
    _classes.axis_label(ax, x="probability of the class given", y="share that was right")
    _classes.title(ax, f"{target}: calibration error {bins.error:.3f}" if title is None else title)
    return ax
