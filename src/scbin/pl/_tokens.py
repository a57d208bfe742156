"""`pl.tokens`: what the model reads of one cell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scbin import _docs
from scbin._adata import read_tokens
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.get.tables import cell_number, tokens_df
from scbin.pl import _style

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

    from scbin.tokens.tokens import Tokens

PER_ROW = 6
CONTROL = {"[CLS]": "whole cell", "[START]": "genes follow", "[MASK]": "hidden"}


@_docs.shared
@checked
def tokens(
    adata: AnnData | Tokens,
    cell: int | str = 0,
    *,
    n_genes: int = 30,
    tokens_key: str | None = None,
    cmap: str = "YlGnBu",
    ax: Axes | None = None,
) -> Axes:
    """Draw what the model reads of one cell: its control tokens in words, then its strongest genes.

    Parameters
    ----------
    {tokenized}
    cell
        The cell, by number or by name.
    n_genes
        How many genes to show: the first ones by rank, or those with the highest values.
    {tokens_key}
    cmap
        Colours of the genes, from the lowest value (or latest rank) to the highest.
    {ax}

    Returns
    -------
    The axes.

    Raises
    ------
    ScbinInputError
        If the cells are not tokenized, there is no such cell, or it has no tokens.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()
    >>> scbin.pp.tokenize(adata)
    >>> ax = scbin.pl.tokens(adata, 0, n_genes=12)
    >>> ax.get_title(loc="left").startswith("Cell AAAGCCTGGCTAAC-1")
    True
    """
    import matplotlib

    if n_genes < 1:
        raise ScbinInputError("A02", f"n_genes is {n_genes}; at least one gene is needed for a picture.")
    source = read_tokens(adata, key=tokens_key)
    table, name = tokens_df(source, cell), str(source.names[cell_number(cell, source)])
    if table.empty:
        raise ScbinInputError("I19", f"cell {name!r} has no tokens: obs['scbin_status'] says why.")
    genes = table[table["kind"] == "gene"]
    ranked = bool(genes["rank"].notna().any())
    by, ascending = (["rank"], [True]) if ranked else (["value", "bin", "position"], [False, False, True])
    top = genes.sort_values(by, ascending=ascending, kind="stable").head(n_genes)
    shade = 1 - (top["rank"] - 1) / max(top["rank"].max(), 2) if ranked else top["value"] / top["value"].max()
    colours = matplotlib.colormaps[cmap](0.08 + 0.82 * shade.fillna(0))
    control = table[(table["kind"] != "gene") & (table["text"] != "[END]")]
    n_above = -(-len(control) // PER_ROW)
    n_rows = n_above + -(-len(top) // PER_ROW)
    ax = _style.new_axes(1.25 * PER_ROW, 0.55 * n_rows + 0.9) if ax is None else ax
    for i, row in enumerate(control.itertuples()):
        text, caption = row.text, CONTROL.get(row.text, "control")
        if row.kind == "phenotype":
            text = "not given" if row.text == f"[NO_{row.name.upper()}]" else row.text[1:-1]
            caption = row.name.replace("_", " ")
        _tile(ax, i, text, caption, face="white", edge=_style.QUIET)
    for i, (row, colour) in enumerate(zip(top.itertuples(), colours, strict=True)):
        caption = f"rank {row.rank:,.0f}" if ranked else f"{row.value:.3g}" if row.value else "not expressed"
        _tile(ax, n_above * PER_ROW + i, row.name, caption, face=colour)
    ax.set(xlim=(0.07, PER_ROW - 0.07), ylim=(n_rows, 0))
    ax.set_axis_off()
    more = f", {len(genes) - len(top):,} of them not shown" if len(genes) > len(top) else ""
    title = f"Cell {_style.shorten(name)}: {len(table):,} tokens, {len(genes):,} genes{more}"
    ax.set_title(title, loc="left", fontsize=11, parse_math=False)
    return ax


def _tile(ax: Axes, i: int, text: str, caption: str, *, face: Any, edge: Any = "none") -> None:
    """Draw the i-th token as a box with its text and, smaller, what it says."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import FancyBboxPatch

    y, x = divmod(i, PER_ROW)
    box = FancyBboxPatch((x + 0.07, y + 0.14), 0.86, 0.72, boxstyle="round,pad=0,rounding_size=0.12", fc=face, ec=edge)
    ax.add_patch(box)
    ink = "white" if np.dot(to_rgb(face), [0.299, 0.587, 0.114]) < 0.55 else "#333333"
    figure: Any = ax.get_figure(root=True)
    wide = ax.get_window_extent().width / figure.dpi / PER_ROW  # of a tile, in inches
    for words, height, largest in ((_style.shorten(text, 16), 0.42, 8.5), (_style.shorten(caption, 24), 0.70, 6.0)):
        size = min(largest, 72 * 0.78 * wide / (0.62 * max(len(words), 1)))  # fits into the tile
        ax.text(x + 0.5, y + height, words, color=ink, ha="center", va="center", fontsize=size, parse_math=False)
