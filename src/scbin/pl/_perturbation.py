"""`pl.perturbation`: all perturbed genes in order of their shift, and where genes alike lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from scbin._errors import ScbinInputError
from scbin.get._perturb import perturb_df, read_perturbation
from scbin.pl import _perturbation_labels as shared
from scbin.pl import _style

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

SIGNIFICANT = 0.05
FEW_GENES = 40  # their names have room beside them
WINDOW = 0.05  # share of the genes over which the band is smoothed


def perturbation(
    adata: AnnData,
    *,
    key: str | None = None,
    group: str | None = None,
    value: Literal["shift", "alignment"] = "shift",
    n_genes: int = 8,
    genes: list[str] | tuple[str, ...] | None = None,
    fdr: float = SIGNIFICANT,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw all perturbed genes in order of their shift, over the band in which genes of the same expression lie.

    A dot is a gene; coloured ones stand out of their null genes at the false discovery rate, open ones were screened and not
    computed exactly. Named genes carry the interval of their mean over donors, or over cells where there were no donors.

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
    title
        Text above the axes. Default: what was done.
    ax
        The axes to draw in.

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
    'genes in order of their shift'
    """
    params = read_perturbation(adata, key)[1]
    if value not in ("shift", "alignment"):
        raise ScbinInputError("P76", f"value is {value!r}; choose 'shift' or 'alignment'.")
    table = shared.one_group(perturb_df(adata, key=key, group=group, sort_by=value), group)
    table = shared.checked(table, ("gene", value))
    signed = shared.is_signed(table, params)
    chosen = _chosen(table, value, n_genes, genes, signed=signed)
    ax = shared.new_axes(6.4, 4.2) if ax is None else ax
    x, y = np.arange(1, len(table) + 1), table[value].to_numpy(dtype=float)
    has_band = value == "shift" and _draw_band(ax, x, table)
    if signed:
        ax.axhline(0, color=_style.QUIET_COLOUR, linewidth=0.6, zorder=1)
    colours, counts = colour_by_direction(table, fdr)
    if value == "shift":
        _draw_intervals(ax, x, table, chosen, colours)
    exact = exact_of(table)
    for shown, face in ((exact, colours), (~exact, np.full(len(table), "white", dtype=object))):
        ax.scatter(
            x[shown], y[shown], s=14, c=list(face[shown]), edgecolors=list(colours[shown]), linewidths=0.7, zorder=4
        )
    ax.margins(x=0.03, y=0.16)
    _style.frame(ax)
    ax.set_xlabel(f"genes in order of their {value}", fontsize=9, color=_style.TEXT_COLOUR)
    label = (
        shared.shift_label(params) if value == "shift" else "alignment: cosine of the shift with the way to the goal"
    )
    ax.set_ylabel(label, fontsize=9, color=_style.TEXT_COLOUR)
    ax.set_title(shared.title_of(params) if title is None else title, fontsize=11, loc="left", parse_math=False)
    legend(ax, counts, signed=signed, screened=bool((~exact).any()), band=has_band, fdr=fdr)
    names = table["gene"].to_numpy()
    if len(table) < FEW_GENES:
        shared.label_points(ax, x[chosen], y[chosen], names[chosen].tolist(), np.column_stack([x, y]))
        return ax
    sides = ((False, chosen[chosen < len(table) / 2]), (True, chosen[chosen >= len(table) / 2]))
    share = 0.5 if all(len(side) for _, side in sides) else 1.0
    for right, side in sides:
        at = 0.9 if right else 0.1
        shared.label_column(ax, x[side], y[side], names[side].tolist(), at=at, right=right, share=share)
    return ax


