"""Plots of perturbations: the ranking of genes, effects against p values, arrows on the map, pairs of genes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scbin import _docs, _keys
from scbin._adata import check_adata
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.get.perturbation import SIGNIFICANT, pairs_of, perturb_df, read_perturbation
from scbin.pl import _style
from scbin.pl._embedding import embedding, read_embedding, umap_slot

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

OTHER, BAND = "#b9bdc4", "#e9ebef"
WINDOW = 0.05  # share of the genes over which the band is smoothed
MOST_GENES = 60  # on a side of a matrix
GRID = 26  # arrows along the longer side of a map
FEWEST_PER_ARROW = 3.0  # cells, by weight
MOST_ARROWS = 1_500
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

    A dot is a gene; coloured ones have an FDR below `fdr`, open ones were screened and not computed exactly. Named genes carry a
    confidence interval over donors, or over cells.

    Parameters
    ----------
    adata
        Cells after `scbin.tl.perturb`.
    key
        Entry of `uns`. Default: `"scbin_perturb"`.
    group
        Which group of cells, where there are several.
    value
        `"alignment"`, after a perturbation towards a goal, draws how straight each gene moves cells there, however far.
    n_genes
        How many genes to name at either end.
    genes
        Genes to name instead.
    fdr
        Genes below this false discovery rate are coloured.
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
    shown = _Genes.read(adata, key, perturb_df(adata, key=key, group=group), value)
    table, y = shown.table, shown.table[value].to_numpy(dtype=float)
    x, last = np.arange(1, len(table) + 1), np.arange(len(table))[::-1][:n_genes]
    chosen = shown.named(genes, np.arange(min(n_genes, len(y))), last[y[last] < 0])
    ax = ax or _style.new_axes(6.4, 4.2)
    has_band = value == "shift" and "null_low" in table.columns and bool(table["null_low"].notna().any())
    if has_band:  # a running median: neighbours in shift differ in expression
        half = max(3, int(WINDOW * len(table)))
        limits = table[["null_low", "null_high"]].rolling(half, center=True, min_periods=1).median()
        ax.fill_between(x, limits["null_low"], limits["null_high"], color=BAND, linewidth=0, zorder=0)
    if shown.signed:
        ax.axhline(0, color=_style.QUIET, linewidth=0.6, zorder=1)
    if value == "shift" and "shift_low" in table.columns:
        low, high = (table[name].to_numpy(dtype=float)[chosen] for name in ("shift_low", "shift_high"))
        ax.vlines(x[chosen], low, high, colors=list(shown.colours(fdr)[chosen]), linewidth=0.7, alpha=0.6)
    label = _shift_label(shown.params) if value == "shift" else "alignment (cosine to the direction of the goal)"
    ax.set(xlabel=f"genes, sorted by {value}", ylabel=label)
    shown.draw(ax, x, y, fdr, band=has_band)
    ax.margins(x=0.03, y=0.16)
    return shown.finish(ax, x, y, chosen, title, all_of_them=genes is not None)


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
    """Draw the effect of each perturbed gene, in standard deviations of genes alike, against its p value.

    Parameters
    ----------
    adata
        Cells after `scbin.tl.perturb`.
    key
        Entry of `uns`. Default: `"scbin_perturb"`.
    group
        Which group of cells, where there are several.
    n_genes
        How many of the genes with the smallest p values to name on either side.
    genes
        Genes to name instead.
    fdr
        Genes below this false discovery rate are coloured; a dashed line shows where it lies.
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
    'effect size (SD of genes alike)'
    """
    shown = _Genes.read(adata, key, perturb_df(adata, key=key, group=group), "effect_size", "p_value", "fdr")
    x, p_values, level = (shown.table[name].to_numpy(dtype=float) for name in ("effect_size", "p_value", "fdr"))
    y, order = -np.log10(np.maximum(p_values, 1e-300)), np.argsort(p_values, kind="stable")
    sides = (order[x[order] > 0][:n_genes], order[x[order] < 0][:n_genes])
    chosen = shown.named(genes, *(side[level[side] < fdr] for side in sides))
    ax = _style.new_axes(6.4, 4.2) if ax is None else ax
    ax.axvline(0, color=_style.QUIET, linewidth=0.6, zorder=1)
    if (level < fdr).any():
        line = float(y[level < fdr].min())
        ax.axhline(line, color=_style.QUIET, linewidth=0.7, linestyle=(0, (4, 3)), zorder=1)
        place: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "ha": "right", "va": "bottom"}
        ax.text(0.99, line, f"FDR {fdr:g}", fontsize=7.5, color=_style.QUIET, **place)
    replicates = f" ({shown.table['replicates'].iloc[0]} as replicates)" if "replicates" in shown.table.columns else ""
    ax.set(xlabel="effect size (SD of genes alike)", ylabel=f"-log10 p{replicates}")
    shown.draw(ax, x, y, fdr)
    ax.margins(x=0.08, y=0.08)
    ax.set_ylim(bottom=-0.02 * max(float(y.max()), 1.0))
    return shown.finish(ax, x, y, chosen, title, all_of_them=genes is not None)


@_docs.shared
@checked
def perturbation_matrix(
    adata: AnnData,
    *,
    value: Literal["combined_minus_sum", "combined_shift"] | None = None,
    key: str | None = None,
    group: str | None = None,
    fdr: float = SIGNIFICANT,
    cmap: str | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw what pairs of genes do together: rows are anchors, columns their partners.

    A ring marks pairs with an FDR below `fdr`. Genes are sorted by their mean value.

    Parameters
    ----------
    adata
        Cells after `scbin.tl.perturb` of pairs of genes.
    value
        `"combined_minus_sum"`: how much more the pair does than the sum of either alone; `"combined_shift"`: what it does.
        Default: the former where the table has it.
    key
        Entry of `uns`. Default: `"scbin_perturb"`.
    group
        Which group of cells, where there are several.
    fdr
        Of the difference from the sum of both, where the table has it.
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
    >>> table = pandas.DataFrame({"anchor": ["A", "A"], "gene": ["B", "C"], "combined_minus_sum": [0.1, -0.2]})
    >>> adata.uns["scbin_perturb"] = {"table": table, "params": "{}"}
    >>> ax = scbin.pl.perturbation_matrix(adata)
    >>> [label.get_text() for label in ax.get_xticklabels()]
    ['B', 'C']
    """
    import seaborn as sns

    every = pairs_of(perturb_df(adata, key=key, group=group, sort_by=None, min_cells=0))
    value = value or ("combined_minus_sum" if "combined_minus_sum" in every.columns else "combined_shift")
    shown = _Genes.read(adata, key, every, value)
    level = next((name for name in (f"{value}_fdr", "fdr") if name in every.columns), None)
    table = shown.table.assign(ring=False if level is None else shown.table[level] < fdr)
    table = table[["anchor", "gene", value, "ring"]]
    if set(table["anchor"]) & set(table["gene"]):  # all pairs of a list: the matrix is square and filled on both sides
        table = table._append(table.rename(columns={"anchor": "gene", "gene": "anchor"}), ignore_index=True)
    matrix = table.pivot_table(index="anchor", columns="gene", values=value, aggfunc="first")
    rows, columns = (matrix.mean(axis=axis).sort_values(ascending=False, kind="stable").index for axis in (1, 0))
    if max(matrix.shape) > MOST_GENES:
        found = f"a matrix of {len(rows)} x {len(columns)} genes cannot be read; the most is {MOST_GENES}."
        raise ScbinInputError("A02", f"{found} Perturb fewer pairs, or sort scbin.get.perturb_df(adata).")
    size = (max(4.8, 2.6 + 0.3 * len(columns)), 1.6 + 0.3 * len(rows))  # room for the title
    ax = _style.new_axes(*size) if ax is None else ax
    limit = max(float(np.nanmax(np.abs(matrix))), 1e-12)
    both_signs = value == "combined_minus_sum" or float(np.nanmin(matrix)) < 0
    style: dict[str, Any] = {"square": True, "linewidths": 1.0, "cbar_kws": {"shrink": 0.6}, "vmax": limit}
    style |= {"cmap": cmap or ("RdBu_r" if both_signs else "viridis"), "vmin": -limit if both_signs else 0}
    sns.heatmap(matrix.loc[rows, columns], ax=ax, xticklabels=True, yticklabels=True, **style)
    ax.set_facecolor("#dfe2e6")  # no such pair
    for label in [*ax.get_xticklabels(), *ax.get_yticklabels()]:
        label.set_parse_math(False)
    rings = table[table["ring"]]
    at = (columns.get_indexer(rings["gene"]) + 0.5, rows.get_indexer(rings["anchor"]) + 0.5)
    ax.scatter(*at, s=22, facecolors="none", edgecolors="black", linewidths=0.9)
    ax.set(xlabel=f"ring: FDR < {fdr:g}" if len(rings) else "", ylabel="")
    text = f"{_done(shown.params).replace('Genes', 'Pairs')}\n{VALUES[value]}"
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
    arrows: Literal["grid", "cells"] = "grid",
    scale: float | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw on the UMAP where a perturbation moves the cells.

    The neighbours of a cell in the embedding before and after the perturbation give two places on the map; the arrow leads from
    one to the other. A cell that did not move has no arrow.

    Parameters
    ----------
    adata
        Cells after `scbin.tl.perturb` of a set of genes together.
    {color}
    key
        Entry of `uns` with the perturbation, whose vectors are drawn. Default: `"scbin_perturb"`.
    {basis}
    arrows
        `"grid"`: means over the cells around each point of a grid; `"cells"`: one arrow a cell (at most 1,500 of them).
    scale
        How many times as long as the shift to draw the arrows. Default: so that the longest spans about two steps of the grid;
        the factor is written below the map.
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
    if scale is not None and scale <= 0:
        raise ScbinInputError("A02", f"scale is {scale}; it needs to be above 0.")
    before = read_embedding(adata, basis)
    slot = _keys.of_perturbation(_keys.PERTURB if key is None else key)[1]
    if slot not in adata.obsm:
        raise ScbinInputError("A06", f"adata.obsm has no {slot!r}. Perturb a list of genes together, with each=False.")
    after = np.asarray(adata.obsm[slot], dtype=np.float32)
    if after.shape != before.shape:
        raise ScbinInputError("A03", f"obsm[{slot!r}] is {after.shape}, the embedding {before.shape}: two models.")
    ax, text = ax or _style.new_axes(5.6, 4.6), "Where the perturbation moves cells" if title is None else title
    ax = embedding(adata, color=color, basis=basis, ax=ax, title=text)
    coordinates = np.asarray(
        adata.obsm[basis if before.shape[1] == 2 else umap_slot(adata, basis, before)], dtype=float
    )
    for dots in ax.collections:  # the cells are the ground that the arrows stand on
        dots.set(alpha=0.35, zorder=1)
    places, steps = displacements(before, after, coordinates, ~np.isnan(after.sum(axis=1)))
    if arrows == "grid":
        places, steps = grid_means(places, steps, coordinates)
    else:
        some = np.random.default_rng(0).permutation(len(places))[:MOST_ARROWS]
        places, steps = places[some], steps[some]
    longest = float(np.quantile(np.linalg.norm(steps, axis=1), 0.98)) if len(steps) else 0.0
    note = "no cell moves"
    if longest > 1e-9:
        scale = 2.0 * _spacing(coordinates) / longest if scale is None else scale
        head: dict[str, Any] = {"headwidth": 4.2, "headlength": 4.6, "minlength": 0.6, "zorder": 5}
        width = 0.0026 if arrows == "grid" else 0.0013
        ax.quiver(*places.T, *(scale * steps).T, angles="xy", scale_units="xy", scale=1, width=width, **head)
        note = "arrows as long as the shift" if abs(scale - 1) < 0.05 else f"arrows {scale:.2g} times the shift"
    ax.set_xlabel(f"{ax.get_xlabel()}\n{note}")
    return ax


