"""Plots of what a model knows: networks of genes, ROC curves of classes of genes, clocks and age gaps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scbin import _docs, _keys
from scbin._adata import check_adata, read_uns
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.get.networks import network_df
from scbin.pl import _style

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes


@_docs.shared
@checked
def gene_network(
    adata: AnnData, genes: str | Sequence[str] | None = None, *, n_edges: int = 50, group: str | None = None,
    key: str | None = None, seed: int = 0, title: str | None = None, ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Plot the strongest edges of a network of genes, laid out by networkx: negative weights are orange.

    Parameters
    ----------
    adata
        Cells with a network (:func:`scbin.tl.gene_network`).
    genes
        Edges from these genes. Default: the strongest of all.
    n_edges
        How many edges.
    group
        The network of this group of cells.
    key
        The slot of `varp`. Default: `"scbin_network"`.
    {seed}
    {title}
    {ax}

    Returns
    -------
    The axes.

    Raises
    ------
    ScbinInputError
        If there is no network, or it has no such edges.

    Examples
    --------
    >>> import anndata, numpy, scbin
    >>> from scipy.sparse import csr_matrix
    >>> adata = anndata.AnnData(numpy.ones((1, 3)))
    >>> adata.varp["scbin_network"] = csr_matrix([[0, 0.5, -0.2], [0, 0, 0], [0, 0, 0]])
    >>> len(scbin.pl.gene_network(adata).texts)
    3
    """
    try:
        import networkx as nx
        from matplotlib.patheffects import withStroke
    except ImportError as error:
        raise ScbinInputError("A05", "networks are laid out by networkx: pip install 'scbin[networks]'.") from error
    edges = network_df(adata, genes, group=group, key=key)[:n_edges]
    if edges.empty:
        raise ScbinInputError("A06", "this network has no such edges. Raise n_edges= in scbin.tl.gene_network.")
    graph = nx.from_pandas_edgelist(edges.assign(strength=edges["weight"].abs()), edge_attr=["weight", "strength"])
    ax = _style.new_axes(6.4, 5.6) if ax is None else ax
    places = nx.spring_layout(graph, seed=seed, weight="strength", k=2.5 / np.sqrt(len(graph)))
    weights = np.array([weight for _, _, weight in graph.edges.data("weight")])
    colors = np.where(weights < 0, _style.SECOND, _style.MAIN).tolist()
    widths = (0.5 + 2.5 * np.abs(weights) / np.abs(weights).max()).tolist()
    nx.draw_networkx_edges(graph, places, ax=ax, edge_color=colors, width=widths, alpha=0.6)
    sources = set(edges["source"])
    fill = [_style.QUIET if node in sources else _style.MISSING for node in graph]
    nx.draw_networkx_nodes(graph, places, ax=ax, node_size=60, node_color=fill)
    for node, (x, y) in places.items():
        place: dict[str, Any] = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "fontsize": 7}
        ax.annotate(
            str(node), (x, y), parse_math=False, path_effects=[withStroke(linewidth=2, foreground="white")], **place
        )
    ax.set_axis_off()
    ax.set_title("" if title is None else title)
    return ax


@_docs.shared
def gene_roc(
    adata: AnnData, methods: Sequence[str] | None = None, *, title: str | None = None, ax: Axes | None = None
) -> Axes:
    """Plot the mean ROC curve of each method that told classes of genes, in the last cross-validation over genes.

    Parameters
    ----------
    adata
        Cells that `scbin.tl.evaluate(adata, model, target=..., level="gene")` was called on.
    methods
        Which methods. Default: all. With one, a band shows the standard deviation over folds.
    {title}
    {ax}

    Returns
    -------
    The axes.

    Raises
    ------
    ScbinInputError
        If there are no curves, or none of a method.

    Examples
    --------
    >>> import anndata, numpy, pandas, scbin
    >>> adata = anndata.AnnData(numpy.ones((1, 3)))
    >>> curve = {"method": "detection", "fpr": [0, 0.5, 1], "tpr": [0, 0.8, 1], "sd": 0.1}
    >>> adata.uns["scbin"] = {"gene_roc": pandas.DataFrame(curve)}
    >>> scbin.pl.gene_roc(adata).get_xlabel()
    'false positive rate'
    """
    table = _table(adata, _keys.GENE_ROC, "scbin.tl.evaluate(adata, model, target=..., level='gene')")
    chosen = list(dict.fromkeys(table["method"])) if methods is None else list(methods)
    if unknown := sorted(set(chosen) - set(table["method"])):
        raise ScbinInputError(
            "A06", f"no curve of {unknown[0]!r}; there are: {', '.join(dict.fromkeys(table['method']))}."
        )
    ax = _style.new_axes(5.6, 4.0) if ax is None else ax
    lines = []
    for method, color in zip(chosen, _style.palette(len(chosen)), strict=True):
        curve = table[table["method"] == method]
        lines += ax.plot(curve["fpr"], curve["tpr"], color=color, linewidth=1.4)
        if len(chosen) == 1:
            low, high = (curve["tpr"] - curve["sd"]).clip(0), (curve["tpr"] + curve["sd"]).clip(upper=1)
            ax.fill_between(curve["fpr"], low, high, color=color, alpha=0.2, linewidth=0)
    ax.plot([0, 1], [0, 1], color=_style.QUIET, linestyle=":", linewidth=1)
    ax.set(xlabel="false positive rate", ylabel="true positive rate", title=title or "")
    ax.spines[["top", "right"]].set_visible(False)
    _style.legend_beside(ax, lines, chosen)
    return ax