def colour_by_direction(table: pd.DataFrame, fdr: float) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Colour of each gene, and how many stand out upwards, downwards and not at all."""
    level = table["fdr"].to_numpy(dtype=float) if "fdr" in table.columns else np.full(len(table), np.nan)
    effect = table["effect_size" if "effect_size" in table.columns else "shift"].to_numpy(dtype=float)
    above, below = (level < fdr) & (effect > 0), (level < fdr) & (effect < 0)
    colours = np.where(above, shared.TOWARDS_COLOUR, np.where(below, shared.AWAY_COLOUR, shared.OTHER_COLOUR))
    return colours.astype(object), (int(above.sum()), int(below.sum()), int((~above & ~below).sum()))


def exact_of(table: pd.DataFrame) -> np.ndarray:
    """Which genes were computed exactly."""
    return table["exact"].to_numpy(dtype=bool) if "exact" in table.columns else np.ones(len(table), dtype=bool)


def legend(ax: Axes, counts: tuple[int, int, int], *, signed: bool, screened: bool, band: bool, fdr: float) -> None:
    """Say beside the axes what the colours mean and how many genes have them."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    above, below, rest = counts
    words = ("further towards the goal", "further away") if signed else ("further than", "less far than")
    handles: list[Artist] = []
    labels: list[str] = []
    for n, colour, word in ((above, shared.TOWARDS_COLOUR, words[0]), (below, shared.AWAY_COLOUR, words[1])):
        if n:
            handles.append(_style.dot(colour))
            labels.append(f"{word}: {n:,}" if signed else f"{word} genes alike: {n:,}")
    handles.append(_style.dot(shared.OTHER_COLOUR))
    labels.append(f"{'as genes alike' if above + below else f'none at FDR {fdr:g}'}: {rest:,}")
    if screened:
        handles.append(
            Line2D([], [], marker="o", linestyle="", markersize=5, color="white", markeredgecolor=_style.QUIET_COLOUR)
        )
        labels.append("open: screened")
    if band:
        handles.append(Patch(color=shared.BAND_COLOUR))
        labels.append("95 % of genes alike")
    _style.legend_beside(ax, handles, labels)


def _chosen(
    table: pd.DataFrame, value: str, n_genes: int, genes: list[str] | tuple[str, ...] | None, *, signed: bool
) -> np.ndarray:
    """Rows of the genes to name, the most important first."""
    if genes is not None:
        unknown = [gene for gene in genes if gene not in set(table["gene"])]
        if unknown:
            raise ScbinInputError(
                "P63", f"{unknown[0]!r} is not among the {len(table):,} perturbed genes with a shift."
            )
        return np.flatnonzero(table["gene"].isin(genes))
    n = len(table)
    top = np.arange(min(n_genes, n))
    if not signed:
        return top
    bottom = np.arange(n - 1, max(n - 1 - n_genes, len(top) - 1), -1)
    bottom = bottom[table[value].to_numpy()[bottom] < 0]
    return np.concatenate([top, bottom])


def _draw_band(ax: Axes, x: np.ndarray, table: pd.DataFrame) -> bool:
    """Fill between the limits of the null genes, as a running median: neighbours in shift differ in expression."""
    if "null_low" not in table.columns:
        return False
    limits = table[["null_low", "null_high"]].to_numpy(dtype=float)
    known = np.isfinite(limits).all(axis=1)
    if not known.any():
        return False
    half = max(1, int(WINDOW * known.sum() / 2))
    where = np.flatnonzero(known)
    smooth = np.array([np.median(limits[where[max(0, i - half) : i + half + 1]], axis=0) for i in range(len(where))])
    ax.fill_between(x[where], smooth[:, 0], smooth[:, 1], color=shared.BAND_COLOUR, linewidth=0, zorder=0)
    return True


def _draw_intervals(ax: Axes, x: np.ndarray, table: pd.DataFrame, chosen: np.ndarray, colours: np.ndarray) -> None:
    if "shift_low" not in table.columns:
        return
    low, high = (table[name].to_numpy(dtype=float)[chosen] for name in ("shift_low", "shift_high"))
    known = np.isfinite(low) & np.isfinite(high)
    ax.vlines(x[chosen][known], low[known], high[known], colors=list(colours[chosen][known]), linewidth=0.7, alpha=0.6)
