"""`pl.perturbation_volcano`: how large an effect is, and how sure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scbin.get._perturb import perturb_df, read_perturbation
from scbin.pl import _perturbation_labels as shared
from scbin.pl import _style
from scbin.pl._perturbation import SIGNIFICANT, _chosen, colour_by_direction, exact_of, legend

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

SMALLEST = 1e-300


def perturbation_volcano(
    adata: AnnData,
    *,
    key: str | None = None,
    group: str | None = None,
    n_genes: int = 8,
    genes: list[str] | tuple[str, ...] | None = None,
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
    >>> table = pandas.DataFrame({"gene": list("ABC"), "shift": [0.1, 0.4, -0.2], "effect_size": [0.2, 6, -1]})
    >>> table["p_value"], table["fdr"] = [0.8, 1e-6, 0.3], [0.8, 3e-6, 0.45]
    >>> adata.uns["scbin_perturb"] = {"table": table, "params": "{}"}
    >>> scbin.pl.perturbation_volcano(adata).get_xlabel()
    'effect in standard deviations of genes alike'
    """
    params = read_perturbation(adata, key)[1]
    table = shared.one_group(perturb_df(adata, key=key, group=group), group)
    table = shared.checked(table, ("gene", "effect_size", "p_value", "fdr"))
    x = table["effect_size"].to_numpy(dtype=float)
    p_values = table["p_value"].to_numpy(dtype=float)
    y = -np.log10(np.maximum(p_values, SMALLEST))
    order = np.argsort(p_values, kind="stable")
    if genes is None:
        sides = [order[x[order] > 0][:n_genes], order[x[order] < 0][:n_genes]]
        chosen = np.concatenate([side[table["fdr"].to_numpy()[side] < fdr] for side in sides])
    else:
        chosen = _chosen(table, "effect_size", 0, genes, signed=True)
    ax = shared.new_axes(6.4, 4.2) if ax is None else ax
    ax.axvline(0, color=_style.QUIET_COLOUR, linewidth=0.6, zorder=1)
    colours, counts = colour_by_direction(table, fdr)
    exact = exact_of(table)
    for shown, face in ((exact, colours), (~exact, np.full(len(table), "white", dtype=object))):
        ax.scatter(
            x[shown], y[shown], s=14, c=list(face[shown]), edgecolors=list(colours[shown]), linewidths=0.7, zorder=4
        )
    ax.margins(x=0.08, y=0.08)
    ax.set_ylim(bottom=-0.02 * max(float(y.max()), 1.0))
    significant = table["fdr"].to_numpy(dtype=float) < fdr
    if significant.any():
        line = -np.log10(max(p_values[significant].max(), SMALLEST))
        ax.axhline(line, color=_style.QUIET_COLOUR, linewidth=0.7, linestyle=(0, (4, 3)), zorder=1)
        ax.annotate(
            f"FDR {fdr:g}",
            (1, line),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 2),
            textcoords="offset points",
            ha="right",
            fontsize=7.5,
            color=_style.QUIET_COLOUR,
        )
    _style.frame(ax)
    ax.set_xlabel("effect in standard deviations of genes alike", fontsize=9, color=_style.TEXT_COLOUR)
    replicates = table["replicates"].iloc[0] if "replicates" in table.columns else None
    over = {"donors": " (donors as replicates)", "cells": " (cells as replicates)"}.get(str(replicates), "")
    ax.set_ylabel(f"-log10 p{over}", fontsize=9, color=_style.TEXT_COLOUR)
    ax.set_title(shared.title_of(params) if title is None else title, fontsize=11, loc="left", parse_math=False)
    signed = shared.is_signed(table, params)
    legend(ax, counts, signed=signed, screened=bool((~exact).any()), band=False, fdr=fdr)
    shared.label_points(ax, x[chosen], y[chosen], table["gene"].iloc[chosen].tolist(), np.column_stack([x, y]))
    return ax
