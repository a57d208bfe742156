"""Plots of a model: its losses, and what it reads of a cell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scbin import _docs
from scbin._adata import read_tokens
from scbin._errors import ScbinInputError
from scbin.get import cell_number, history_df, tokens_df
from scbin.pl import _style

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

    from scbin.tokens.tokens import Tokens

VALIDATION, PER_ROW = "validation_", 6


@_docs.shared
def training(source: AnnData | pd.DataFrame | Any, *, ax: Axes | None = None) -> Axes:
    """Plot the losses of a training run, in training and on held-out cells.

    If the loss rises on held-out cells while it falls in training, the model overfits: train for fewer epochs, or choose a
    smaller model. The dotted line is the loss on held-out cells before the first step. If the curve does not fall below it, training
    did not help.

    Parameters
    ----------
    source
        The trained `Model`, or the `AnnData` on which it was trained.
    {axes}

    Examples
    --------
    >>> import pandas, scbin
    >>> history = pandas.DataFrame({"step": [1, 2, 3], "loss": [3.0, 2.0, 1.5]})
    >>> scbin.pl.training(history).get_xlabel()
    'step'
    """
    history = history_df(source).set_index("step")
    measured = [str(name).removeprefix(VALIDATION) for name in history if str(name).startswith(VALIDATION)]
    losses = [name for name in measured if f"loss_{name}" in history] or [""]
    ax = _style.new_axes() if ax is None else ax
    lines, names = [], []
    for loss, colour in zip(losses, _style.palette(len(losses)), strict=True):
        values = history[f"loss_{loss}" if loss else "loss"].dropna()
        prefix = f"{loss.replace('_', ' ')}, " if loss else ""
        running = values.rolling(max(len(values) // 12, 1), center=True, min_periods=1).mean()
        ax.plot(values, color=colour, linewidth=0.6, alpha=0.3)  # what was measured faintly, and its running mean
        lines += ax.plot(running, color=colour, linewidth=1.8)
        names.append(f"{prefix}training")
        held_out = history.get(VALIDATION + loss, values[:0]).dropna()
        if len(held_out):
            lines += ax.plot(held_out, color=colour, linewidth=1.2, linestyle="--", marker="o", markersize=3.5)
            names.append(f"{prefix}held-out cells")
        if 0 in held_out.index:
            lines.append(ax.axhline(float(held_out.loc[0]), color=colour, linewidth=1, linestyle=":"))
            names.append(f"{prefix}at the start")
    _style.legend_beside(ax, lines, names)
    ax.set(xlabel="step", ylabel="loss")
    return ax


@_docs.shared
def tokens(
    adata: AnnData | Tokens,
    cell: int | str = 0,
    *,
    n_genes: int = 30,
    tokens_key: str | None = None,
    ax: Axes | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw the tokens of one cell: the control tokens in words, then the strongest genes.

    Parameters
    ----------
    {tokenized}
    cell
        Number or name of the cell.
    n_genes
        How many genes to show: the first ones by rank, or those with the highest values.
    {tokens_key}
    {ax}
    **kwargs
        For `seaborn.heatmap`: `cmap`, `annot_kws` and more.

    Returns
    -------
    The axes.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()
    >>> scbin.pp.tokenize(adata)
    >>> ax = scbin.pl.tokens(adata, 0, n_genes=12)
    >>> ax.get_title(loc="left").startswith("Cell AAAGCCTGGCTAAC-1")
    True
    """
    import seaborn as sns

    source = read_tokens(adata, key=tokens_key)
    table, name = tokens_df(source, cell), str(source.names[cell_number(cell, source)])
    genes = table[table["kind"] == "gene"]
    top = genes.sort_values("value", ascending=False, kind="stable").head(n_genes)
    if top.empty:
        raise ScbinInputError("I19", f"cell {name!r} has no gene to draw; see obs['scbin_status'] and n_genes=.")
    missing, shade = -len(top) % PER_ROW, top["value"] / max(top["value"].max(), 1e-12)
    values = np.pad(shade.to_numpy(), (0, missing), constant_values=np.nan).reshape(-1, PER_ROW)
    notes = [f"{row.value:.3g}" if np.isnan(row.rank) else f"rank {row.rank:.0f}" for row in top.itertuples()]
    words = [f"{_style.shorten(gene, 16)}\n{note}" for gene, note in zip(top["name"], notes, strict=True)]
    ax = _style.new_axes(1.25 * PER_ROW, 0.5 * len(values) + 0.9) if ax is None else ax
    style: dict[str, Any] = {"cmap": "YlGnBu", "vmin": -0.1, "vmax": 1.1, "cbar": False, "linewidths": 3, "fmt": ""}
    style |= {"annot_kws": {"fontsize": 8}, "xticklabels": False, "yticklabels": False}
    sns.heatmap(values, annot=np.array(words + [""] * missing).reshape(-1, PER_ROW), ax=ax, **style | kwargs)
    control = table[table["kind"] != "gene"]
    said = [row.text if row.kind == "special" else f"{row.name}: {row.text[1:-1]}" for row in control.itertuples()]
    title = f"Cell {_style.shorten(name)}: {len(table):,} tokens; the first {len(top)} of {len(genes):,} genes"
    ax.set_title(f"{title}\n{'   '.join(said)}", loc="left", fontsize=10)
    return ax
