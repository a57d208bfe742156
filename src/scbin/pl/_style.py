"""What several plots draw alike."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from anndata import AnnData
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.legend import Legend

MAIN, SECOND, QUIET, MISSING = "#1f77b4", "#d9642c", "#8a8a8a", "lightgray"


def new_axes(width: float = 6.4, height: float = 3.6) -> Axes:
    """Return the axes of a new figure that leaves room for what stands beside them."""
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def palette(n: int) -> list[str]:
    """Return `n` colours: those that scanpy gives to so many categories."""
    from scanpy.plotting import palettes

    chosen = palettes.default_20 if n <= 20 else palettes.default_28 if n <= 28 else palettes.default_102
    return [chosen[i % len(chosen)] for i in range(n)]


def colours(adata: AnnData, key: str, names: Sequence[str]) -> dict[str, str]:
    """Return a colour for each class: that in `adata.uns["<key>_colors"]`, where scanpy keeps it, or one of its palette."""
    known, kept = dict(zip(names, palette(len(names)), strict=True)), adata.uns.get(f"{key}_colors", ())
    if hasattr(adata.obs.get(key), "cat"):
        known |= dict(zip(adata.obs[key].cat.categories, map(str, kept), strict=False))
    return {name: known[name] for name in names}


def shorten(text: object, longest: int = 34) -> str:
    """Cut a long label in its middle, where names that share a beginning or an end still differ least.

    Examples
    --------
    >>> shorten("CD4-positive, alpha-beta memory T cell", 20)
    'CD4-positive,…T cell'
    """
    line = " ".join(str(text).split())
    tail = longest // 3
    return line if len(line) <= longest else f"{line[: longest - tail - 1]}…{line[-tail:]}"


def legend_beside(ax: Axes, handles: Sequence[Artist], labels: Sequence[str]) -> Legend:
    """Put a legend to the right of the axes."""
    style: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "frameon": False, "fontsize": 8}
    return ax.legend(handles, [shorten(label) for label in labels], ncols=-(-len(handles) // 18) or 1, **style)


@contextmanager
def seeded() -> Iterator[None]:
    """For a while let the global generator, from which some libraries draw, start at 0; afterwards it is as it was."""
    state = np.random.get_state()
    np.random.seed(0)
    try:
        yield
    finally:
        np.random.set_state(state)


def write_names(
    ax: Axes,
    names: Sequence[str],
    x: np.ndarray,
    y: np.ndarray,
    rows: np.ndarray,
    *,
    always: bool = False,
    inwards: float = 0.0,
) -> None:
    """Name some dots, apart from each other: those for which there is room, or all of them; `inwards` moves names to the middle."""
    from adjustText import adjust_text

    figure: Any = ax.get_figure(root=True)
    figure.draw_without_rendering()  # a layout engine settles the size of the axes when it draws
    style: dict[str, Any] = {"fontsize": 7.5, "parse_math": False, "zorder": 6, "in_layout": False}
    others = list(ax.texts)
    start = x + inwards * np.sign(np.mean(ax.get_xlim()) - x)
    texts = [ax.text(start[i], y[i], shorten(names[i], 18), **style) for i in rows]
    with seeded():
        adjust_text(texts, x=x, y=y, objects=others or None, ax=ax, iter_lim=60, expand=(1.1, 1.3))
    taken = [text.get_window_extent() for text in others]
    for text, i in zip(texts, rows, strict=True):
        box = text.get_window_extent()
        if not always and any(box.overlaps(other) for other in taken):
            text.remove()
            continue
        taken.append(box)
        point = ax.transData.transform((x[i], y[i]))
        ends = ax.transData.inverted().transform([point, np.clip(point, box.min, box.max)])
        ax.plot(*ends.T, color=QUIET, linewidth=0.5, zorder=3, scalex=False, scaley=False)
