"""Plots of measured perturbations that were left out and predicted."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from scbin import _docs
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.get.measured import perturbations_df, read_entry
from scbin.pl import _style

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

METRICS = {
    "pearson": "correlation of changes",
    "pearson_top": "correlation on the most changed genes",
    "cosine_beyond_mean": "cosine of what is beyond the mean",
    "retrieval": "retrieval (1: nearest to itself)",
    "sign_agreement": "agreement of signs",
    "relative_mse": "squared error relative to no change",
}


@_docs.shared
@checked
def perturbation_response(
    adata: AnnData, perturbation: str, *, n_genes: int = 10, title: str | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the change of every gene after a perturbation, measured against predicted without it.

    Parameters
    ----------
    adata
        The screen after :func:`scbin.tl.evaluate_perturbations`.
    perturbation
        Its name in the table: `"A"`, or `"A+B"`.
    n_genes
        How many of the most changed genes to name.
    {title}
    {ax}

    Returns
    -------
    The axes.

    Raises
    ------
    ScbinInputError
        If the screen was not evaluated, or this perturbation not predicted.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.perturbseq(n_perturbations=10, n_cells=800, n_genes=100)
    >>> scbin.tl.fit_perturbations(adata, batch_key="batch")
    >>> scbin.tl.evaluate_perturbations(adata)
    >>> scbin.pl.perturbation_response(adata, "GENE1").get_ylabel()
    'predicted change, left out'
    """
    entry = read_entry(adata, "evaluated")
    names = [str(name) for name in entry["names"]]
    row = names.index(perturbation) if perturbation in names else -1
    if row < 0 or not np.isfinite(entry["predicted"][row]).all():
        raise ScbinInputError("A06", f"{perturbation!r} was not predicted. Available: {', '.join(names[:8])}.")
    x, y = (np.asarray(entry[key][row], dtype=float) for key in ("observed", "predicted"))
    genes = np.asarray(entry["genes"], dtype=object)
    own = np.isin(genes, perturbation.split("+"))
    ax = _style.new_axes(4.6, 4.2) if ax is None else ax
    ax.axline((0, 0), slope=1, color=_style.QUIET, linewidth=0.7, linestyle=(0, (4, 3)))
    ax.scatter(x[~own], y[~own], s=9, color=_style.MAIN, linewidths=0, alpha=0.6)
    scores = entry["table"].set_index(["perturbation", "method"]).loc[(perturbation, "scbin")]
    note = f"r {scores['pearson']:.2f}, ceiling {scores['ceiling']:.2f}"
    ax.text(0.02, 0.98, note, transform=ax.transAxes, va="top", fontsize=8, color=_style.QUIET)
    ax.set(xlabel="measured change of log1p expression", ylabel="predicted change, left out")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title or perturbation, loc="left", parse_math=False)
    ax.margins(0.12)
    _style.write_names(ax, genes.tolist(), x, y, np.argsort(-np.abs(np.where(own, 0, x)), kind="stable")[:n_genes])
    return ax


