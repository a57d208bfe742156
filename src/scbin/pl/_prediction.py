"""Plots of predictions: confusion matrix, ROC curves, calibration, and the probabilities of every cell."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scbin import _docs
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.get.predictions import Cells, read_predicted
from scbin.pl import _style

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes

    from scbin.get.predictions import Predicted

NO_CLASS = "no prediction"
_MOST_WRITTEN, _COPIES, _HIST = 26, 24, 0.24  # columns with numbers; copies of a column; height of the counts


@_docs.shared
@checked
def confusion(
    adata: AnnData,
    target: str,
    *,
    truth_key: str | None = None,
    cells: Cells = "auto",
    normalize: Literal["true"] | None = "true",
    cmap: str = "Blues",
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot the confusion matrix: how the cells of each class were classified.

    Each row is a true class, with its number of cells; its squares say which fraction of them was given which class. A rare class
    that is never predicted has a light diagonal square, which the accuracy over all cells would not show. Drawn by
    :class:`sklearn.metrics.ConfusionMatrixDisplay`.

    Parameters
    ----------
    {predictions}
    normalize
        `"true"`: fractions of each row; `None`: numbers of cells.
    {cmap}
    {title}
    {ax}

    Returns
    -------
    The axes.

    Examples
    --------
    >>> import anndata, numpy, pandas, scbin
    >>> obs = pandas.DataFrame({"cell_type": list("AABB"), "scbin_cell_type": pandas.Categorical(list("AABA"))})
    >>> adata = anndata.AnnData(numpy.ones((4, 2)), obs=obs.set_axis(list("wxyz")))
    >>> [text.get_text() for text in scbin.pl.confusion(adata, "cell_type").get_yticklabels()]
    ['A (n=2)', 'B (n=2)']
    """
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    found = read_predicted(adata, target, truth_key=truth_key, cells=cells)
    if found.kind != "class":
        raise ScbinInputError("A03", f"{target!r} is a number, not a class: scbin.pl.prediction plots it.")
    given = np.where(found.predicted < 0, len(found.classes), found.predicted)
    used = np.union1d(found.truth, given)
    names = [[*found.classes, NO_CLASS][k] for k in used]
    ax = _grid_axes(len(used), names) if ax is None else ax
    ConfusionMatrixDisplay(confusion_matrix(found.truth, given, labels=used, normalize=normalize)).plot(
        ax=ax, cmap=cmap, colorbar=False, include_values=len(used) <= _MOST_WRITTEN,
        values_format=".2f" if normalize else ",d", im_kw={"vmin": 0}, text_kw={"fontsize": 8},
    )  # fmt: skip
    _name_classes(ax, names, names, [int((found.truth == k).sum()) for k in used], np.arange(len(used)))
    text = f"{target}: accuracy {np.mean(found.predicted == found.truth):.3f}, {len(found.truth):,} cells"
    return _labelled(ax, "Predicted label", "True label", text if title is None else title)


@_docs.shared
@checked
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
    """Plot the ROC curve of each class against all others, with the area under it in the legend.

    An area of 1 means that every cell of the class was given a higher probability of it than any other cell; .5 is what a random
    guess reaches. Drawn by :class:`sklearn.metrics.RocCurveDisplay`.

    Parameters
    ----------
    {predictions}
    classes
        Which classes to draw. Default: all that some cells have and others have not.
    {title}
    {ax}

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
    'cell_type: macro-average AUC 1.000'
    """
    from sklearn.metrics import RocCurveDisplay

    found, probability = _probabilities(read_predicted(adata, target, truth_key=truth_key, cells=cells))
    known = {found.classes[k]: int(k) for k in np.unique(found.truth)}
    chosen = list(known) if classes is None else list(classes)
    if len(known) < 2 or not set(chosen) <= set(known):
        there, code = ", ".join(map(repr, list(known)[:20])), "L01" if len(known) < 2 else "A06"
        raise ScbinInputError(code, f"a ROC curve is of one class against others; the cells compared have: {there}.")
    ax = _style.new_axes(7.2, 4.2) if ax is None else ax
    areas, lines, labels = [], [], []
    for name, colour in zip(chosen, _style.palette(len(chosen)), strict=True):
        positive, style = found.truth == known[name], {"color": colour, "linewidth": 1.4}
        display = RocCurveDisplay.from_predictions(positive, probability[:, known[name]], ax=ax, curve_kwargs=style)
        areas.append(float(display.roc_auc))
        lines.append(display.line_)
        labels.append(f"{areas[-1]:.3f} {_style.shorten(name, 20)} (n={int(positive.sum()):,})")
    ax.plot([0, 1], [0, 1], color=_style.QUIET, linewidth=0.8, linestyle="--")
    ax.set(box_aspect=1)
    _style.legend_beside(ax, lines, labels)
    text = f"{target}: macro-average AUC {np.mean(areas):.3f}"
    return _labelled(ax, "False positive rate", "True positive rate", text if title is None else title)