def displacements(
    before: np.ndarray, after: np.ndarray, coordinates: np.ndarray, moved: np.ndarray, n_neighbors: int = 30
) -> tuple[np.ndarray, np.ndarray]:
    """Return place and step on the map (cells that moved, 2) of each perturbed cell.

    Both ends of a step are weighted means of the nearest cells, so it is smooth in the shift and zero without one.
    """
    from sklearn.neighbors import NearestNeighbors

    laid_out = np.isfinite(coordinates).all(axis=1)
    known = np.flatnonzero(np.isfinite(before).all(axis=1) & laid_out)
    cells = np.intersect1d(known, np.flatnonzero(moved))
    if len(known) < 3 or not len(cells):
        return np.empty((0, 2)), np.empty((0, 2))
    index = NearestNeighbors(n_neighbors=min(n_neighbors, len(known))).fit(before[known].astype(np.float64))

    def place(vectors: np.ndarray) -> np.ndarray:
        distance, near = index.kneighbors(vectors)
        weight = np.exp(-2 * (distance / np.maximum(distance[:, -1:], 1e-12)) ** 2)[..., None]
        return (weight * coordinates[known][near]).sum(axis=1) / weight.sum(axis=1)

    return coordinates[cells].astype(np.float64), place(after[cells]) - place(before[cells])


