"""Plots of perturbations: in silico, effects of genes, arrows on the map, pairs of genes; of measured ones, how well they are predicted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from scbin import _docs, _keys
from scbin._adata import check_adata
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.get import SIGNIFICANT, perturb_df, perturbations_df, read_entry, read_perturbation
from scbin.pl import _style
from scbin.pl._embedding import embedding, map_slot, read_embedding

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes

OTHER, BAND, BAND_LABEL = "#b9bdc4", "#e9ebef", "95 % of matched genes"
WINDOW = 0.05  # share of the genes over which the band is smoothed
MOST_ARROWS = 400
DONE = {"delete": "deleted", "overexpress": "overexpressed", "inhibit": "inhibited", "activate": "activated"}
DONE["knock_down"] = "knocked down"
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
def perturbation(
    adata: AnnData,
    *,
    key: str | None = None,
    value: Literal["shift", "alignment"] = "shift",
    n_genes: int = 8,
    genes: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot all perturbed genes, ranked by their shift, with the range of genes of similar expression as a band.

    Each dot is a gene; open dots were screened and not computed exactly. Named genes have a confidence interval over donors or
    cells.

    Parameters
    ----------
    {perturbed}
    value
        `"alignment"`, after a perturbation towards a goal, plots how directly each gene moves cells there, however far.
    {genes_named}
    {axes}

    Examples
    --------
    >>> import anndata, numpy, pandas, scbin
    >>> adata = anndata.AnnData(numpy.ones((2, 3)))
    >>> table = pandas.DataFrame({"gene": list("ABC"), "n_cells": 9, "shift": [0.01, 0.04, -0.02]})
    >>> adata.uns["scbin_perturb"] = {"table": table, "params": "{}"}
    >>> scbin.pl.perturbation(adata).get_xlabel()
    'genes, sorted by shift'
    """
    table, params = _read(adata, key, value)
    x, y = np.arange(1, len(table) + 1), table[value].to_numpy(dtype=float)
    ax = _style.new_axes(6.4, 4.2) if ax is None else ax
    if value == "shift" and "null_low" in table:
        half = max(3, int(WINDOW * len(table)))  # a running median: neighbours in shift differ in expression
        limits = table[["null_low", "null_high"]].rolling(half, center=True, min_periods=1).median()
        ax.fill_between(x, *limits.T.to_numpy(), color=BAND, linewidth=0, zorder=0, label=BAND_LABEL)
    label = "alignment (cosine to the direction of the goal)" if value == "alignment" else _shift_label(params)
    ax.set(xlabel=f"genes, sorted by {value}", ylabel=label)
    ax.margins(x=0.03, y=0.16)
    chosen = (x <= n_genes) | ((x > len(x) - n_genes) & (y < 0))
    chosen = _draw_genes(ax, table, params, x, y, chosen, genes, inwards=0.06 * len(x))
    if value == "shift" and "shift_low" in table:
        ax.vlines(x[chosen], *table.loc[chosen, ["shift_low", "shift_high"]].T.to_numpy(), color=OTHER, linewidth=0.7)
    return ax


