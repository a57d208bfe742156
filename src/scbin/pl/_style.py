"""The house style of figures: colours that can be told apart, legends beside the axes, labels as they are."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.legend import Legend
    from matplotlib.lines import Line2D
    from matplotlib.transforms import Bbox

MISSING_COLOUR = "#d9d9d9"
TEXT_COLOUR = "#333333"
QUIET_COLOUR = "#8a8a8a"
MAIN_COLOUR = "#3b6fb6"
SECOND_COLOUR = "#d9642c"
LONGEST_LABEL = 34
LEGEND_ROWS = 18
MOST_LABELS = 4 * LEGEND_ROWS

# Ten hand-picked hues, then each colour as far as possible (in OKLab) from all before it, from white and from MISSING_COLOUR.
# fmt: off
PALETTE = (
    "#3b6fb6", "#e8803a", "#3f9e5a", "#d1495b", "#8e63b8", "#2bb3c0", "#e6b93c", "#9c6146",
    "#e58fbf", "#6b7a1e", "#680048", "#004840", "#70f098", "#302088", "#98a8ff", "#602800",
    "#20f0f8", "#584870", "#087878", "#980020", "#98c090", "#a03080", "#006000", "#ffb098",
    "#98b000", "#682088", "#00a0f8", "#c880f0", "#a89058", "#e8c0ff", "#7890b8", "#b07090",
    "#585008", "#c8e048", "#90d0f8", "#004070", "#5848b8", "#ff7880", "#00d0a8", "#7080f0",
)
# fmt: on


def palette(n: int) -> list[str]:
    """Return `n` colours, the first ones of a fixed list, so that few classes get the most different ones."""
    return [PALETTE[i % len(PALETTE)] for i in range(n)]


def shorten(text: object, longest: int = LONGEST_LABEL) -> str:
    """Cut a long label in its middle, where names that share a beginning or an end still differ least."""
    line = " ".join(str(text).split())
    if len(line) <= longest:
        return line
    tail = longest // 3
    return f"{line[: longest - tail - 1]}…{line[-tail:]}"


def quiet_axes(ax: Axes) -> None:
    """Leave two thin spines and no ticks: coordinates of a UMAP mean nothing by themselves."""
    ax.set_xticks([])
    ax.set_yticks([])
    frame(ax)


def frame(ax: Axes) -> None:
    """Draw thin grey spines at the left and the bottom only."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(QUIET_COLOUR)
    ax.tick_params(colors=QUIET_COLOUR, labelcolor=TEXT_COLOUR, labelsize=8)


def dot(colour: Any) -> Line2D:
    """Return the dot that stands for a colour in a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], marker="o", linestyle="", markersize=6, markeredgewidth=0, color=colour)


def legend_beside(ax: Axes, handles: Sequence[Artist], labels: Sequence[str]) -> Legend:
    """Put a legend to the right of the axes, in as many columns as it needs."""
    if len(labels) > MOST_LABELS:
        labels = [*labels[: MOST_LABELS - 1], f"and {len(labels) - MOST_LABELS + 1:,} more"]
        handles = [*handles[: MOST_LABELS - 1], dot("white")]
    legend = ax.legend(
        handles,
        ["."] * len(handles),  # the text follows below: a label with a leading underscore would be left out here
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        ncols=int(np.ceil(len(handles) / LEGEND_ROWS)),
        frameon=False,
        fontsize=8,
        handletextpad=0.45,
        columnspacing=1.0,
        borderaxespad=0.2,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
        text.set_color(TEXT_COLOUR)
    box = ax.get_position(original=True)
    for longest in (LONGEST_LABEL, 24, 16):
        for text, label in zip(legend.get_texts(), labels, strict=True):
            text.set_text(shorten(label, longest))
        if make_room(ax, legend, box):
            break
    return legend


def make_room(ax: Axes, beside: Artist, box: Bbox) -> bool:
    """Narrow the axes so that what stands beside them stays in `box`; say whether half of it is left for the axes.

    A layout engine, where the figure has one, does this by itself.
    """
    figure = ax.get_figure(root=True)
    if figure is None or figure.get_layout_engine() is not None:
        return True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph missing from the font is reported when the figure is drawn
        extent = beside.get_tightbbox()
    width = 0.0 if extent is None else extent.transformed(figure.transFigure.inverted()).width + 0.02 * box.width
    ax.set_position((box.x0, box.y0, max(box.width - width, 0.3 * box.width), box.height))
    return width <= 0.5 * box.width


def colour_bar(ax: Axes, mappable: Any, *, extend: str) -> None:
    """Put a slim colour bar beside the axes; with `extend="max"` it ends in an arrow."""
    box = ax.get_position(original=True)
    beside = ax.inset_axes((1.03, 0.2, 0.03, 0.6))
    ax.get_figure(root=True).colorbar(mappable, cax=beside, extend=extend, extendfrac=0.04)  # type: ignore[union-attr]
    beside.tick_params(length=2, labelsize=8, colors=QUIET_COLOUR, labelcolor=TEXT_COLOUR)
    beside.spines[:].set_visible(False)
    make_room(ax, beside, box)
