"""Plots of predictions: confusion matrix, ROC curves, calibration, and the probabilities of every cell."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from scbin import _docs
from scbin._errors import ScbinInputError
from scbin.get import Cells, read_predicted, recorded, truth_of
from scbin.pl import _style

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes

NO_CLASS, N_BINS = "no prediction", 10


@_docs.shared
def confusion(
    adata: AnnData, target: str, *, truth_key: str | None = None, cells: Cells = "auto", ax: Axes | None = None
) -> Axes:
    """Plot the confusion matrix, with the fraction of each true class that was given each label.

    Each row is a true class, with its number of cells. A rare class that is never predicted has a light square on the diagonal, which
    the overall accuracy does not show. Drawn by :class:`sklearn.metrics.ConfusionMatrixDisplay`.

    Parameters
    ----------
    {predictions}
    {axes}

    Examples
    --------
    >>> import anndata, numpy, pandas, scbin
    >>> obs = pandas.DataFrame({"cell_type": list("AABB"), "scbin_cell_type": pandas.Categorical(list("AABA"))})
    >>> adata = anndata.AnnData(numpy.ones((4, 2)), obs=obs.set_axis(list("wxyz")))
    >>> [text.get_text() for text in scbin.pl.confusion(adata, "cell_type").get_yticklabels()]
    ['A (n=2)', 'B (n=2)']
    """
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    found = _read(adata, target, truth_key, cells, probable=False)
    names = [*found.classes, NO_CLASS]
    given = found.predicted % len(names)  # -1 is the last of them
    used = np.union1d(found.truth, given)
    matrix = confusion_matrix(found.truth, given, labels=used, normalize="true")
    ax = _grid(ax, len(used), len(used))
    style: dict[str, Any] = {"cmap": "Blues", "colorbar": False, "values_format": ".2f", "text_kw": {"fontsize": 8}}
    ConfusionMatrixDisplay(matrix).plot(ax=ax, include_values=len(used) <= 26, im_kw={"vmin": 0}, **style)
    _name_classes(ax, names, used, used, [(found.truth == k).sum() for k in used])
    ax.set(title=f"{target}: accuracy {np.mean(given == found.truth):.3f}, {len(given):,} cells")
    return ax


@_docs.shared
def roc(
    adata: AnnData, target: str, *, truth_key: str | None = None, cells: Cells = "auto", ax: Axes | None = None
) -> Axes:
    """Plot the ROC curve of each class against all others, with the area under it in the legend.

    An area of 1 means that every cell of the class has a higher probability of it than every other cell; random guesses reach .5.
    Drawn by :class:`sklearn.metrics.RocCurveDisplay`.

    Parameters
    ----------
    {predictions}
    {axes}

    Examples
    --------
    >>> import anndata, numpy, pandas, scbin
    >>> obs = pandas.DataFrame({"cell_type": list("AABB"), "scbin_cell_type": pandas.Categorical(list("AABA"))})
    >>> adata = anndata.AnnData(numpy.ones((4, 2)), obs=obs.set_axis(list("wxyz")))
    >>> adata.obsm["scbin_cell_type_probability"] = numpy.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    >>> scbin.pl.roc(adata, "cell_type").get_title()
    'cell_type: macro-average AUC 1.000, 4 cells'
    """
    from sklearn.metrics import RocCurveDisplay

    found = _read(adata, target, truth_key, cells)
    classes, counts = np.unique(found.truth, return_counts=True)
    if len(classes) < 2:
        raise ScbinInputError("L01", f"a ROC curve is of one class against others; all cells are of one {target!r}.")
    ax = _style.new_axes(7.2, 4.2) if ax is None else ax
    areas, labels = [], []
    colours = _style.colours(adata, truth_key or target, found.classes)
    for k, n in zip(classes, counts, strict=True):
        style, values = {"color": colours[found.classes[k]]}, found.probability[:, k]
        display = RocCurveDisplay.from_predictions(found.truth == k, values, ax=ax, curve_kwargs=style)
        areas.append(float(display.roc_auc))
        labels.append(f"{areas[-1]:.3f} {_style.shorten(found.classes[k], 20)} (n={n:,})")
    _style.legend_beside(ax, ax.lines, labels)
    ax.plot([0, 1], [0, 1], color=_style.QUIET, linewidth=0.8, linestyle="--")
    ax.set(xlabel="False positive rate", ylabel="True positive rate", box_aspect=1)
    ax.set(title=f"{target}: macro-average AUC {np.mean(areas):.3f}, {len(found.truth):,} cells")
    return ax


@_docs.shared
def calibration(
    adata: AnnData, target: str, *, truth_key: str | None = None, cells: Cells = "auto", ax: Axes | None = None
) -> Axes:
    """Plot the calibration curve, the fraction of correct predictions against their probability.

    Cells are binned by the probability of their predicted class. On the diagonal the model is calibrated, below it overconfident, and
    above it underconfident. The bars show the number of cells in each bin. Drawn by
    :class:`sklearn.calibration.CalibrationDisplay`.

    Parameters
    ----------
    {predictions}
    {axes}

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

    found = _read(adata, target, truth_key, cells)
    confidence, right = found.probability.max(axis=1).clip(0, 1), found.probability.argmax(axis=1) == found.truth
    ax = _style.new_axes(4.6, 4.4) if ax is None else ax
    counts, edges = np.histogram(confidence, N_BINS, range=(0, 1))
    ax.bar(edges[:-1], 0.24 * counts / counts.max(), width=1 / N_BINS, align="edge", color="#e4e4e4", edgecolor="white")
    CalibrationDisplay.from_predictions(right, confidence, n_bins=N_BINS, ax=ax, color=_style.MAIN, pos_label=True)
    ax.legend().remove()
    gaps = np.histogram(confidence, edges, weights=right - confidence)[0]
    ax.set(xlabel="Mean predicted probability", ylabel="Fraction of correct predictions", xlim=(0, 1), ylim=(0, 1.02))
    ax.set(title=f"{target}: calibration error {np.abs(gaps).sum() / len(right):.3f}, {len(right):,} cells")
    return ax


