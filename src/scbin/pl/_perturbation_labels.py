"""Names beside points that do not lie on each other, and what the plots of perturbations share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scbin._errors import ScbinInputError
from scbin.pl import _style

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    import pandas as pd
    from matplotlib.axes import Axes

TOWARDS_COLOUR = _style.MAIN_COLOUR
AWAY_COLOUR = _style.SECOND_COLOUR
OTHER_COLOUR = "#b9bdc4"
BAND_COLOUR = "#e9ebef"
DIRECTIONS = tuple(np.deg2rad([20, 160, -20, 200, 55, 125, -55, 235, 90, 270]))


def label_points(ax: Axes, x: np.ndarray, y: np.ndarray, names: Sequence[str], every: np.ndarray) -> None:
    """Write names near their points, first come first served, where they hide neither points nor other names.

    A name for which there is no room near its point is moved further out, with a thin line; one for which there is no room at all
    is left out. The axes must have their final limits and size.

    Parameters
    ----------
    ax
        The axes.
    x, y
        Points to be named (names,).
    names
        What to write.
    every
        All points drawn (points, 2), to be kept free.
    """
    figure = ax.get_figure(root=True)
    if figure is None or not len(names):
        return
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()  # a layout engine settles the size of the axes when it draws
    points = ax.transData.transform(np.column_stack([x, y]))
    crowd = ax.transData.transform(every[np.isfinite(every).all(axis=1)])
    frame, pixels = ax.get_window_extent(), figure.dpi / 72
    taken = np.array([text.get_window_extent().extents for text in ax.texts]).reshape(-1, 4)
    for point, name in zip(points, names, strict=True):
        text = ax.text(
            0,
            0,
            _style.shorten(name, 18),
            fontsize=7.5,
            color=_style.TEXT_COLOUR,
            parse_math=False,
            zorder=6,
            in_layout=False,
        )
        box = text.get_window_extent()
        place = _free_place(point, box.width, box.height, taken, crowd, np.asarray(frame.extents), pixels)
        if place is None:
            text.remove()
            continue
        left, bottom, far = place
        taken = np.vstack([taken, [left, bottom, left + box.width, bottom + box.height]])
        text.set_position(tuple(ax.transData.inverted().transform((left, bottom))))
        text.set_verticalalignment("bottom")
        if far:
            end = np.clip(point, [left, bottom], [left + box.width, bottom + box.height])
            ends = ax.transData.inverted().transform(np.vstack([point, end]))
            ax.plot(
                ends[:, 0], ends[:, 1], color=_style.QUIET_COLOUR, linewidth=0.5, zorder=3, scalex=False, scaley=False
            )


def label_column(
    ax: Axes, x: np.ndarray, y: np.ndarray, names: Sequence[str], *, at: float, right: bool, share: float
) -> None:
    """Write names one below the other at a share of the axes' width, each with a line to its point; lines never cross.

    Parameters
    ----------
    ax
        The axes, with their final limits and size.
    x, y
        Points to be named (names,).
    names
        What to write.
    at
        Where the column stands: 0 is the left end of the axes.
    right
        Whether names end there rather than begin, and move down rather than up to find room: the falling end of a ranking.
    share
        Of the axes' height that the column may take; names beyond it, the last ones, are left out.
    """
    figure = ax.get_figure(root=True)
    if figure is None or not len(names):
        return
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
    frame, pixels = ax.get_window_extent(), figure.dpi / 72
    step = 10.5 * pixels
    room = max(int(share * frame.height / step), 0)
    order = np.argsort(-y[:room], kind="stable")
    points = ax.transData.transform(np.column_stack([x, y])[order])
    heights = _spread(points[:, 1], step, frame.y0 + step / 2, frame.y1 - step / 2, upwards=not right)
    column = frame.x0 + at * frame.width
    for i, (point, height) in enumerate(zip(points, heights, strict=True)):
        ends = np.array([point, [column + (3 if right else -3) * pixels, height]])
        ends = ax.transData.inverted().transform(ends)
        ax.plot(ends[:, 0], ends[:, 1], color=_style.QUIET_COLOUR, linewidth=0.4, zorder=3, scalex=False, scaley=False)
        place = ax.transData.inverted().transform((column, height))
        ax.text(
            float(place[0]),
            float(place[1]),
            _style.shorten(names[order[i]], 18),
            fontsize=7.5,
            color=_style.TEXT_COLOUR,
            ha="right" if right else "left",
            va="center",
            parse_math=False,
            zorder=6,
            in_layout=False,
        )


def _spread(wanted: np.ndarray, step: float, low: float, high: float, *, upwards: bool) -> np.ndarray:
    """Move falling heights apart to at least `step`, up or down only, and back into the axes where they leave them."""
    ladder = step * np.arange(len(wanted))
    if upwards:  # each at least a step above the next
        heights = np.maximum.accumulate((wanted + ladder)[::-1])[::-1] - ladder
    else:
        heights = np.minimum.accumulate(wanted + ladder) - ladder
    heights = np.minimum(heights, high - ladder)
    return np.maximum(heights, low + ladder[::-1])


def _free_place(
    point: np.ndarray,
    width: float,
    height: float,
    taken: np.ndarray,
    crowd: np.ndarray,
    frame: np.ndarray,
    pixels: float,
) -> tuple[float, float, bool] | None:
    """Lower left corner of the best free place for a name, and whether it is so far out that a line is needed."""
    best, cost_of_best = None, np.inf
    for ring, distance in enumerate((4, 10, 18, 28, 40, 56, 74)):
        for turn, angle in enumerate(DIRECTIONS):
            step = distance * pixels * np.array([np.cos(angle), np.sin(angle)])
            left = (
                point[0] + step[0] - (width if step[0] < -1e-9 else 0) - (width / 2 if abs(np.cos(angle)) < 0.1 else 0)
            )
            bottom = point[1] + step[1] - height / 2
            box = np.array([left - 1, bottom - 0.5, left + width + 1, bottom + height + 0.5])
            if box[0] < frame[0] or box[1] < frame[1] or box[2] > frame[2] or box[3] > frame[3]:
                continue
            if (
                (taken[:, 0] < box[2]) & (taken[:, 2] > box[0]) & (taken[:, 1] < box[3]) & (taken[:, 3] > box[1])
            ).any():
                continue
            hidden = ((crowd > box[:2]) & (crowd < box[2:])).all(axis=1).sum()
            cost = 3.0 * hidden + ring + 0.05 * turn
            if cost < cost_of_best:
                best, cost_of_best = (left, bottom, ring > 0), cost
        if best is not None and cost_of_best <= ring + 1:
            break
    return best


def title_of(params: Mapping[str, Any]) -> str:
    """Say in words what was done to the cells."""
    mode = {
        "delete": "deleted",
        "overexpress": "overexpressed",
        "inhibit": "inhibited",
        "activate": "activated",
        "knock_down": "knocked down",
    }.get(str(params.get("mode", "")), "perturbed")
    return f"Genes {mode} in silico"


def shift_label(params: Mapping[str, Any]) -> str:
    """Say in words what a shift is."""
    if params.get("readout") == "phenotype":
        target = _style.shorten(params.get("target"), 20)
        wanted = params.get("goal")
        return (
            f"change of predicted {target}"
            if wanted is None
            else f"change of P({target} = {_style.shorten(wanted, 20)})"
        )
    if params.get("readout") == "expression":
        return "mean change of predicted expression"
    if params.get("goal") is None:
        return "shift of the cell (1 - cosine)"
    start = params.get("start")
    start = "" if start is None else f"{_style.shorten(start, 20)} cells moved "
    return f"{start}towards {_style.shorten(params['goal'], 20)} (change of cosine)"


def is_signed(table: pd.DataFrame, params: Mapping[str, Any]) -> bool:
    """Whether shifts have a direction."""
    return params.get("goal") is not None or bool((table["shift"] < -1e-6).any())


def checked(table: pd.DataFrame, needed: Sequence[str]) -> pd.DataFrame:
    """Return the rows with a shift, if the table has the columns that a plot needs."""
    missing = [column for column in needed if column not in table.columns]
    if missing:
        known = ", ".join(map(repr, table.columns))
        raise ScbinInputError(
            "P60", f"this plot needs the column {missing[0]!r}; the perturbation's table has {known}."
        )
    shown = table[table[list(needed[1:])].notna().all(axis=1)]
    if shown.empty:
        raise ScbinInputError("P61", f"none of the {len(table)} rows has a number in all of {', '.join(needed[1:])}.")
    return shown.reset_index(drop=True)


def one_group(table: pd.DataFrame, group: str | None) -> pd.DataFrame:
    """Return the table if it is of one group of cells, else ask which."""
    groups = table["group"].astype(str).unique() if "group" in table.columns and group is None else []
    if len(groups) > 1:
        raise ScbinInputError(
            "P62",
            f"the perturbation was made in {len(groups)} groups of cells; draw one: group={str(groups[0])!r}.",
        )
    return table


def new_axes(width: float, height: float) -> Axes:
    """Return axes of a figure of their own."""
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]