def grid_means(places: np.ndarray, steps: np.ndarray, coordinates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average steps around the points of a regular grid; points with hardly a cell around them are left out."""
    if not len(places):
        return places, steps
    shown, spacing = coordinates[np.isfinite(coordinates).all(axis=1)], _spacing(coordinates)
    axes = [np.arange(values.min(), values.max(), spacing) + spacing / 2 for values in shown.T]
    points, parts = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2), []
    for part in np.array_split(points, max(1, len(points) // 100)):
        weight = np.exp(-2.0 * ((part[:, None] - places) ** 2).sum(axis=2) / spacing**2)
        parts.append(np.column_stack([weight.sum(axis=1), weight @ steps]))
    total, sums = np.split(np.concatenate(parts), [1], axis=1)
    crowded = total[:, 0] >= min(FEWEST_PER_ARROW, 0.5 * total.max())
    return points[crowded], sums[crowded] / total[crowded]


def _spacing(coordinates: np.ndarray) -> float:
    """Return the distance of the points of the grid."""
    return max(float((np.nanmax(coordinates, axis=0) - np.nanmin(coordinates, axis=0)).max()) / GRID, 1e-12)


# ---- what the plots share -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Genes:
    """The genes of a plot: the rows of the table that have numbers, and how they were made."""

    table: pd.DataFrame
    params: Mapping[str, Any]

    @classmethod
    def read(cls, adata: AnnData, key: str | None, table: pd.DataFrame, *needed: str) -> _Genes:
        """Take the rows of one group of a table that have numbers in the columns needed, the largest of the first one first."""
        groups = table["group"].astype(str).unique() if "group" in table.columns else []
        if len(groups) > 1:
            raise ScbinInputError("A03", f"there are {len(groups)} groups of cells; draw one: group={groups[0]!r}.")
        missing = [column for column in needed if column not in table.columns]
        if missing:
            found = ", ".join(map(repr, table.columns))
            raise ScbinInputError(
                "A06", f"this plot needs the column {missing[0]!r}; the perturbation's table has {found}."
            )
        shown = table.dropna(subset=list(needed))
        if shown.empty:
            raise ScbinInputError("P02", f"none of the {len(table)} rows has a number in all of {', '.join(needed)}.")
        shown = shown.sort_values(needed[0], ascending=False, kind="stable", ignore_index=True)
        return cls(shown, read_perturbation(adata, key)[1])

    @property
    def signed(self) -> bool:
        """Whether shifts have a direction."""
        return self.params.get("goal") is not None or bool((self.table["shift"] < -1e-6).any())

    def named(self, genes: Sequence[str] | None, *default: np.ndarray) -> np.ndarray:
        """Return the rows of the genes to name."""
        unknown = sorted(set(genes or ()) - set(self.table["gene"]))
        if unknown:
            raise ScbinInputError("A06", f"{unknown[0]!r} is not among the {len(self.table):,} genes that are drawn.")
        return np.unique(np.concatenate(default)) if genes is None else np.flatnonzero(self.table["gene"].isin(genes))

    def colours(self, fdr: float) -> np.ndarray:
        """Return a colour for each gene, by direction where it is significant."""
        effect, level = self.table.get("effect_size", self.table["shift"]), self.table.get("fdr", np.nan)
        return np.where(level < fdr, np.where(effect > 0, _style.MAIN, _style.SECOND), OTHER).astype(object)

    def draw(self, ax: Axes, x: np.ndarray, y: np.ndarray, fdr: float, *, band: bool = False) -> None:
        """Draw a dot for each gene, open where it was screened, and say beside the axes what the colours mean."""
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        colours, exact = self.colours(fdr), self.table.get("exact", self.table["gene"].notna()).to_numpy(dtype=bool)
        for some, face in ((exact, colours), (~exact, np.full(len(x), "white", dtype=object))):
            ax.scatter(
                x[some], y[some], s=14, c=list(face[some]), edgecolors=list(colours[some]), linewidths=0.7, zorder=4
            )
        words = ("towards the goal", "away from the goal") if self.signed else ("further than genes alike", "less far")
        dot: dict[str, Any] = {"marker": "o", "linestyle": "", "markersize": 5}
        entries: dict[str, Any] = {}
        for colour, word in zip((_style.MAIN, _style.SECOND, OTHER), (*words, "not significant"), strict=True):
            if (colours == colour).any():
                entries[f"{word}: {(colours == colour).sum():,}"] = Line2D([], [], color=colour, **dot)
        if not exact.all():
            entries["open: screened"] = Line2D([], [], color="white", markeredgecolor=_style.QUIET, **dot)
        if band:
            entries["95 % of genes alike"] = Patch(color=BAND)
        _style.legend_beside(ax, list(entries.values()), list(entries))

    def finish(
        self, ax: Axes, x: np.ndarray, y: np.ndarray, chosen: np.ndarray, title: str | None, *, all_of_them: bool
    ) -> Axes:
        """Give the axes their title, and name some genes: those for which there is room, or all of them."""
        from adjustText import adjust_text

        ax.spines[["top", "right"]].set_visible(False)
        ax.set_title(_done(self.params) if title is None else title, loc="left", parse_math=False)
        figure = ax.get_figure(root=True)
        if figure is None or not len(chosen):
            return ax
        figure.draw_without_rendering()  # a layout engine settles the size of the axes when it draws
        style: dict[str, Any] = {"fontsize": 7.5, "parse_math": False, "zorder": 6, "in_layout": False}
        others, state = list(ax.texts), np.random.get_state()  # adjustText draws from the global generator
        texts = [ax.text(x[i], y[i], _style.shorten(self.table["gene"].iloc[i], 18), **style) for i in chosen]
        np.random.seed(0)
        adjust_text(texts, x=x, y=y, objects=others or None, ax=ax, iter_lim=60, expand=(1.1, 1.3))
        np.random.set_state(state)
        taken = [text.get_window_extent() for text in others]
        for text, i in zip(texts, chosen, strict=True):
            box = text.get_window_extent()
            if not all_of_them and any(box.overlaps(other) for other in taken):
                text.remove()
                continue
            taken.append(box)
            point = ax.transData.transform((x[i], y[i]))
            nearest = np.clip(point, box.min, box.max)
            if np.linalg.norm(nearest - point) > 5:
                ends = ax.transData.inverted().transform([point, nearest])
                ax.plot(*ends.T, color=_style.QUIET, linewidth=0.5, zorder=3, scalex=False, scaley=False)
        return ax


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
