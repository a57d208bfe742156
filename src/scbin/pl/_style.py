"""What several plots draw alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.legend import Legend

MAIN, SECOND, QUIET, MISSING = "#1f77b4", "#d9642c", "#8a8a8a", "lightgray"
LEGEND_ROWS = 18


def new_axes(width: float = 6.4, height: float = 3.6) -> Axes:
    """Return the axes of a new figure that leaves room for what stands beside them."""
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def palette(n: int) -> list[str]:
    """Return `n` colours: those that scanpy gives to so many categories."""
    from scanpy.plotting import palettes

    few, some, many = palettes.default_20, palettes.default_28, palettes.default_102
    chosen = few if n <= len(few) else some if n <= len(some) else many
    return [chosen[i % len(chosen)] for i in range(n)]


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
    """Put a legend to the right of the axes; labels are drawn as they are, not read as formulas."""
    style: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "frameon": False, "fontsize": 8}
    # the text follows below: matplotlib leaves out labels with a leading underscore
    legend = ax.legend(handles, ["."] * len(handles), ncols=-(-len(handles) // LEGEND_ROWS) or 1, **style)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_parse_math(False)
        text.set_text(shorten(label))
    return legend