@_docs.shared
def clock(adata: AnnData, *, title: str | None = None, ax: Axes | None = None) -> Axes:
    """Plot the predicted age of every donor against the true one, with the line that gaps are corrected by.

    Parameters
    ----------
    adata
        Cells with age gaps (:func:`scbin.tl.age_gap`).
    {title}
    {ax}

    Returns
    -------
    The axes.

    Raises
    ------
    ScbinInputError
        If there are no age gaps.

    Examples
    --------
    >>> import anndata, numpy, scbin
    >>> adata = anndata.AnnData(numpy.ones((4, 2)))
    >>> adata.obs["donor"] = list("abcd")
    >>> adata.obs["age"], adata.obs["scbin_age"] = [20.0, 40.0, 60.0, 80.0], [40.0, 45.0, 55.0, 60.0]
    >>> _ = scbin.tl.age_gap(adata, donor_key="donor")
    >>> scbin.pl.clock(adata).get_xlabel()
    'true age of the donor'
    """
    table = _table(adata, _keys.AGE_GAP, "scbin.tl.age_gap(adata, donor_key=...)")
    ax = _style.new_axes(5.2, 4.0) if ax is None else ax
    parts = list(table.groupby(table["group"].astype(str) if "group" in table else np.full(len(table), "donors")))
    handles = []
    for (_, part), color in zip(parts, _style.palette(len(parts)), strict=True):
        handles.append(ax.scatter(part["truth"], part["predicted"], color=color, s=18))
        ends = part.sort_values("truth").iloc[[0, -1]]
        ax.plot(ends["truth"], ends["expected"], color=color, linewidth=1)
    span = [table["truth"].min(), table["truth"].max()]
    ax.plot(span, span, color=_style.QUIET, linestyle=":", linewidth=1)
    ax.set(xlabel="true age of the donor", ylabel="predicted age, mean over cells", title=title or "")
    ax.spines[["top", "right"]].set_visible(False)
    if len(parts) > 1:
        _style.legend_beside(ax, handles, [str(name) for name, _ in parts])
    return ax


@_docs.shared
def age_gap(adata: AnnData, *, corrected: bool = True, title: str | None = None, ax: Axes | None = None) -> Axes:
    """Plot the age gaps of donors as violins: by what `compare` tells apart, else by group of cells. Every dot is a donor.

    Parameters
    ----------
    adata
        Cells with age gaps (:func:`scbin.tl.age_gap`).
    corrected
        For the regression to the mean.
    {title}
    {ax}

    Returns
    -------
    The axes.

    Raises
    ------
    ScbinInputError
        If there are no age gaps.

    Examples
    --------
    >>> import anndata, numpy, scbin
    >>> adata = anndata.AnnData(numpy.ones((4, 2)))
    >>> adata.obs["donor"] = list("abcd")
    >>> adata.obs["age"], adata.obs["scbin_age"] = [20.0, 40.0, 60.0, 80.0], [40.0, 45.0, 55.0, 60.0]
    >>> _ = scbin.tl.age_gap(adata, donor_key="donor")
    >>> scbin.pl.age_gap(adata).get_ylabel()
    'age gap, corrected'
    """
    import seaborn as sns

    table, y = (
        _table(adata, _keys.AGE_GAP, "scbin.tl.age_gap(adata, donor_key=...)"),
        "corrected_gap" if corrected else "gap",
    )
    by = next((name for name in ("compare", "group") if name in table), None)
    table = table.assign(x="donors" if by is None else table[by].astype(str))
    ax = _style.new_axes(1.6 + 0.9 * table["x"].nunique(), 3.6) if ax is None else ax
    sns.violinplot(table, x="x", y=y, ax=ax, color=_style.MISSING, inner=None, linewidth=0.8, cut=0)
    sns.stripplot(table, x="x", y=y, ax=ax, color=_style.MAIN, size=4)
    ax.axhline(0, color=_style.QUIET, linestyle=":", linewidth=1)
    ax.set(xlabel="", ylabel=f"age gap, {'corrected' if corrected else 'predicted - true'}", title=title or "")
    ax.tick_params(axis="x", rotation=45 if table["x"].nunique() > 4 else 0)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _table(adata: AnnData, key: str, call: str) -> pd.DataFrame:
    table = read_uns(check_adata(adata), key, pd.DataFrame)
    if table.empty:
        raise ScbinInputError("A06", f"there is nothing to draw. Call {call} first.")
    return table
