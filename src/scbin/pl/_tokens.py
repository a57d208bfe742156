"""`pl.tokens`: what the model reads of one cell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scbin._anndata import read_tokens
from scbin._errors import ScbinInputError
from scbin.get._tokens import cell_number, tokens_df
from scbin.pl import _style

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes
    from scipy.sparse import csr_matrix

    from scbin.encoding.vocabulary import Vocabulary

PER_ROW = 6
EXPLAINED = {
    "bins": "a tile is a gene: its bin of expression, and the {reads} value the bin stands for; highest bins first",
    "binary": "a tile is an expressed gene, in the order of the vocabulary",
    "rank": "a tile is a gene, in order of its expression relative to the gene's median in all cells",
    "gene_bins": "a tile is a gene together with its bin of expression, a word of its own; highest bins first",
}


def tokens(
    adata: AnnData | csr_matrix,
    cell: int | str = 0,
    *,
    n_genes: int = 30,
    vocabulary: Vocabulary | None = None,
    tokens_key: str | None = None,
    cmap: str = "YlGnBu",
    ax: Axes | None = None,
) -> Axes:
    """Draw what the model reads of one cell: its control tokens in words, then its strongest genes.

    Parameters
    ----------
    adata
        A tokenized AnnData, or a token matrix together with its `vocabulary`.
    cell
        The cell, by number or by name.
    n_genes
        How many genes to show: the first ones by rank, or those with the highest bins.
    vocabulary
        What the tokens mean. Default: the one stored in `adata`.
    tokens_key
        The slot of `obsm` with the tokens. Default: `"X_tokens"`.
    cmap
        Colours for bins and ranks.
    ax
        The axes to draw in.

    Returns
    -------
    The axes.

    Examples
    --------
    >>> import numpy, scbin
    >>> from scipy.sparse import csr_matrix
    >>> from scbin.encoding.vocabulary import Vocabulary
    >>> vocabulary = Vocabulary.build("rank", ["CD3E", "LYZ"], max_length=6)
    >>> tokens = csr_matrix(numpy.array([[2, 4, 6, 5, 3, 0]]))
    >>> ax = scbin.pl.tokens(tokens, vocabulary=vocabulary)
    >>> ax.get_title(loc="left")
    'Cell 0: 5 tokens, 2 genes'
    """
    if n_genes < 1:
        raise ScbinInputError("P11", f"n_genes={n_genes}; at least one gene is needed for a picture.")
    table = tokens_df(adata, cell, vocabulary=vocabulary, tokens_key=tokens_key)
    name = str(cell)
    if hasattr(adata, "obsm"):
        matrix, vocabulary = read_tokens(adata, vocabulary, key=tokens_key)
        name = str(adata.obs_names[cell_number(cell, matrix.shape[0], adata.obs_names)])
    if vocabulary is None or table.empty:
        raise ScbinInputError("P12", f"cell {name!r} has no tokens: obs['scbin_status'] says why.")
    genes = table[table["kind"] == "gene"]
    by = ["rank"] if vocabulary.encoding == "rank" else ["bin", "position"]
    top = genes.sort_values(by, ascending=[by[0] == "rank", True][: len(by)], kind="stable").head(n_genes)
    control = table[table["kind"] != "gene"]
    tiles = [_control_tile(row) for row in control.itertuples() if row.text != "[END]"]
    n_control_rows = -(-len(tiles) // PER_ROW)
    ax = _new_axes(n_control_rows + -(-len(top) // PER_ROW)) if ax is None else ax
    for i, (caption, text) in enumerate(tiles):
        _tile(ax, i, text, caption, face="white", edge=_style.QUIET_COLOUR)
    for i, (row, colour) in enumerate(zip(top.itertuples(), _colours(top, vocabulary, cmap), strict=True)):
        _tile(ax, i, row.name, _gene_caption(row, vocabulary), face=colour, first_row=n_control_rows)
    n_rows = n_control_rows + -(-len(top) // PER_ROW)
    _finish(
        ax,
        n_rows,
        vocabulary,
        f"Cell {_style.shorten(name)}: {len(table):,} tokens, {len(genes):,} genes",
        len(genes) - len(top),
    )
    return ax


def _control_tile(row: Any) -> tuple[str, str]:
    """Caption and text of a control token: what is asked, and the answer."""
    if row.kind == "phenotype":
        return row.name.replace("_", " "), "not given" if row.text == f"[NO_{row.name.upper()}]" else row.text[1:-1]
    return {"[CLS]": "whole cell", "[START]": "genes follow", "[MASK]": "hidden"}.get(row.text, "control"), row.text


def _gene_caption(row: Any, vocabulary: Vocabulary) -> str:
    if vocabulary.encoding == "rank":
        return f"rank {row.rank:,.0f}"
    if vocabulary.n_levels == 2:
        return "expressed" if row.bin else "not expressed"
    return f"bin {row.bin:.0f} ≈ {row.value:.3g}" if row.bin else "bin 0: not expressed"


def _colours(top: pd.DataFrame, vocabulary: Vocabulary, cmap: str) -> np.ndarray:
    """Colour of each gene tile (genes, 4): light for low bins and late ranks."""
    import matplotlib

    if vocabulary.encoding == "rank":
        shade = 1 - (top["rank"].to_numpy() - 1) / max(top["rank"].max(), 2)
    elif vocabulary.n_levels == 2:
        shade = 0.75 * top["bin"].to_numpy()
    else:
        shade = top["bin"].to_numpy() / (vocabulary.n_levels - 1)
    return matplotlib.colormaps[cmap](0.08 + 0.82 * shade)


def _tile(ax: Axes, i: int, text: str, caption: str, *, face: Any, edge: Any = "none", first_row: int = 0) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import FancyBboxPatch

    x, y = i % PER_ROW, first_row + i // PER_ROW
    box = FancyBboxPatch(
        (x + 0.07, y + 0.14), 0.86, 0.72, boxstyle="round,pad=0.0,rounding_size=0.12", fc=face, ec=edge, lw=0.8
    )
    ax.add_patch(box)
    ink = "white" if np.dot(to_rgb(face), [0.299, 0.587, 0.114]) < 0.55 else _style.TEXT_COLOUR
    for words, height, largest in ((_style.shorten(text, 16), 0.42, 8.5), (_style.shorten(caption, 24), 0.70, 6.0)):
        size = min(largest, _tile_points(ax) / (0.62 * max(len(words), 1)))
        ax.text(x + 0.5, y + height, words, color=ink, ha="center", va="center", fontsize=size, parse_math=False)


def _tile_points(ax: Axes) -> float:
    """Width inside a tile in points: text is made to fit into it, also in small axes."""
    figure = ax.get_figure(root=True)
    inches = ax.get_position().width * figure.get_size_inches()[0] if figure is not None else PER_ROW
    return 72 * 0.78 * inches / PER_ROW


def _finish(ax: Axes, n_rows: int, vocabulary: Vocabulary, title: str, n_more: int) -> None:
    ax.set_xlim(0.07, PER_ROW - 0.07)
    ax.set_ylim(n_rows + (0.6 if n_more else 0), 0)
    if n_more:
        text = f"and {n_more:,} more gene{'' if n_more == 1 else 's'}"
        ax.text(PER_ROW - 0.07, n_rows + 0.3, text, ha="right", va="center", fontsize=7.5, color=_style.QUIET_COLOUR)
    ax.set_axis_off()
    explanation = EXPLAINED[vocabulary.encoding].format(reads=vocabulary.bins and vocabulary.bins.reads)
    ax.set_title(title, loc="left", fontsize=11, color=_style.TEXT_COLOUR, parse_math=False, pad=18)
    ax.text(0.0, 1.01, explanation, transform=ax.transAxes, va="bottom", fontsize=8, color=_style.QUIET_COLOUR)


def _new_axes(n_rows: int) -> Axes:
    import matplotlib.pyplot as plt

    height = 0.55 * n_rows + 0.9
    margins = {"left": 0.015, "right": 0.985, "bottom": 0.02, "top": 1 - 0.6 / height}
    return plt.subplots(figsize=(1.25 * PER_ROW, height), gridspec_kw=margins)[1]