@_docs.shared
@checked
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
    """Plot the calibration curve: how often predictions were right against how probable the model called them.

    Cells are binned by the probability of the class they were given. On the diagonal probabilities are right; below it the model
    is overconfident, above it underconfident. The bars say how many cells a dot stands for. Drawn by
    :class:`sklearn.calibration.CalibrationDisplay`.

    Parameters
    ----------
    {predictions}
    n_bins
        Number of bins between 0 and 1.
    {title}
    {ax}

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
    'Mean predicted probability'
    """
    from sklearn.calibration import CalibrationDisplay

    if n_bins < 1:
        raise ScbinInputError("A02", f"n_bins is {n_bins}; it needs to be at least 1.")
    found, probability = _probabilities(read_predicted(adata, target, truth_key=truth_key, cells=cells))
    confidence, right = probability.max(axis=1).clip(0, 1), probability.argmax(axis=1) == found.truth
    ax = _style.new_axes(4.6, 4.4) if ax is None else ax
    counts, edges = np.histogram(confidence, np.linspace(0, 1, n_bins + 1))
    heights = _HIST * counts / counts.max()
    ax.bar(edges[:-1], heights, width=1 / n_bins, align="edge", color="#e4e4e4", edgecolor="white")
    CalibrationDisplay.from_predictions(right, confidence, n_bins=n_bins, ax=ax, color=_style.MAIN, pos_label=True)
    ax.legend().remove()
    gaps = np.histogram(confidence, edges, weights=right - confidence)[0]
    ax.set(xlim=(0, 1), ylim=(0, 1.02))
    text = f"{target}: calibration error {np.abs(gaps).sum() / len(right):.3f}" if title is None else title
    return _labelled(ax, "Mean predicted probability", "Fraction of correct predictions", text)


@_docs.shared
@checked
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
    """Plot the probability of every class for every cell; for a number, the predictions against the truth.

    One row per cell and one column per class. The cells are ordered by true class, within it by predicted class and by
    probability: blocks on the diagonal are right, stripes beside them are confusions. Where there is no truth, cells are ordered by
    predicted class, and numbers are drawn as a histogram.

    Parameters
    ----------
    {predictions}
    {cmap}
    {title}
    {ax}

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
    'Cells by true class'
    """
    found = read_predicted(adata, target, truth_key=truth_key, cells=cells, need_truth=False)
    if found.kind == "number":
        return _numbers(found, title, ax)
    _, probability = _probabilities(found, of_all=True)
    order = order_cells(found)
    likely = np.flatnonzero(np.nan_to_num(probability).max(axis=0, initial=0.0) >= 0.05)
    columns, truth = (
        np.union1d(np.union1d(found.truth, likely), found.predicted[found.predicted >= 0]),
        found.truth[order],
    )
    names = [found.classes[k] for k in columns]
    ax = _grid_axes(max(len(np.unique(truth)), 10), names) if ax is None else ax
    # each column several times: thousands of rows are averaged where they share a pixel, columns stay sharp
    shown = np.repeat(np.ma.masked_invalid(probability[order][:, columns]), _COPIES, axis=1)
    extent = (-0.5, len(columns) - 0.5, len(order) - 0.5, -0.5)
    image = ax.imshow(shown, cmap=cmap, vmin=0, vmax=1, aspect="auto", extent=extent)
    ax.set_facecolor(_style.MISSING)  # shows where a cell has no probabilities
    rows, starts, counts = np.unique(truth, return_index=True, return_counts=True)
    ax.hlines(starts[1:] - 0.5, *extent[:2], color=_style.QUIET, linewidth=0.6)
    middle = starts + (counts - 1) / 2
    at = _spread(middle, len(order) / (1.8 * max(len(rows), 10)), len(order))
    _name_classes(ax, names, [found.classes[k] for k in rows], counts, at)
    ax.tick_params(axis="y", length=0, pad=10)
    across = np.tile([[-0.015], [0.0]], len(at))
    style: dict[str, Any] = {"color": _style.QUIET, "linewidth": 0.6, "clip_on": False}
    ax.plot(across, np.array([at, middle]), transform=ax.get_yaxis_transform(), scalex=False, scaley=False, **style)
    ax.figure.colorbar(image, ax=ax, label="Probability", shrink=0.6)
    by = "true" if found.has_truth else "predicted"
    return _labelled(ax, "Class", f"Cells by {by} class", target if title is None else title)