@_docs.shared
@checked
def perturbation_volcano(
    adata: AnnData,
    *,
    key: str | None = None,
    n_genes: int = 8,
    genes: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot the effect of (or, by `level`, on) each gene, in standard deviations of matched genes, against its p value.

    Parameters
    ----------
    {perturbed}
    {genes_named}
    {axes}

    Examples
    --------
    >>> import anndata, numpy, pandas, scbin
    >>> adata = anndata.AnnData(numpy.ones((2, 3)))
    >>> table = pandas.DataFrame({"gene": list("ABC"), "shift": [0.1, 0.4, -0.2], "effect_size": [0.2, 6, -1]})
    >>> table["p_value"], table["fdr"] = [0.8, 1e-6, 0.3], [0.8, 3e-6, 0.45]
    >>> adata.uns["scbin_perturb"] = {"table": table, "params": "{}"}
    >>> scbin.pl.perturbation_volcano(adata).get_xlabel()
    'effect size (SD of matched genes)'
    """
    table, params = _read(adata, key, "effect_size", "p_value", "fdr")
    x, y = table["effect_size"].to_numpy(dtype=float), -np.log10(table["p_value"].to_numpy(dtype=float).clip(1e-300))
    significant = (table["fdr"] < SIGNIFICANT).to_numpy()
    place = table.groupby(x > 0)["p_value"].rank(method="first").to_numpy()
    ax = _style.new_axes(6.4, 4.2) if ax is None else ax
    if significant.any():
        line = float(y[significant].min())
        ax.axhline(line, color=_style.QUIET, linewidth=0.7, linestyle="--", zorder=1)
        style: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "ha": "right", "va": "bottom"}
        ax.text(0.99, line, f"FDR {SIGNIFICANT:g}", fontsize=7.5, **style)
    replicates = "donors" if params.get("donor_key") else "cells"
    ax.set(xlabel="effect size (SD of matched genes)", ylabel=f"-log10 p ({replicates} as replicates)")
    ax.margins(x=0.08, y=0.08)
    # where no gene passes, the likeliest ones are named all the same
    _draw_genes(ax, table, params, x, y, (significant | ~significant.any()) & (place <= n_genes), genes)
    return ax


@_docs.shared
@checked
def perturbation_matrix(adata: AnnData, *, key: str | None = None, ax: Axes | None = None, **kwargs: Any) -> Axes:
    """Plot the effect of pairs of genes beyond the sum of both genes alone, sorted by the mean; rings mark an FDR below .05.

    Parameters
    ----------
    {perturbed}
    {ax}
    **kwargs
        For `seaborn.heatmap`.

    Returns
    -------
    The axes.

    Examples
    --------
    >>> import anndata, numpy, pandas, scbin
    >>> adata = anndata.AnnData(numpy.ones((2, 3)))
    >>> table = pandas.DataFrame(
    ...     {"gene": ["A,B", "A,C"], "combined_minus_sum": [0.1, -0.2], "combined_minus_sum_fdr": [0.01, 0.9]}
    ... )
    >>> adata.uns["scbin_perturb"] = {"table": table, "params": "{}"}
    >>> ax = scbin.pl.perturbation_matrix(adata)
    >>> [label.get_text() for label in ax.get_xticklabels()]
    ['B', 'C']
    """
    import seaborn as sns

    table, params = _read(adata, key, "combined_minus_sum", "combined_minus_sum_fdr")
    table[["anchor", "partner"]] = table["gene"].str.split(",", expand=True)
    if set(table["anchor"]) & set(table["partner"]):  # all pairs of a list: the matrix is filled on both sides
        swapped = table.rename(columns={"anchor": "partner", "partner": "anchor"})
        table = pd.concat([table, swapped], ignore_index=True)
    matrix = table.pivot_table(index="anchor", columns="partner", values="combined_minus_sum", aggfunc="first")
    rows, columns = (matrix.mean(axis=axis).sort_values(ascending=False, kind="stable").index for axis in (1, 0))
    size = (max(4.8, 2.6 + 0.3 * len(columns)), 1.6 + 0.3 * len(rows))  # room for the title
    ax = _style.new_axes(*size) if ax is None else ax
    limit = max(np.nanmax(np.abs(matrix)), 1e-12)
    style = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "square": True, "linewidths": 1.0}
    style |= {"cbar_kws": {"shrink": 0.6}, "xticklabels": True, "yticklabels": True, **kwargs}
    sns.heatmap(matrix.loc[rows, columns], ax=ax, **style)
    ax.set_facecolor("#dfe2e6")  # no such pair
    for label in [*ax.get_xticklabels(), *ax.get_yticklabels()]:
        label.set_parse_math(False)
    ax.tick_params(axis="x", rotation=90)
    ax.tick_params(axis="y", rotation=0)
    rings = table[table["combined_minus_sum_fdr"] < SIGNIFICANT]
    at = (columns.get_indexer(rings["partner"]) + 0.5, rows.get_indexer(rings["anchor"]) + 0.5)
    ax.scatter(*at, s=22, facecolors="none", edgecolors="black", linewidths=0.9)
    ax.set(xlabel=f"ring: FDR < {SIGNIFICANT:g}" if len(rings) else "", ylabel="")
    text = f"{_done(params).replace('Genes', 'Pairs')}\neffect beyond the sum of both genes"
    ax.set_title(text, fontsize=10, loc="left", parse_math=False)
    return ax


@_docs.shared
@checked
def perturbation_map(
    adata: AnnData,
    *,
    color: str | None = None,
    key: str | None = None,
    basis: str = _keys.EMBEDDING,
    ax: Axes | None = None,
) -> Axes:
    """Draw on the UMAP where a perturbation moves the cells.

    The neighbours of a cell in the embedding, before and after the perturbation, give two places on the map. Arrows connect them, for
    up to 400 cells, scaled so that the longest ones span a tenth of the map.

    Parameters
    ----------
    adata
        Cells after `scbin.tl.perturb` of a set of genes together.
    {color}
    key
        Entry of `uns` with the perturbation. Default: `"scbin_perturb"`.
    {basis}
    {ax}

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
    before = read_embedding(adata, basis)
    slot = _keys.of_perturbation(_keys.PERTURB if key is None else key)[1]
    after = np.asarray(adata.obsm[slot], dtype=np.float32) if slot in adata.obsm else np.empty(0)
    if after.shape != before.shape:
        found = f"obsm[{slot!r}] is missing, or does not fit this embedding: {after.shape} and {before.shape}"
        raise ScbinInputError("A06", f"{found}. Perturb a list of genes together, with each=False.")
    drawing: Any = embedding(adata, color=color, basis=basis, ax=ax or _style.new_axes(5.6, 4.6))
    drawn = map_slot(adata, basis, before)
    for dots in drawing.collections:  # the cells are the ground that the arrows stand on
        dots.set(alpha=0.35, zorder=1)
    places, steps = displacements(before, after, np.asarray(adata.obsm[drawn], dtype=float))
    some = np.random.default_rng(0).permutation(len(places))[:MOST_ARROWS]
    longest = float(np.quantile(np.linalg.norm(steps[some], axis=1), 0.98)) if len(some) else 0.0
    if longest > 1e-9:
        scale = 0.1 * float(np.ptp(drawing.get_xlim())) / longest
        head: dict[str, Any] = {"headwidth": 4.2, "headlength": 4.6, "minlength": 0.6, "width": 0.0026, "zorder": 5}
        drawing.quiver(*places[some].T, *(scale * steps[some]).T, angles="xy", scale_units="xy", scale=1, **head)
    note = f"arrows {scale:.2g} times the shift" if longest > 1e-9 else "no cell moves"
    drawing.set(title="Where the perturbation moves cells", xlabel=f"{drawing.get_xlabel()}\n{note}")
    return drawing


def displacements(before: np.ndarray, after: np.ndarray, coordinates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return place and step on the map (cells that moved, 2) of each cell with a vector before and after.

    Both ends of a step are weighted means of the nearest cells, so it is smooth in the shift and zero without one.
    """
    from sklearn.neighbors import KNeighborsRegressor

    known = np.isfinite(before).all(axis=1) & np.isfinite(coordinates).all(axis=1)
    cells = known & np.isfinite(after).all(axis=1)
    if not cells.any():
        return np.empty((0, 2)), np.empty((0, 2))
    near = KNeighborsRegressor(min(30, int(known.sum())), weights=lambda d: np.exp(-2 * (d / (d[:, -1:] + 1e-12)) ** 2))
    near.fit(before[known].astype(np.float64), coordinates[known])
    return coordinates[cells].astype(np.float64), near.predict(after[cells]) - near.predict(before[cells])


# ---- what the plots share -------------------------------------------------------------------------------------------


def _read(adata: AnnData, key: str | None, *needed: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the rows that have numbers in the columns needed, the largest of the first one first, and params."""
    table = perturb_df(adata, key=key).rename(columns={"affected": "gene"})
    shown = table.dropna(subset=list(needed)) if set(needed) <= set(table.columns) else table[:0]
    if shown.empty:
        raise ScbinInputError("A06", f"none of the {len(table)} rows of the table has a number in all of {needed}.")
    shown = shown.sort_values(needed[0], ascending=False, kind="stable", ignore_index=True)
    return shown, read_perturbation(adata, key)[1]


def _draw_genes(
    ax: Axes,
    table: pd.DataFrame,
    params: Mapping[str, Any],
    x: np.ndarray,
    y: np.ndarray,
    named: np.ndarray,
    genes: Sequence[str] | None,
    inwards: float = 0.0,
) -> np.ndarray:
    """Draw a dot for each gene, open where it was screened, name some or those asked for, and return their rows."""
    unknown = sorted(set(genes or ()) - set(table["gene"]))
    if unknown:
        raise ScbinInputError("A06", f"{unknown[0]!r} is not one of the {len(table):,} genes in the plot.")
    chosen = np.flatnonzero(named if genes is None else table["gene"].isin(genes))
    signed = params.get("goal") is not None or bool((table["shift"] < -1e-6).any())
    found = (table.get("fdr", pd.Series(np.nan, index=table.index)) < SIGNIFICANT).to_numpy()
    rises = (table.get("effect_size", table["shift"]) > 0).to_numpy()
    exact = table.get("exact", table["gene"].notna()).to_numpy(dtype=bool)
    words = ("towards the goal", "away from the goal") if signed else ("further than matched genes", "less far")
    words = ("more", "less") if params.get("level") == "expression" else words
    kinds = {words[0]: (found & rises, _style.MAIN), words[1]: (found & ~rises, _style.SECOND)}
    kinds["not significant"] = (~found, OTHER)
    handles: dict[str, Any] = {}
    for word, (some, colour) in kinds.items():
        for kind, face in ((some & exact, colour), (some & ~exact, "white")):
            dots = ax.scatter(x[kind], y[kind], s=14, c=face, edgecolors=colour, linewidths=0.7, zorder=4)
            if kind.any():
                handles["open: screened" if face == "white" else f"{word}: {some.sum():,}"] = dots
    handles |= {str(area.get_label()): area for area in ax.collections if area.get_label() == BAND_LABEL}
    _style.legend_beside(ax, list(handles.values()), list(handles))
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(_done(params), loc="left", parse_math=False)
    _style.write_names(ax, table["gene"].tolist(), x, y, chosen, always=genes is not None, inwards=inwards)
    return chosen


def _done(params: Mapping[str, Any]) -> str:
    """Say in words what was done to the cells."""
    return f"Genes {DONE.get(str(params.get('mode', '')), 'perturbed')} in silico"


def _shift_label(params: Mapping[str, Any]) -> str:
    """Say in words what a shift is."""
    goal, start, key = (params.get(name) for name in ("goal", "start", "state_key"))
    if params.get("level") == "phenotype":
        return f"change of predicted {key}" if goal is None else f"change of P({key} = {goal})"
    if params.get("level") == "expression":
        return "change of the expected log counts"
    if goal is None:
        return "shift of the cell (1 - cosine)"
    return f"{'' if start is None else f'{start} cells moved '}towards {goal} (change of cosine)"


# ---- measured perturbations, left out and predicted -----------------------------------------------------------------


@_docs.shared
@checked
def perturbation_response(adata: AnnData, perturbation: str, *, n_genes: int = 10, ax: Axes | None = None) -> Axes:
    """Draw the change of every gene after a perturbation, measured against predicted without it.

    Parameters
    ----------
    {evaluated}
    perturbation
        Its name in the table: `"A"`, or `"A+B"`.
    n_genes
        How many of the most changed genes to name.
    {axes}

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
    {evaluated}
    metric
        A score in its table: `"pearson"`, `"pearson_top"`, `"cosine_beyond_mean"`, `"retrieval"`, `"sign_agreement"` or
        `"relative_mse"`. For `"pearson"` the dashed line is the ceiling that the noise of the measurement sets.
    {axes}

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
    {evaluated}
    {axes}

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