@_docs.shared
def prediction(
    adata: AnnData, target: str, *, truth_key: str | None = None, cells: Cells = "auto", ax: Axes | None = None
) -> Axes:
    """Plot the probability of every class for every cell.

    One band per true class, with a line per cell, correct ones first: dark squares on the diagonal are correct, stripes elsewhere are
    confusions. If there are no true labels, the bands are predicted classes.

    Parameters
    ----------
    {predictions}
    {axes}

    Examples
    --------
    >>> import anndata, numpy, pandas, scbin
    >>> obs = pandas.DataFrame({"cell_type": list("AABB"), "scbin_cell_type": pandas.Categorical(list("AABA"))})
    >>> adata = anndata.AnnData(numpy.ones((4, 2)), obs=obs.set_axis(list("wxyz")))
    >>> adata.obsm["scbin_cell_type_probability"] = numpy.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    >>> scbin.pl.prediction(adata, "cell_type").get_ylabel()
    'Cells by cell_type'
    """
    record = recorded(adata, target)
    truth = truth_of(adata, target, record)
    key = truth_key or (truth if truth in adata.obs else record.column)
    found = _read(adata, target, key, cells)
    truth, predicted, probability = found.truth, found.predicted, found.probability
    likely = np.flatnonzero(probability.max(axis=0) >= 0.05)
    columns = np.union1d(np.union1d(truth, likely), predicted[predicted >= 0])
    rows, counts = np.unique(truth, return_counts=True)
    ax = _grid(ax, len(columns), len(rows))
    order = np.lexsort((-probability.max(axis=1), predicted, predicted != truth))
    style: dict[str, Any] = {"cmap": "Blues", "vmin": 0, "vmax": 1, "aspect": "auto"}
    for i, k in enumerate(rows):
        # each column several times: lines that share a pixel are averaged, columns stay sharp
        band = np.repeat(probability[order[truth[order] == k]][:, columns], 24, axis=1)
        image = ax.imshow(band, extent=(-0.5, len(columns) - 0.5, i + 0.5, i - 0.5), **style)
        ax.axhline(i + 0.5, color=_style.QUIET, linewidth=0.6)
    _name_classes(ax, found.classes, columns, rows, counts)
    ax.figure.colorbar(image, ax=ax, label="Probability", shrink=0.6)
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlabel="Class", ylabel=f"Cells by {key}")
    ax.set(title=f"{target}, {len(truth):,} cells")
    return ax


def _read(adata: AnnData, target: str, truth_key: str | None, cells: Cells, *, probable: bool = True) -> Any:
    """Return predicted classes; where they are to be `probable`, of the cells that have probabilities."""
    found = read_predicted(adata, target, truth_key=truth_key, cells=cells)
    if found.kind == "number":
        fix = f"sc.pl.scatter(adata, 'scbin_{target}', {truth_key or target!r}) draws it"
        raise ScbinInputError("A03", f"{target!r} is a number, this plot is of classes; {fix}.")
    if not probable:
        return found
    known = np.isfinite(np.zeros((1, 0)) if found.probability is None else found.probability).any(axis=1)
    if not known.any():
        raise ScbinInputError("A06", f"adata.obsm has no probabilities of {target!r}. Call scbin.tl.predict.")
    return replace(found, **{name: getattr(found, name)[known] for name in ("truth", "predicted", "probability")})


def _grid(ax: Axes | None, n_columns: int, n_rows: int) -> Axes:
    """Return axes for a grid of classes, with room for their names, and not larger than a screen."""
    width, height = (float(np.clip(0.36 * n, 3, 9.5)) for n in (n_columns, n_rows))
    return _style.new_axes(width + 3.6, height + 2.0) if ax is None else ax


def _name_classes(ax: Axes, names: Sequence[str], columns: np.ndarray, rows: np.ndarray, counts: Any) -> None:
    """Write the classes below the columns, and beside the rows with their numbers of cells."""
    below = [_style.shorten(names[k], 24) for k in columns]
    ax.set_xticks(range(len(columns)), below, rotation=45, ha="right", rotation_mode="anchor")
    beside = [f"{_style.shorten(names[k])} (n={n:,})" for k, n in zip(rows, counts, strict=True)]
    ax.set_yticks(range(len(rows)), beside)