def order_cells(found: Predicted) -> np.ndarray:
    """Order cells by true class, then right ones first, then by predicted class and falling probability."""
    best = np.nan_to_num(np.asarray(found.probability)).max(axis=1)
    return np.lexsort((-best, found.predicted, found.predicted != found.truth, found.truth))


def _numbers(found: Predicted, title: str | None, ax: Axes | None) -> Axes:
    """Plot numbers against the truth, or their histogram where there is none."""
    from sklearn.metrics import PredictionErrorDisplay, mean_absolute_error, r2_score

    known = np.isfinite(found.predicted)
    truth, predicted, text = found.truth[known], found.predicted[known], found.target
    ax = _style.new_axes(4.6, 4.4) if ax is None else ax
    if not found.has_truth:
        ax.hist(predicted, bins=int(np.clip(np.sqrt(len(predicted)), 5, 60)), color=_style.MAIN)
    elif len(truth) > 1:
        style: dict[str, Any] = {"alpha": 0.5, "linewidths": 0, "rasterized": True, "color": _style.MAIN}
        display = PredictionErrorDisplay(y_true=truth, y_pred=predicted)
        display.plot(ax, kind="actual_vs_predicted", scatter_kwargs=style)  # the predictions are along the x axis
        error, fit = mean_absolute_error(truth, predicted), r2_score(truth, predicted)
        text = f"{text}: mean absolute error {error:.3g}, R² {fit:.2f}"
    y = f"True {found.target}" if found.has_truth else "Cells"
    return _labelled(ax, f"Predicted {found.target}", y, text if title is None else title)


# ---- what can be drawn, and axes ------------------------------------------------------------------------------------


def _probabilities(found: Predicted, *, of_all: bool = False) -> tuple[Predicted, np.ndarray]:
    """Return the predictions, and the probabilities, of the cells that have some (or of all)."""
    if found.kind == "number" or found.probability is None:
        what = "is a number, which scbin.pl.prediction plots" if found.kind == "number" else "has none in adata.obsm"
        code = "A03" if found.kind == "number" else "A06"
        raise ScbinInputError(code, f"this needs probabilities of classes; {found.target!r} {what}.")
    known = np.isfinite(found.probability).all(axis=1)
    if not known.any():
        raise ScbinInputError("L01", f"no cell compared has probabilities of {found.target!r}.")
    known |= of_all
    arrays = {name: getattr(found, name)[known] for name in ("cells", "truth", "predicted", "probability")}
    return replace(found, **arrays), arrays["probability"]


def _grid_axes(n_rows: int, names: Sequence[str]) -> Axes:
    """Return new axes for a grid of classes, with room for their names, and not larger than a screen."""
    longest = max(len(_style.shorten(name)) for name in names)
    width = float(np.clip(0.36 * len(names), 3.2, 9.5)) + 0.07 * longest + 1.2
    return _style.new_axes(width, float(np.clip(0.36 * n_rows, 2.4, 9.5)) + 0.05 * min(longest, 24) + 0.9)


def _name_classes(ax: Axes, columns: Sequence[str], rows: Sequence[str], counts: Any, at: np.ndarray) -> None:
    """Write the classes below the columns, and beside the rows with their numbers of cells; `$` is a letter like others."""
    below = [_style.shorten(name, 24) for name in columns]
    beside = [f"{_style.shorten(name)} (n={count:,})" for name, count in zip(rows, counts, strict=True)]
    ax.set_xticks(range(len(columns)), below, parse_math=False, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(at, beside, parse_math=False)


def _spread(at: np.ndarray, gap: float, length: int) -> np.ndarray:
    """Move rising places apart until they are a gap from each other, within the length of the axis.

    Examples
    --------
    >>> _spread(np.array([1.0, 1.5, 9.0]), 2, 10).tolist()
    [1.0, 3.0, 9.0]
    """
    steps = gap * np.arange(len(at))
    down = np.maximum.accumulate(at - steps) + steps
    return np.minimum.accumulate((np.minimum(down, length - 1) - steps)[::-1])[::-1] + steps


def _labelled(ax: Axes, x: str, y: str, title: str) -> Axes:
    """Name the axes and write the title; `$` is a letter like others."""
    ax.set_xlabel(x, parse_math=False)
    ax.set_ylabel(y, parse_math=False)
    ax.set_title(_style.shorten(title, 64), parse_math=False)
    return ax
