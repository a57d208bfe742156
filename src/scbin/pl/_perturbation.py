"""Plots of perturbations: the ranking of genes, effects against p values, arrows on the map, pairs of genes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter

from scbin import _docs, _keys
from scbin._adata import check_adata
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.get.perturbation import SIGNIFICANT, pairs_of, perturb_df, read_perturbation
from scbin.pl import _style
from scbin.pl._embedding import embedding, read_embedding, umap_slot

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes

OTHER, BAND, BAND_LABEL = "#b9bdc4", "#e9ebef", "95 % of matched genes"
WINDOW = 0.05  # share of the genes over which the band is smoothed
GRID = 26  # arrows along the longer side of a map
FEWEST_PER_ARROW = 2.0  # cells, by weight
DONE = {"delete": "deleted", "overexpress": "overexpressed", "inhibit": "inhibited", "activate": "activated"}
DONE["knock_down"] = "knocked down"
VALUES = {"combined_minus_sum": "both together, beyond the sum of either", "combined_shift": "shift by both together"}


@_docs.shared
@checked
def perturbation(
    adata: AnnData,
    *,
    key: str | None = None,
    group: str | None = None,
    value: Literal["shift", "alignment"] = "shift",
    n_genes: int = 8,
    genes: Sequence[str] | None = None,
    fdr: float = SIGNIFICANT,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw all perturbed genes in order of their shift, over the band in which genes of the same expression lie.

    A dot is a gene; open ones were screened and not computed exactly. Named genes carry a confidence interval over donors, or
    over cells.

    Parameters
    ----------
    {perturbed}
    value
        `"alignment"`, after a perturbation towards a goal, draws how straight each gene moves cells there, however far.
    {genes_named}
    {title}
    {ax}

    Returns
    -------
    The axes.

    Examples
    --------
    >>> import anndata, numpy, pandas, scbin
    >>> adata = anndata.AnnData(numpy.ones((2, 3)))
    >>> table = pandas.DataFrame({"gene": list("ABC"), "n_cells": 9, "shift": [0.01, 0.04, -0.02]})
    >>> adata.uns["scbin_perturb"] = {"table": table, "params": "{}"}
    >>> scbin.pl.perturbation(adata).get_xlabel()
    'genes, sorted by shift'
    """
    table, params = _read(adata, key, group, value)
    x, y = np.arange(1, len(table) + 1), table[value].to_numpy(dtype=float)
    chosen = _chosen(table, genes, (x <= n_genes) | ((x > len(x) - n_genes) & (y < 0)))
    ax = _style.new_axes(6.4, 4.2) if ax is None else ax
    if value == "shift" and "null_low" in table.columns and table["null_low"].notna().any():
        half = max(3, int(WINDOW * len(table)))  # a running median: neighbours in shift differ in expression
        limits = table[["null_low", "null_high"]].rolling(half, center=True, min_periods=1).median()
        ax.fill_between(x, *limits.T.to_numpy(), color=BAND, linewidth=0, zorder=0, label=BAND_LABEL)
    if value == "shift" and "shift_low" in table.columns:
        ax.vlines(x[chosen], *table.loc[chosen, ["shift_low", "shift_high"]].T.to_numpy(), color=OTHER, linewidth=0.7)
    if _signed(table, params):
        ax.axhline(0, color=_style.QUIET, linewidth=0.6, zorder=1)
    label = _shift_label(params) if value == "shift" else "alignment (cosine to the direction of the goal)"
    ax.set(xlabel=f"genes, sorted by {value}", ylabel=label)
    ax.set_title(_done(params) if title is None else title, loc="left", parse_math=False)
    _draw_genes(ax, table, params, x, y, fdr)
    ax.margins(x=0.03, y=0.16)
    names, inwards = table["gene"].tolist(), 0.06 * len(x)
    _style.write_names(ax, names, x, y, chosen, always=genes is not None, inwards=inwards)
    return ax


