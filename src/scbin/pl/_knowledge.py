"""Plots of what a model knows: networks of genes, ROC curves of classes of genes, clocks and age gaps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scbin import _docs, _keys
from scbin._adata import check_adata, read_uns
from scbin._errors import ScbinInputError
from scbin.get import network_df
from scbin.pl import _style

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes

APART = 4.0  # edges that genes are apart where no edges connect them


@_docs.shared
def gene_network(
    adata: AnnData,
    genes: str | Sequence[str] | None = None,
    *,
    n_edges: int = 50,
    group: str | None = None,
    key: str | None = None,
    ax: Axes | None = None,
    **kwargs: Any,
) -> Axes:
    """Plot the strongest edges of a network of genes, laid out by networkx: negative weights are orange, genes asked for bold.

    Parameters
    ----------
    adata
        Cells with a network (:func:`scbin.tl.gene_network`).
    genes
        Edges from these genes. Default: the strongest of all.
    n_edges
        How many edges; a pair of genes with one in either direction is one.
    group
        The network of this group of cells.
    key
        The slot of `varp`. Default: `"scbin_network"`.
    {ax}
    **kwargs
        For `networkx.draw_networkx`: `node_size`, `font_size`, `pos` and more.

    Returns
    -------
    The axes.

    Examples
    --------
    >>> import anndata, numpy, scbin
    >>> from scipy.sparse import csr_matrix
    >>> adata = anndata.AnnData(numpy.ones((1, 3)))
    >>> adata.varp["scbin_network"] = csr_matrix([[0, 0.5, -0.2], [0, 0, 0], [0, 0, 0]])
    >>> len(scbin.pl.gene_network(adata).texts)
    3
    """
    import networkx as nx

    edges = network_df(adata, genes, group=group, key=key)
    edges = edges[~edges[["source", "target"]].apply(frozenset, axis=1).duplicated()][:n_edges]
    if edges.empty:
        fix = "Raise n_edges= in scbin.tl.gene_network; genes that the model does not read (pp.tokenize(n_genes=)) have none"
        raise ScbinInputError("A06", f"this network has no such edges. {fix}.")
    graph = nx.from_pandas_edgelist(edges, edge_attr="weight")
    weights = np.array([weight for *_, weight in graph.edges.data("weight")])
    style: dict[str, Any] = {"edge_color": np.where(weights < 0, _style.SECOND, _style.MAIN).tolist(), "node_size": 0}
    style |= {"width": (0.5 + 2.5 * np.abs(weights) / np.abs(weights).max()).tolist(), "font_size": 8}
    steps = dict(nx.all_pairs_shortest_path_length(graph))
    style["pos"] = nx.kamada_kawai_layout(graph, {gene: dict.fromkeys(graph, APART) | steps[gene] for gene in graph})
    ax = _style.new_axes(6.4, 5.6) if ax is None else ax
    nx.draw_networkx(graph, ax=ax, bbox={"fc": "white", "ec": "none", "pad": 1}, **style | kwargs)
    bold = [genes] if isinstance(genes, str) else genes or ()
    for text in ax.texts:
        text.set_fontweight("bold" if text.get_text() in bold else "normal")
    ax.set_axis_off()
    return ax


@_docs.shared
def gene_roc(adata: AnnData, methods: Sequence[str] | None = None, *, ax: Axes | None = None) -> Axes:
    """Plot the mean ROC curve of each method that told classes of genes, in the last cross-validation over genes.

    Parameters
    ----------
    adata
        Cells that `scbin.tl.evaluate(adata, model, target=..., level="gene")` was called on.
    methods
        Which methods. Default: all. With one, a band shows the standard deviation over folds.
    {axes}

    Examples
    --------
    >>> import anndata, numpy, pandas, scbin
    >>> adata = anndata.AnnData(numpy.ones((1, 3)))
    >>> curve = {"method": "detection", "fpr": [0, 0.5, 1], "tpr": [0, 0.8, 1], "sd": 0.1}
    >>> adata.uns["scbin"] = {"gene_roc": pandas.DataFrame(curve)}
    >>> scbin.pl.gene_roc(adata).get_xlabel()
    'False positive rate'
    """
    table = _table(adata, _keys.GENE_ROC, "scbin.tl.evaluate(adata, model, target=..., level='gene')")
    methods = list(dict.fromkeys(table["method"])) if methods is None else list(methods)
    if unknown := set(methods) - set(table["method"]):
        raise ScbinInputError("A06", f"no curve of {unknown}; there are: {', '.join(dict.fromkeys(table['method']))}.")
    ax = _style.new_axes(5.6, 4.0) if ax is None else ax
    for method, color in zip(methods, _style.palette(len(methods)), strict=True):
        curve = table[table["method"] == method]
        ax.plot(curve["fpr"], curve["tpr"], color=color, linewidth=1.4)
        if len(methods) == 1:
            low, high = ((curve["tpr"] + sign * curve["sd"]).clip(0, 1) for sign in (-1, 1))
            ax.fill_between(curve["fpr"], low, high, color=color, alpha=0.2, linewidth=0)
    _style.legend_beside(ax, ax.lines, methods)
    ax.plot([0, 1], [0, 1], color=_style.QUIET, linestyle=":", linewidth=1)
    ax.set(xlabel="False positive rate", ylabel="True positive rate")
    return ax


@_docs.shared
def clock(adata: AnnData, *, ax: Axes | None = None) -> Axes:
    """Plot the predicted age of every donor against the true one, with the line that gaps are corrected by; dotted: no error.

    Parameters
    ----------
    adata
        Cells with age gaps (:func:`scbin.tl.age_gap`).
    {axes}

    Examples
    --------
    >>> import anndata, numpy, pandas, scbin
    >>> adata = anndata.AnnData(numpy.ones((2, 2)))
    >>> table = {"truth": [20, 60], "predicted": [33, 51], "expected": [32, 52]}
    >>> adata.uns["scbin"] = {"age_gap": pandas.DataFrame(table)}
    >>> scbin.pl.clock(adata).get_xlabel()
    'true age of the donor'
    """
    import seaborn as sns

    table = _table(adata, _keys.AGE_GAP, "scbin.tl.age_gap(adata, donor_key=...)")
    ax = _style.new_axes(5.2, 4.0) if ax is None else ax
    hue = "group" if "group" in table else None
    sns.scatterplot(table, x="truth", y="predicted", hue=hue, ax=ax)
    sns.lineplot(table, x="truth", y="expected", hue=hue, ax=ax, estimator=None, legend=False)
    ax.axline((table["truth"].mean(),) * 2, slope=1, color=_style.QUIET, linestyle=":", linewidth=1)
    if hue is not None:
        sns.move_legend(ax, "center left", bbox_to_anchor=(1.01, 0.5), frameon=False, title=None)
    ax.set(xlabel="true age of the donor", ylabel="predicted age, mean over cells")
    return ax


@_docs.shared
def age_gap(adata: AnnData, *, ax: Axes | None = None) -> Axes:
    """Plot the corrected age gaps of donors as violins by group of cells, and by what was compared. Every dot is a donor.

    Parameters
    ----------
    adata
        Cells with age gaps (:func:`scbin.tl.age_gap`).
    {axes}

    Examples
    --------
    >>> import anndata, numpy, pandas, scbin
    >>> adata = anndata.AnnData(numpy.ones((2, 2)))
    >>> adata.uns["scbin"] = {"age_gap": pandas.DataFrame({"corrected_gap": [1, -1]})}
    >>> scbin.pl.age_gap(adata).get_ylabel()
    'age gap, corrected'
    """
    import seaborn as sns

    table = _table(adata, _keys.AGE_GAP, "scbin.tl.age_gap(adata, donor_key=...)")
    table = table.dropna(subset="corrected_gap").assign(donors="donors")
    by = [name for name in ("group", "compare") if name in table] or ["donors"]
    table[by] = table[by].astype(str)
    ax = _style.new_axes(1.6 + 0.9 * len(table[by].drop_duplicates()), 3.6) if ax is None else ax
    how: dict[str, Any] = {"data": table, "x": by[0], "y": "corrected_gap", "hue": by[-1], "ax": ax}
    colors = _style.palette(table[by[-1]].nunique())
    sns.violinplot(**how, palette=colors, legend=len(by) > 1, inner=None, linewidth=0.8, cut=0)
    with _style.seeded():
        sns.stripplot(**how, palette="dark:black", legend=False, dodge=len(by) > 1, size=3)
    if len(by) > 1:
        sns.move_legend(ax, "center left", bbox_to_anchor=(1.01, 0.5), frameon=False, title=None)
    ax.axhline(0, color=_style.QUIET, linestyle=":", linewidth=1)
    ax.set(xlabel="", ylabel="age gap, corrected")
    return ax


def _table(adata: AnnData, key: str, call: str) -> pd.DataFrame:
    table = read_uns(check_adata(adata), key, pd.DataFrame)
    if table.empty:
        raise ScbinInputError("A06", f"there is nothing to draw. Call {call} first.")
    return table
