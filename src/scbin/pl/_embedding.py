"""`pl.embedding`: the cells as the model sees them, in two dimensions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pandas as pd

from scbin import _keys
from scbin._anndata import check_adata, matrix_of, warn
from scbin._arguments import shown, texts
from scbin._errors import ScbinInputError
from scbin.pl import _style
from scbin.pl._umap import read_embedding, umap_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes

NAMES = {"X_pca": "PCA", "X_umap": "UMAP", "X_tsne": "t-SNE", _keys.UMAP: "scbin UMAP"}


@overload
def embedding(
    adata: AnnData,
    *,
    color: str | None = None,
    basis: str = ...,
    layer: str | None = ...,
    size: float | None = ...,
    cmap: str = ...,
    title: str | None = ...,
    ax: Axes | None = ...,
) -> Axes: ...
@overload
def embedding(
    adata: AnnData,
    *,
    color: Sequence[str],
    basis: str = ...,
    layer: str | None = ...,
    size: float | None = ...,
    cmap: str = ...,
    title: str | None = ...,
    ax: None = ...,
) -> list[Axes]: ...
def embedding(
    adata: AnnData,
    *,
    color: str | Sequence[str] | None = None,
    basis: str = _keys.EMBEDDING,
    layer: str | None = None,
    size: float | None = None,
    cmap: str = "viridis",
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes | list[Axes]:
    """Draw the cells of an embedding as a UMAP.

    The UMAP is computed once (its own neighbour graph, always the same for the same embedding) and kept; it is computed
    again only when the embedding has changed. Neighbours, UMAP and colours that scanpy left in `adata` stay as they are.

    Parameters
    ----------
    adata
        The cells, with an embedding in `obsm`.
    color
        A column of `obs` or a gene; a list of them gives one panel each. Categories use the colours in
        `uns["<key>_colors"]` where scanpy has put some.
    basis
        The embedding in `obsm`. One with two columns is drawn as it is, a wider one through a UMAP.
    layer
        Where the values of a gene are read; `None` means `X`.
    size
        Area of a dot in square points. Default: smaller the more cells there are.
    cmap
        Colours for genes and other numbers.
    title
        Text above the axes. Default: `color`.
    ax
        The axes to draw in; the legend takes its room from them. Only with a single `color`.

    Returns
    -------
    The axes, or a list of them if `color` is a list. Sets the following fields:

    `adata.obsm["X_umap_scbin"]`
        Coordinates (`X_umap_<name>` for another `basis`), NaN for cells without an embedding.
    `adata.uns["scbin"]["umap"]`
        Fingerprints that tell whether the coordinates still belong to the embedding.

    Examples
    --------
    >>> import anndata, numpy, scbin
    >>> adata = anndata.AnnData(numpy.eye(6), obs={"cell_type": list("AABBCC")})
    >>> adata.obsm["X_scbin"] = numpy.random.default_rng(0).normal(size=(6, 4)).astype("float32")
    >>> ax = scbin.pl.embedding(adata, color="cell_type")
    >>> ax.get_title()
    'cell_type'
    """
    check_adata(adata)
    if adata.n_obs == 0:
        raise ScbinInputError("I48", "adata has no cells: there is nothing to plot.")
    colors = _asked(color)
    if ax is not None and len(colors) != 1:
        raise ScbinInputError(
            "P03", f"ax= takes one panel, but color= asks for {len(colors)}. Call once for each axes."
        )
    columns = [_read_color(adata, key, layer) for key in colors]  # before the UMAP: a typo costs nothing
    matrix = read_embedding(adata, basis)
    coordinates = matrix if matrix.shape[1] == 2 else umap_of(adata, basis)
    axes = _panels(columns) if ax is None else [ax]
    shown = np.isfinite(coordinates).all(axis=1)
    name = _style.shorten(NAMES.get(basis, basis.removeprefix("X_").replace("_", " ")))
    name += " UMAP" if matrix.shape[1] > 2 else ""
    for panel, column in zip(axes, columns, strict=True):
        _label_axes(panel, name, shown)
        _draw(panel, coordinates, shown, column, size=size, cmap=cmap, title=title)
    return axes[0] if color is None or isinstance(color, str) else axes


def _asked(color: str | Sequence[str] | None) -> list[str] | list[None]:
    """Return what each panel is to be coloured by."""
    if color is None:
        return [None]
    if isinstance(color, str) or not isinstance(color, Iterable):
        texts(optional=True, color=color)
        return [str(color)]
    colors = list(color)
    if not colors:
        raise ScbinInputError(
            "P13", "color is empty: there is nothing to plot. Name a column of obs or a gene, or leave it out."
        )
    for item in colors:
        texts(color=item)
    return colors


@dataclass(frozen=True)
class _Column:
    """What the dots are coloured by: `values` as categorical or as numbers; `colours` one per category."""

    name: str
    values: pd.Categorical | np.ndarray | None
    colours: tuple[str, ...] = ()
    is_gene: bool = False


def _read_color(adata: AnnData, key: str | None, layer: str | None) -> _Column:
    if key is None:
        return _Column("", None)
    if key in adata.obs.columns:
        column = adata.obs[key]
        if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
            return _Column(key, column.to_numpy(dtype=np.float64, na_value=np.nan))
        values = (
            column.array if isinstance(column.dtype, pd.CategoricalDtype) else pd.Categorical(column.astype("object"))
        )
        return _Column(key, values, _category_colours(adata, key, values.categories))
    if key in adata.var_names:
        return _Column(key, _gene_values(adata, key, layer), is_gene=True)
    from difflib import get_close_matches

    close = get_close_matches(key, [*map(str, adata.obs.columns), *map(str, adata.var_names)], n=3, cutoff=0.0)
    raise ScbinInputError(
        "I35",
        f"color={key!r} is neither a column of adata.obs nor a gene in adata.var_names. Closest: "
        f"{', '.join(map(repr, close)) or 'none'}.",
    )


def _category_colours(adata: AnnData, key: str, categories: pd.Index) -> tuple[str, ...]:
    kept = adata.uns.get(f"{key}_colors")
    if isinstance(kept, list | tuple | np.ndarray) and len(kept) >= len(categories):
        from matplotlib.colors import is_color_like

        colours = tuple(str(colour) for colour in kept[: len(categories)])
        unknown = next((colour for colour in colours if not is_color_like(colour)), None)
        if unknown is None:
            return colours
        warn(
            "P14",
            f"adata.uns['{key}_colors'] holds {shown(unknown)}, which is no colour; {key} is drawn in scbin's own.",
        )
    # a label that says that there is none is as grey as a missing one
    is_label = [str(name).strip().lower() not in {"", "unknown"} for name in categories]
    own = iter(_style.palette(sum(is_label)))
    return tuple(next(own) if label else _style.MISSING_COLOUR for label in is_label)


def _gene_values(adata: AnnData, gene: str, layer: str | None) -> np.ndarray:
    matrix = matrix_of(adata, layer)
    values = matrix[:, np.flatnonzero(adata.var_names == gene)]
    values = values.compute() if hasattr(values, "compute") else values
    values = values.toarray() if hasattr(values, "toarray") else np.asarray(values)
    return values.sum(axis=1, dtype=np.float64)  # a gene that is there twice is summed, as in tokenize


def _panels(columns: list[_Column]) -> list[Axes]:
    """Make a figure with a panel for each column, each with room for its legend."""
    import matplotlib.pyplot as plt

    n_columns = min(len(columns), 3)
    n_rows = -(-len(columns) // n_columns)
    widths = [4.0 + max(_legend_inches(column) for column in columns[i::n_columns]) for i in range(n_columns)]
    figure, grid = plt.subplots(
        n_rows, n_columns, figsize=(sum(widths), 4.0 * n_rows), width_ratios=widths, layout="constrained", squeeze=False
    )
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # type: ignore[call-arg, union-attr]
    axes = list(grid.flat)
    for spare in axes[len(columns) :]:
        spare.remove()
    return axes[: len(columns)]


def _legend_inches(column: _Column) -> float:
    if not isinstance(column.values, pd.Categorical):
        return 0.0 if column.values is None else 0.5
    labels = [_style.shorten(label) for label in column.values.categories]
    longest = max((len(label) for label in labels), default=0)
    return (0.3 + 0.066 * longest) * int(np.ceil(np.clip(len(labels), 1, _style.MOST_LABELS) / _style.LEGEND_ROWS))


def _draw(
    ax: Axes,
    coordinates: np.ndarray,
    shown: np.ndarray,
    column: _Column,
    *,
    size: float | None,
    cmap: str,
    title: str | None,
) -> None:
    size = float(np.clip(30_000 / shown.sum(), 1.0, 22.0)) if size is None else size
    style: dict[str, Any] = {"s": size, "linewidths": 0, "rasterized": True, "plotnonfinite": False}
    if column.values is None:
        ax.scatter(coordinates[shown, 0], coordinates[shown, 1], color=_style.MAIN_COLOUR, **style)
    elif isinstance(column.values, pd.Categorical):
        _draw_categories(ax, coordinates, shown, column.values, column.colours, style)
    else:
        _draw_numbers(ax, coordinates, shown, column, cmap, style)
    ax.set_title(_style.shorten(column.name if title is None else title, 48), fontsize=11, parse_math=False)


def _draw_categories(
    ax: Axes,
    coordinates: np.ndarray,
    shown: np.ndarray,
    values: pd.Categorical,
    palette: Sequence[str],
    style: dict[str, Any],
) -> None:
    codes = np.asarray(values.codes)
    colours = np.array([*palette, _style.MISSING_COLOUR])  # code -1 takes the last one
    cells = np.flatnonzero(shown & (codes < 0))
    ax.scatter(coordinates[cells, 0], coordinates[cells, 1], c=colours[codes[cells]], **style)
    # drawn in a random (but always the same) order, so that no class hides the others
    cells = np.random.default_rng(0).permutation(np.flatnonzero(shown & (codes >= 0)))
    ax.scatter(coordinates[cells, 0], coordinates[cells, 1], c=colours[codes[cells]], **style)
    here = np.unique(codes[shown])
    present = [*here[here >= 0], *here[here < 0]]
    labels = ["missing" if code < 0 else str(values.categories[code]) for code in present]
    _style.legend_beside(ax, [_style.dot(colours[code]) for code in present], labels)


def _draw_numbers(
    ax: Axes, coordinates: np.ndarray, shown: np.ndarray, column: _Column, cmap: str, style: dict[str, Any]
) -> None:
    values = np.asarray(column.values)
    missing = np.flatnonzero(shown & ~np.isfinite(values))
    ax.scatter(coordinates[missing, 0], coordinates[missing, 1], color=_style.MISSING_COLOUR, **style)
    cells = np.flatnonzero(shown & np.isfinite(values))
    cells = cells[np.argsort(values[cells], kind="stable")]  # the highest values on top
    dots = ax.scatter(coordinates[cells, 0], coordinates[cells, 1], c=values[cells], cmap=cmap, **style)
    if len(cells) == 0:
        return
    expressed, extend = values[cells][values[cells] > 0], "neither"
    if column.is_gene and len(expressed):
        # the few highest cells would leave all others dark, most of all in raw counts
        top = float(np.quantile(expressed, 0.98, method="lower"))
        dots.set_clim(min(float(values[cells].min()), 0.0), top)
        extend = "max" if expressed.max() > top else "neither"
    _style.colour_bar(ax, dots, extend=extend)


def _label_axes(ax: Axes, name: str, shown: np.ndarray) -> None:
    _style.quiet_axes(ax)
    left_out = int((~shown).sum())
    note = f"\n{left_out:,} of {len(shown):,} cells have no embedding" if left_out else ""
    ax.set_xlabel(f"{name} 1{note}", fontsize=8, color=_style.QUIET_COLOUR, loc="left")
    ax.set_ylabel(f"{name} 2", fontsize=8, color=_style.QUIET_COLOUR, loc="bottom")
