"""Plots of measured perturbations that were left out and predicted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scbin import _docs
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.get import perturbations_df, read_entry
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
def perturbation_response(adata: AnnData, perturbation: str, *, n_genes: int = 10, ax: Axes | None = None) -> Axes:
    """Draw the change of every gene after a perturbation, measured against predicted without it.

    Parameters
    ----------
    adata
        The screen after :func:`scbin.tl.evaluate_perturbations`.
    perturbation
        Its name in the table: `"A"`, or `"A+B"`.
    n_genes
        How many of the most changed genes to name.
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
    rows = np.flatnonzero(np.asarray(entry["names"]) == perturbation)
    if not len(rows) or not np.isfinite(entry["predicted"][rows[0]]).all():
        raise ScbinInputError("A06", f"{perturbation!r} was not predicted. Available: {list(entry['names'][:8])}.")
    x, y = (np.asarray(entry[key][rows[0]], dtype=float) for key in ("observed", "predicted"))
    genes = np.asarray(entry["genes"], dtype=object)
    own = np.isin(genes, perturbation.split("+"))
    ax = _diagonal(ax, 4.6, 4.2)
    ax.scatter(x[~own], y[~own], s=9, color=_style.MAIN, linewidths=0, alpha=0.6)
    scores = entry["table"].set_index(["perturbation", "method"]).loc[(perturbation, "scbin")]
    note = f"r {scores['pearson']:.2f}, ceiling {scores['ceiling']:.2f}"
    ax.text(0.02, 0.98, note, transform=ax.transAxes, va="top", fontsize=8, color=_style.QUIET)
    ax.set(xlabel="measured change of log1p expression", ylabel="predicted change, left out")
    ax.set_title(perturbation, loc="left", parse_math=False)
    ax.margins(0.12)
    _style.write_names(ax, genes.tolist(), x, y, np.argsort(-np.abs(np.where(own, 0, x)), kind="stable")[:n_genes])
    return ax


@_docs.shared
@checked
def perturbation_scores(adata: AnnData, *, metric: str = "pearson", ax: Axes | None = None) -> Axes:
    """Draw how well each method predicts perturbations that it has not seen, one dot per reproducible perturbation.

    Pairs and their methods have a part of their own, below that of single genes.

    Parameters
    ----------
    adata
        The screen after :func:`scbin.tl.evaluate_perturbations`.
    metric
        A score in its table: `"pearson"`, `"pearson_top"`, `"cosine_beyond_mean"`, `"retrieval"`, `"sign_agreement"` or
        `"relative_mse"`. For `"pearson"` the dashed line is the ceiling that the noise of the measurement sets.
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
    rows: list[tuple[int, str]] = []  # targets and method, from below: pairs, then single genes
    for kind in (2, 1):
        means = table[table["n_targets"] == kind].groupby("method", sort=False)[metric].mean().dropna()
        rows += [(kind, name) for name in means.sort_values(ascending=metric != "relative_mse", kind="stable").index]
    ax = _style.new_axes(6.0, 1.2 + 0.32 * len(rows)) if ax is None else ax
    for row, (kind, method) in enumerate(rows):
        mine = (table["method"] == method) & (table["n_targets"] == kind)
        values = table.loc[mine, metric].dropna().to_numpy(dtype=float)
        colour = _style.SECOND if method == "scbin" else _style.MAIN
        height = row + np.random.default_rng(row).uniform(-0.15, 0.15, len(values))
        ax.scatter(values, height, s=10, color=colour, linewidths=0, alpha=0.5)
        ax.vlines(values.mean(), row - 0.3, row + 0.3, color=colour, linewidth=2)
    pairs = sum(kind == 2 for kind, _ in rows)
    parts = [part for part in ((2, 0, pairs), (1, pairs, len(rows))) if part[1] < part[2]]
    for kind, low, high in parts:
        if metric == "pearson":
            ceiling = float(table[table["n_targets"] == kind].drop_duplicates("perturbation")["ceiling"].mean())
            ax.vlines(ceiling, low - 0.5, high - 0.5, color=_style.QUIET, linewidth=0.8, linestyle=(0, (4, 3)))
            ax.annotate("ceiling", (ceiling, high - 0.5), fontsize=7.5, color=_style.QUIET, ha="right", va="top")
        if len(parts) > 1:
            place: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "rotation": 270, "va": "center"}
            ax.text(1.01, (low + high - 1) / 2, ["single genes", "pairs"][kind - 1], fontsize=8, **place)
    if len(parts) > 1:
        ax.axhline(pairs - 0.5, color=_style.QUIET, linewidth=0.7)
    order = [name for _, name in rows]
    ax.set(yticks=range(len(order)), yticklabels=order, xlabel=METRICS[metric])
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(_counted(adata), loc="left", fontsize=9)
    return ax


@_docs.shared
@checked
def perturbation_retrieval(adata: AnnData, *, ax: Axes | None = None) -> Axes:
    """Draw how often a prediction resembles its own perturbation more than others: a curve per method, the diagonal is chance.

    Parameters
    ----------
    adata
        The screen after :func:`scbin.tl.evaluate_perturbations`.
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
    ax = _diagonal(ax, 5.6, 3.6)
    lines = []
    for method, colour in zip(methods, _style.palette(len(methods)), strict=True):
        rank = 1 - table.loc[table["method"] == method, "retrieval"].dropna().to_numpy(dtype=float)
        lines.append(ax.ecdf(rank, color=colour, linewidth=2.4 if method == "scbin" else 1.2))
    _style.legend_beside(ax, lines, methods)
    ax.set(xlabel="fraction of other perturbations closer to the prediction", xlim=(0, 1), ylim=(0, 1.02))
    ax.set_ylabel("cumulative fraction of perturbations")
    ax.set_title(_counted(adata), loc="left", fontsize=9)
    return ax


def _diagonal(ax: Axes | None, width: float, height: float) -> Axes:
    """Return axes with their diagonal."""
    ax = _style.new_axes(width, height) if ax is None else ax
    ax.axline((0, 0), slope=1, color=_style.QUIET, linewidth=0.7, linestyle=(0, (4, 3)))
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _reproducible(adata: AnnData, metric: str) -> pd.DataFrame:
    """Return the scores of reproducible perturbations."""
    table = perturbations_df(adata, "evaluated", reproducible=True)
    if metric not in METRICS or table.empty:
        known = ", ".join(map(repr, METRICS))
        raise ScbinInputError(
            "P02", f"no perturbation is reproducible (see the verdict), or {metric=} is not one of {known}."
        )
    return table


def _counted(adata: AnnData) -> str:
    facts = read_entry(adata, "evaluated")["params"]
    return f"{facts['n_reproducible']} reproducible of {facts['n_perturbations']} perturbations, each left out"
