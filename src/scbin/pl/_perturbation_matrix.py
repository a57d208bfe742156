"""`pl.perturbation_matrix`: pairs of genes, and whether both together do more than the sum of either."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from scbin._errors import ScbinInputError
from scbin.get._perturb import pairs_of, perturb_df, read_perturbation
from scbin.pl import _perturbation_labels as shared
from scbin.pl import _style
from scbin.pl._perturbation import SIGNIFICANT

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

MOST_GENES = 60
VALUES = {
    "combined_minus_sum": "both together, beyond the sum of either",
    "combined_shift": "shift by both together",
}


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

    A ring marks pairs at the false discovery rate of the table: where it tells of the difference from the sum of the two single
    shifts, those for which it is not zero. Genes stand in
    the order of their mean value, so that strong ones meet in a corner.

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
        Pairs below this false discovery rate get a ring.
    cmap
        Colours. Default: blue for less, red for more where values have both signs.
    title
        Text above the axes.
    ax
        The axes to draw in.

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
    if value not in (None, *VALUES):
        raise ScbinInputError("P75", f"value is {value!r}; choose one of {', '.join(map(repr, VALUES))}.")
    params = read_perturbation(adata, key)[1]
    table = shared.one_group(perturb_df(adata, key=key, group=group, sort_by=None), group)
    table = pairs_of(table)
    if value is None:
        value = "combined_minus_sum" if "combined_minus_sum" in table.columns else "combined_shift"
    table = shared.checked(table, ("anchor", value))
    anchors, partners, values, rings = _matrix(table, value, fdr)
    if max(values.shape) > MOST_GENES:
        raise ScbinInputError(
            "P65",
            f"a matrix of {values.shape[0]} x {values.shape[1]} genes cannot be read; the most is {MOST_GENES}. Perturb fewer pairs, "
            "or sort scbin.get.perturb_df(adata).",
        )
    size = (max(4.8, 2.6 + 0.3 * len(partners)), 1.6 + 0.3 * len(anchors))  # room for the title
    ax = shared.new_axes(*size) if ax is None else ax
    _draw(ax, values, rings, cmap, value)
    _label(ax, anchors, partners)
    if rings.any():
        ax.set_xlabel(f"ring: FDR < {fdr:g}", fontsize=8, color=_style.QUIET_COLOUR, loc="left")
    text = f"{shared.title_of(params).replace('Genes', 'Pairs')}\n{VALUES[value]}" if title is None else title
    ax.set_title(text, fontsize=10, loc="left", parse_math=False, pad=8)
    return ax


def _matrix(table: pd.DataFrame, value: str, fdr: float) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """Names of rows and columns, values (NaN where no pair was perturbed), and which pairs get a ring.

    Where genes are anchors and partners alike (all pairs of a list), the matrix is square and filled on both sides.
    """
    anchors, partners = (table[name].astype(str).to_numpy() for name in ("anchor", "gene"))
    values = table[value].to_numpy(dtype=float)
    name = f"{value}_fdr" if f"{value}_fdr" in table.columns else "fdr"
    level = table[name].to_numpy(dtype=float) if name in table.columns else np.full(len(table), np.nan)
    if set(anchors) & set(partners):
        anchors, partners = np.concatenate([anchors, partners]), np.concatenate([partners, anchors])
        values, level = np.tile(values, 2), np.tile(level, 2)
    rows, columns = _ordered(anchors, values), _ordered(partners, values)
    matrix, rings = np.full((len(rows), len(columns)), np.nan), np.zeros((len(rows), len(columns)), dtype=bool)
    at = ([rows.index(name) for name in anchors], [columns.index(name) for name in partners])
    matrix[at], rings[at] = values, level < fdr
    return rows, columns, matrix, rings


def _ordered(names: np.ndarray, values: np.ndarray) -> list[str]:
    """Names by their mean value, the largest first; equal ones by name."""
    unique, codes = np.unique(names, return_inverse=True)
    mean = np.bincount(codes, weights=values) / np.bincount(codes)
    return [str(unique[i]) for i in np.lexsort((np.arange(len(unique)), -mean))]


def _draw(ax: Axes, values: np.ndarray, rings: np.ndarray, cmap: str | None, value: str) -> None:
    known = values[np.isfinite(values)]
    both_signs = value == "combined_minus_sum" or known.min() < 0
    limit = max(float(np.abs(known).max()), 1e-12)
    limits = (-limit, limit) if both_signs else (0.0, limit)
    shown = np.ma.masked_invalid(values)
    ax.set_facecolor("#dfe2e6")  # no such pair
    colours = cmap or ("RdBu_r" if both_signs else "viridis")
    mesh = ax.pcolormesh(shown, cmap=colours, vmin=limits[0], vmax=limits[1], edgecolors="white", linewidth=1.0)
    y, x = np.nonzero(rings)
    strong = np.abs(values[y, x]) > 0.6 * limit if both_signs else values[y, x] < 0.6 * limit
    ax.scatter(
        x + 0.5,
        y + 0.5,
        s=22,
        facecolors="none",
        edgecolors=list(np.where(strong, "white", _style.TEXT_COLOUR)),
        linewidths=0.9,
    )
    ax.set_aspect("equal")
    ax.invert_yaxis()
    _style.colour_bar(ax, mesh, extend="neither")


def _label(ax: Axes, anchors: list[str], partners: list[str]) -> None:
    ax.set_xticks(np.arange(len(partners)) + 0.5, [_style.shorten(name, 16) for name in partners], rotation=90)
    ax.set_yticks(np.arange(len(anchors)) + 0.5, [_style.shorten(name, 16) for name in anchors])
    for label in (*ax.get_xticklabels(), *ax.get_yticklabels()):
        label.set_parse_math(False)
    ax.tick_params(length=0, labelsize=8, labelcolor=_style.TEXT_COLOUR)
    ax.spines[:].set_visible(False)