@_docs.shared
@checked
def perturbation_volcano(
    adata: AnnData,
    *,
    key: str | None = None,
    group: str | None = None,
    n_genes: int = 8,
    genes: Sequence[str] | None = None,
    fdr: float = SIGNIFICANT,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the effect of each perturbed gene, in standard deviations of matched genes, against its p value.

    Parameters
    ----------
    {perturbed}
    {genes_named}
    {title}
    {ax}

    Returns
    -------
    The axes.

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
    table, params = _read(adata, key, group, "effect_size", "p_value", "fdr")
    x, y = table["effect_size"].to_numpy(dtype=float), -np.log10(table["p_value"].to_numpy(dtype=float).clip(1e-300))
    significant = (table["fdr"] < fdr).to_numpy()
    place = table.groupby(x > 0)["p_value"].rank(method="first").to_numpy()
    # where no gene passes, the likeliest ones are named all the same
    chosen = _chosen(table, genes, (significant | ~significant.any()) & (place <= n_genes))
    ax = _style.new_axes(6.4, 4.2) if ax is None else ax
    ax.axvline(0, color=_style.QUIET, linewidth=0.6, zorder=1)
    if significant.any():
        line = float(y[significant].min())
        ax.axhline(line, color=_style.QUIET, linewidth=0.7, linestyle="--", zorder=1)
        ax.annotate(
            f"FDR {fdr:g}", (0.99, line), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7.5
        )
    replicates = f" ({table['replicates'].iloc[0]} as replicates)" if "replicates" in table.columns else ""
    ax.set(xlabel="effect size (SD of matched genes)", ylabel=f"-log10 p{replicates}")
    ax.set_title(_done(params) if title is None else title, loc="left", parse_math=False)
    _draw_genes(ax, table, params, x, y, fdr)
    ax.margins(x=0.08, y=0.08)
    ax.set_ylim(bottom=-0.02 * max(float(y.max()), 1.0))
    _style.write_names(ax, table["gene"].tolist(), x, y, chosen, always=genes is not None)
    return ax


@_docs.shared
@checked
def perturbation_matrix(
    adata: AnnData,
    *,
    key: str | None = None,
    group: str | None = None,
    value: Literal["combined_minus_sum", "combined_shift"] = "combined_minus_sum",
    fdr: float = SIGNIFICANT,
    cmap: str | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw what pairs of genes do together: rows are anchors, columns their partners, sorted by their mean value.

    Parameters
    ----------
    {perturbed}
    value
        `"combined_minus_sum"`: how much more the pair does than the sum of either alone; `"combined_shift"`: what it does.
    fdr
        A ring marks pairs whose difference from the sum of both has a false discovery rate below this.
    {cmap}
    {title}
    {ax}

    Returns
    -------
    The axes.

    Examples
    --------
    >>> import anndata, numpy, pandas, scbin
    >>> adata = anndata.AnnData(numpy.ones((2, 3)))
    >>> table = pandas.DataFrame({"gene": ["A,B", "A,C"], "shift": [0.3, 0.1], "combined_minus_sum": [0.1, -0.2]})
    >>> adata.uns["scbin_perturb"] = {"table": table, "params": "{}"}
    >>> ax = scbin.pl.perturbation_matrix(adata)
    >>> [label.get_text() for label in ax.get_xticklabels()]
    ['B', 'C']
    """
    import seaborn as sns

    table, params = _read(adata, key, group, value)
    level = table.get("combined_minus_sum_fdr", pd.Series(np.nan, index=table.index))
    table = table.assign(ring=(level < fdr) & (value == "combined_minus_sum"))
    if set(table["anchor"]) & set(
        table["partner"]
    ):  # all pairs of a list: the matrix is square and filled on both sides
        swapped = table.rename(columns={"anchor": "partner", "partner": "anchor"})
        table = pd.concat([table, swapped], ignore_index=True)
    matrix = table.pivot_table(index="anchor", columns="partner", values=value, aggfunc="first")
    rows, columns = (matrix.mean(axis=axis).sort_values(ascending=False, kind="stable").index for axis in (1, 0))
    size = (max(4.8, 2.6 + 0.3 * len(columns)), 1.6 + 0.3 * len(rows))  # room for the title
    ax = _style.new_axes(*size) if ax is None else ax
    limit, both_signs = max(np.nanmax(np.abs(matrix)), 1e-12), value == "combined_minus_sum" or np.nanmin(matrix) < 0
    colours = {
        "cmap": cmap or ("RdBu_r" if both_signs else "viridis"),
        "vmax": limit,
        "vmin": -limit if both_signs else 0,
    }
    shape = {"square": True, "linewidths": 1.0, "cbar_kws": {"shrink": 0.6}}
    sns.heatmap(matrix.loc[rows, columns], ax=ax, xticklabels=True, yticklabels=True, **colours, **shape)
    ax.set_facecolor("#dfe2e6")  # no such pair
    for label in [*ax.get_xticklabels(), *ax.get_yticklabels()]:
        label.set_parse_math(False)
    ax.tick_params(axis="x", rotation=90)
    ax.tick_params(axis="y", rotation=0)
    rings = table[table["ring"]]
    at = (columns.get_indexer(rings["partner"]) + 0.5, rows.get_indexer(rings["anchor"]) + 0.5)
    ax.scatter(*at, s=22, facecolors="none", edgecolors="black", linewidths=0.9)
    ax.set(xlabel=f"ring: FDR < {fdr:g}" if len(rings) else "", ylabel="")
    text = f"{_done(params).replace('Genes', 'Pairs')}\n{VALUES[value]}"
    ax.set_title(text if title is None else title, fontsize=10, loc="left", parse_math=False)
    return ax


@_docs.shared
@checked
def perturbation_map(
    adata: AnnData,
    *,
    color: str | None = None,
    key: str | None = None,
    basis: str = _keys.EMBEDDING,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw on the UMAP where a perturbation moves the cells.

    The neighbours of a cell in the embedding before and after the perturbation give two places on the map; arrows are the mean
    way from one to the other around each point of a grid. They are drawn so that the longest span about two steps of the grid.

    Parameters
    ----------
    adata
        Cells after `scbin.tl.perturb` of a set of genes together.
    {color}
    key
        Entry of `uns` with the perturbation, whose vectors are drawn. Default: `"scbin_perturb"`.
    {basis}
    {title}
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
    if slot not in adata.obsm:
        raise ScbinInputError("A06", f"adata.obsm has no {slot!r}. Perturb a list of genes together, with each=False.")
    after = np.asarray(adata.obsm[slot], dtype=np.float32)
    if after.shape != before.shape:
        raise ScbinInputError("A03", f"obsm[{slot!r}] is {after.shape}, the embedding {before.shape}: two models.")
    text = "Where the perturbation moves cells" if title is None else title
    drawing: Any = embedding(adata, color=color, basis=basis, ax=ax or _style.new_axes(5.6, 4.6), title=text)
    drawn = basis if before.shape[1] == 2 else umap_slot(adata, basis, before)
    coordinates = np.asarray(adata.obsm[drawn], dtype=float)
    for dots in drawing.collections:  # the cells are the ground that the arrows stand on
        dots.set(alpha=0.35, zorder=1)
    places, steps = grid_means(*displacements(before, after, coordinates), coordinates)
    longest, note = float(np.quantile(np.linalg.norm(steps, axis=1), 0.98)) if len(steps) else 0.0, "no cell moves"
    if longest > 1e-9:
        scale = 2.0 * float(np.ptp(coordinates[np.isfinite(coordinates).all(axis=1)], axis=0).max()) / GRID / longest
        head: dict[str, Any] = {"headwidth": 4.2, "headlength": 4.6, "minlength": 0.6, "width": 0.0026, "zorder": 5}
        drawing.quiver(*places.T, *(scale * steps).T, angles="xy", scale_units="xy", scale=1, **head)
        note = f"arrows {scale:.2g} times the shift"
    drawing.set_xlabel(f"{drawing.get_xlabel()}\n{note}")
    return drawing


def displacements(
    before: np.ndarray, after: np.ndarray, coordinates: np.ndarray, n_neighbors: int = 30
) -> tuple[np.ndarray, np.ndarray]:
    """Return place and step on the map (cells that moved, 2) of each cell with a vector before and after.

    Both ends of a step are weighted means of the nearest cells, so it is smooth in the shift and zero without one.
    """
    from sklearn.neighbors import NearestNeighbors

    known = np.flatnonzero(np.isfinite(before).all(axis=1) & np.isfinite(coordinates).all(axis=1))
    cells = known[np.isfinite(after[known]).all(axis=1)]
    if not len(cells):
        return np.empty((0, 2)), np.empty((0, 2))
    index = NearestNeighbors(n_neighbors=min(n_neighbors, len(known))).fit(before[known].astype(np.float64))

    def place(vectors: np.ndarray) -> np.ndarray:
        distance, near = index.kneighbors(vectors)
        weight = np.exp(-2 * (distance / np.maximum(distance[:, -1:], 1e-12)) ** 2)[..., None]
        return (weight * coordinates[known][near]).sum(axis=1) / weight.sum(axis=1)

    return coordinates[cells].astype(np.float64), place(after[cells]) - place(before[cells])


def grid_means(places: np.ndarray, steps: np.ndarray, coordinates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average steps in the squares of a grid and those around; squares with hardly a cell are left out."""
    low, high = np.nanmin(coordinates, axis=0), np.nanmax(coordinates, axis=0)
    n_squares = np.ceil(GRID * (high - low) / (high - low).max()).astype(int)
    edges: Any = [np.linspace(low[k], high[k], max(n_squares[k], 1) + 1) for k in (0, 1)]
    sums = [
        np.histogram2d(places[:, 0], places[:, 1], bins=edges, weights=weight)[0]
        for weight in (np.ones(len(places)), *steps.T)
    ]
    total, *moved = (gaussian_filter(each, 0.6, mode="constant") for each in sums)
    middles = np.meshgrid(*((edge[1:] + edge[:-1]) / 2 for edge in edges), indexing="ij")
    crowded = (total > 0) & (total >= min(FEWEST_PER_ARROW, total.max() / 2))
    return np.stack(middles, axis=-1)[crowded], np.stack(moved, axis=-1)[crowded] / total[crowded, None]


# ---- what the plots share -------------------------------------------------------------------------------------------


def _read(adata: AnnData, key: str | None, group: str | None, *needed: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the rows of one group that have numbers in the columns needed, the largest of the first one first, and params."""
    table = pairs_of(perturb_df(adata, key=key, group=group))
    groups = table["group"].unique() if "group" in table.columns else []
    if len(groups) > 1:
        raise ScbinInputError("A03", f"there are {len(groups)} groups of cells; draw one: group={groups[0]!r}.")
    missing = [column for column in needed if column not in table.columns]
    if missing:
        found = ", ".join(map(repr, table.columns))
        raise ScbinInputError("A06", f"the plot needs the column {missing[0]!r}; the perturbation's table has {found}.")
    shown = table.dropna(subset=list(needed))
    if shown.empty:
        raise ScbinInputError("P02", f"none of the {len(table)} rows has a number in all of {', '.join(needed)}.")
    shown = shown.sort_values(needed[0], ascending=False, kind="stable", ignore_index=True)
    return shown, read_perturbation(adata, key)[1]


def _signed(table: pd.DataFrame, params: Mapping[str, Any]) -> bool:
    """Whether shifts have a direction."""
    return params.get("goal") is not None or bool((table["shift"] < -1e-6).any())


def _chosen(table: pd.DataFrame, genes: Sequence[str] | None, default: np.ndarray) -> np.ndarray:
    """Return the rows of the genes to name: those asked for, which must be there, or the default."""
    unknown = sorted(set(genes or ()) - set(table["gene"]))
    if unknown:
        raise ScbinInputError("A06", f"{unknown[0]!r} is not among the {len(table):,} genes that are drawn.")
    return np.flatnonzero(default if genes is None else table["gene"].isin(genes))


def _draw_genes(
    ax: Axes, table: pd.DataFrame, params: Mapping[str, Any], x: np.ndarray, y: np.ndarray, fdr: float
) -> None:
    """Draw a dot for each gene, open where it was screened, and say beside the axes what the colours mean."""
    from matplotlib.lines import Line2D

    signed = _signed(table, params)
    found = (table.get("fdr", pd.Series(np.nan, index=table.index)) < fdr).to_numpy()
    rises = (table.get("effect_size", table["shift"]) > 0).to_numpy()
    exact = table.get("exact", table["gene"].notna()).to_numpy(dtype=bool)
    kinds = {"towards the goal" if signed else "further than matched genes": (found & rises, _style.MAIN)}
    kinds["away from the goal" if signed else "less far"] = (found & ~rises, _style.SECOND)
    kinds["not significant"] = (~found, OTHER)
    handles: dict[str, Any] = {}
    dot: dict[str, Any] = {"marker": "o", "linestyle": "", "markersize": 5}
    for word, (some, colour) in kinds.items():
        face = np.where(exact[some], colour, "white")
        ax.scatter(x[some], y[some], s=14, c=face, edgecolors=colour, linewidths=0.7, zorder=4)
        if some.any():
            handles[f"{word}: {some.sum():,}"] = Line2D([], [], color=colour, **dot)
    if not exact.all():
        handles["open: screened"] = Line2D([], [], color="white", markeredgecolor=_style.QUIET, **dot)
    handles |= {str(area.get_label()): area for area in ax.collections if area.get_label() == BAND_LABEL}
    _style.legend_beside(ax, list(handles.values()), list(handles))
    ax.spines[["top", "right"]].set_visible(False)


def _done(params: Mapping[str, Any]) -> str:
    """Say in words what was done to the cells."""
    return f"Genes {DONE.get(str(params.get('mode', '')), 'perturbed')} in silico"


def _shift_label(params: Mapping[str, Any]) -> str:
    """Say in words what a shift is."""
    goal, start = (None if params.get(name) is None else _style.shorten(params[name], 20) for name in ("goal", "start"))
    if params.get("level") == "phenotype":
        target = _style.shorten(params.get("state_key"), 20)
        return f"change of predicted {target}" if goal is None else f"change of P({target} = {goal})"
    if params.get("level") == "expression":
        return "mean change of expected expression"
    if goal is None:
        return "shift of the cell (1 - cosine)"
    return f"{'' if start is None else f'{start} cells moved '}towards {goal} (change of cosine)"