@_docs.shared
@checked
def perturbation_scores(
    adata: AnnData, *, metric: str = "pearson", title: str | None = None, ax: Axes | None = None
) -> Axes:
    """Draw how well each method predicts perturbations that it has not seen, one dot per reproducible perturbation.

    Parameters
    ----------
    adata
        The screen after :func:`scbin.tl.evaluate_perturbations`.
    metric
        A score in its table: `"pearson"`, `"pearson_top"`, `"cosine_beyond_mean"`, `"retrieval"`, `"sign_agreement"` or
        `"relative_mse"`. For `"pearson"` the dashed line is the ceiling that the noise of the measurement sets.
    {title}
    {ax}

    Returns
    -------
    The axes.

    Raises
    ------
    ScbinInputError
        If the screen was not evaluated, or nothing in it is reproducible.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.perturbseq(n_perturbations=10, n_cells=800, n_genes=100)
    >>> scbin.tl.fit_perturbations(adata, batch_key="batch")
    >>> scbin.tl.evaluate_perturbations(adata)
    >>> scbin.pl.perturbation_scores(adata).get_xlabel()
    'correlation of changes'
    """
    table = _reproducible(adata, metric)
    order = list(table.groupby("method", sort=False)[metric].mean().sort_values(kind="stable").index)
    order = order if metric != "relative_mse" else order[::-1]
    ax = _style.new_axes(6.0, 1.2 + 0.32 * len(order)) if ax is None else ax
    for row, method in enumerate(order):
        values = table.loc[table["method"] == method, metric].to_numpy(dtype=float)
        colour = _style.SECOND if method == "scbin" else _style.MAIN
        height = row + np.random.default_rng(row).uniform(-0.15, 0.15, len(values))
        ax.scatter(values, height, s=10, color=colour, linewidths=0, alpha=0.5)
        ax.plot([np.nanmean(values)] * 2, [row - 0.3, row + 0.3], color=colour, linewidth=2)
    if metric == "pearson":
        ceiling = float(table.drop_duplicates("perturbation")["ceiling"].mean())
        ax.axvline(ceiling, color=_style.QUIET, linewidth=0.8, linestyle=(0, (4, 3)))
        place: dict[str, Any] = {"transform": ax.get_xaxis_transform(), "ha": "right", "va": "bottom"}
        ax.text(ceiling, 1.0, "ceiling", fontsize=7.5, color=_style.QUIET, **place)
    ax.set(yticks=range(len(order)), yticklabels=order, xlabel=METRICS[metric])
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(_counted(adata) if title is None else title, loc="left", fontsize=9)
    return ax


@_docs.shared
@checked
def perturbation_retrieval(adata: AnnData, *, title: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw how often a prediction resembles its own perturbation more than others: a curve per method, the diagonal is chance.

    Parameters
    ----------
    adata
        The screen after :func:`scbin.tl.evaluate_perturbations`.
    {title}
    {ax}

    Returns
    -------
    The axes.

    Raises
    ------
    ScbinInputError
        If the screen was not evaluated, or nothing in it is reproducible.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.perturbseq(n_perturbations=10, n_cells=800, n_genes=100)
    >>> scbin.tl.fit_perturbations(adata, batch_key="batch")
    >>> scbin.tl.evaluate_perturbations(adata)
    >>> scbin.pl.perturbation_retrieval(adata).get_xlabel()
    'fraction of other perturbations closer to the prediction'
    """
    table = _reproducible(adata, "retrieval")
    methods = [name for name in dict.fromkeys(table["method"]) if name != "no change"]
    ax = _style.new_axes(5.6, 3.6) if ax is None else ax
    ax.axline((0, 0), slope=1, color=_style.QUIET, linewidth=0.7, linestyle=(0, (4, 3)))
    lines = []
    for method, colour in zip(methods, _style.palette(len(methods)), strict=True):
        rank = np.sort(1 - table.loc[table["method"] == method, "retrieval"].dropna().to_numpy(dtype=float))
        x, y = np.r_[0, rank, 1], np.r_[0, np.arange(1, len(rank) + 1) / len(rank), 1]
        lines += ax.step(x, y, where="post", color=colour, linewidth=2.4 if method == "scbin" else 1.2)
    _style.legend_beside(ax, lines, methods)
    ax.set(xlabel="fraction of other perturbations closer to the prediction")
    ax.set(ylabel="cumulative fraction of perturbations")
    ax.set(xlim=(0, 1), ylim=(0, 1.02))
    ax.set_title(_counted(adata) if title is None else title, loc="left", fontsize=9)
    return ax


def _reproducible(adata: AnnData, metric: str) -> pd.DataFrame:
    """Return the scores of reproducible perturbations."""
    if metric not in METRICS:
        raise ScbinInputError("A02", f"metric is {metric!r}; choose one of {', '.join(map(repr, METRICS))}.")
    table = perturbations_df(adata, "evaluated", reproducible=True)
    if table.empty:
        raise ScbinInputError("P02", "no perturbation is reproducible, so there is nothing to draw. See the verdict.")
    return table


def _counted(adata: AnnData) -> str:
    facts = json.loads(str(read_entry(adata, "evaluated")["params"]))
    return f"{facts['n_reproducible']} reproducible of {facts['n_perturbations']} perturbations, each left out"
