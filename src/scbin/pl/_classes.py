"""What the pictures of predictions share: axes as large as their classes need, and names along them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scbin._errors import ScbinInputError
from scbin.pl import _style

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from scbin.get._predicted import Predicted

NONE_GIVEN = "none given"


def of_classes(found: Predicted, *, probabilities: bool = False) -> Predicted:
    """Return the predictions if they are classes, with probabilities where these are needed, else say what to do."""
    if found.kind != "class":
        raise ScbinInputError(
            "E25", f"{found.target!r} is a number, not a class: scbin.pl.prediction draws it against the truth."
        )
    if probabilities and found.probability is None:
        raise ScbinInputError(
            "E26",
            f"adata.obsm has no 'scbin_{found.target}_probability', which this picture needs. scbin.tl.predict writes it.",
        )
    return found


def grid_axes(n_rows: int, n_columns: int, names: Sequence[str], square: float = 0.36) -> Axes:
    """Return new axes for a grid of classes, with room for their names, and not larger than a screen."""
    import matplotlib.pyplot as plt

    longest = max((len(_style.shorten(name)) for name in names), default=0)
    width = float(np.clip(square * n_columns, 3.2, 9.5)) + 0.07 * longest + 1.2
    height = float(np.clip(square * n_rows, 2.4, 9.5)) + 0.05 * min(longest, 24) + 0.9
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def plain_axes(width: float = 5.4, height: float = 4.0) -> Axes:
    """Return new axes."""
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def name_columns(ax: Axes, places: Sequence[float] | np.ndarray, names: Sequence[str]) -> None:
    """Write names below the columns: level where they are short, else rising."""
    texts = [_style.shorten(name, 24) for name in names]
    level = max((len(text) for text in texts), default=0) <= 4
    ax.set_xticks(list(places))
    labels = ax.set_xticklabels(texts, rotation=0 if level else 45, ha="center" if level else "right", parse_math=False)
    for label in labels:
        label.set_rotation_mode("anchor")


def name_rows(ax: Axes, places: Sequence[float] | np.ndarray, names: Sequence[str], counts: Sequence[int]) -> None:
    """Write names beside the rows, with how many cells each stands for."""
    ax.set_yticks(list(places))
    texts = [f"{_style.shorten(name)}  ({count:,})" for name, count in zip(names, counts, strict=True)]
    ax.set_yticklabels(texts, parse_math=False)


def bare(ax: Axes) -> None:
    """Take away the frame and the ticks of a heat map; its names stay."""
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, labelcolor=_style.TEXT_COLOUR, labelsize=8)


def title(ax: Axes, text: str) -> None:
    """Write a title in the house style."""
    ax.set_title(_style.shorten(text, 64), fontsize=11, parse_math=False)


def axis_label(ax: Axes, *, x: str, y: str) -> None:
    """Write what the axes mean."""
    ax.set_xlabel(x, fontsize=9, color=_style.TEXT_COLOUR)
    ax.set_ylabel(y, fontsize=9, color=_style.TEXT_COLOUR)
