"""`pl.training`: how the loss went down."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scbin._errors import ScbinInputError
from scbin.get import history_df
from scbin.pl import _style

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

NAMES = {"loss": "training", "validation_loss": "held-out cells"}
VALIDATION = "validation_"


def training(
    source: AnnData | pd.DataFrame | Any, *, columns: tuple[str, ...] | list[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the loss of a training run, and that of the cells held out.

    A held-out loss that rises while the other one falls says that the model learns the training cells by heart: fewer
    epochs or a smaller model will do.

    Parameters
    ----------
    source
        The `Model` that was trained, or the `AnnData` that it was trained on.
    columns
        Which columns of the history to draw. Default: the loss and that of the held-out cells, of each task where they
        were only measured apart.
    ax
        The axes to draw in.

    Returns
    -------
    The axes.

    Examples
    --------
    >>> import pandas, scbin
    >>> history = pandas.DataFrame({"step": [1, 2, 3], "loss": [3.0, 2.0, 1.5]})
    >>> scbin.pl.training(history).get_xlabel()
    'step'
    """
    history = history_df(source)
    columns = _default_columns(history) if columns is None else list(columns)
    unknown = [column for column in columns if column not in history]
    if unknown:
        known = ", ".join(map(repr, history.columns))
        raise ScbinInputError("P10", f"the history has no column {unknown[0]!r}. Available: {known}.")
    ax = _new_axes() if ax is None else ax
    lines = [
        _draw_curve(ax, history["step"].to_numpy(), history[column].to_numpy(dtype=float), colour, column)
        for column, colour in zip(columns, _colours(columns), strict=True)
    ]
    _style.frame(ax)
    n_epochs = int(history["epoch"].nunique()) if "epoch" in history else 0
    epochs = f" ({n_epochs:,} epoch{'' if n_epochs == 1 else 's'})" if n_epochs else ""
    ax.set_xlabel(f"step{epochs}", fontsize=9, color=_style.TEXT_COLOUR)
    is_pair = len(columns) == 2 and len({_task(column) for column in columns}) == 1
    what = "loss" if "loss" in columns or len(columns) > 2 else _task(columns[0]).replace("_", " ")
    ax.set_ylabel(f"loss of {what}" if is_pair and what != "loss" else what, fontsize=9, color=_style.TEXT_COLOUR)
    ax.grid(axis="y", color="#ececec", linewidth=0.8)
    ax.set_axisbelow(True)
    names = ["training", "held-out cells"] if is_pair else [_name(column) for column in columns]
    _style.legend_beside(ax, lines, names)
    return ax


def _default_columns(history: pd.DataFrame) -> list[str]:
    if "validation_loss" in history:
        return ["loss", "validation_loss"]
    tasks = [column.removeprefix(VALIDATION) for column in history if str(column).startswith(VALIDATION)]
    pairs = [[f"loss_{task}", f"{VALIDATION}{task}"] for task in tasks if f"loss_{task}" in history]
    return [column for pair in pairs for column in pair] or ["loss"]


def _task(column: str) -> str:
    return column.removeprefix(VALIDATION).removeprefix("loss_")


def _name(column: str) -> str:
    """Say in words what a column is."""
    text = NAMES.get(column, _task(column).replace("_", " "))
    return f"{text}, held out" if column.startswith(VALIDATION) and column not in NAMES else text


def _colours(columns: list[str]) -> list[str]:
    """One colour for each task, the same for training and held-out cells; a task by itself has one for each."""
    tasks = list(dict.fromkeys(map(_task, columns)))
    if len(tasks) == 1:
        return [_style.SECOND_COLOUR if column.startswith(VALIDATION) else _style.MAIN_COLOUR for column in columns]
    return [_style.palette(len(tasks))[tasks.index(_task(column))] for column in columns]


def _draw_curve(ax: Axes, step: np.ndarray, values: np.ndarray, colour: str, column: str) -> Line2D:
    """Draw what was measured faintly and its running mean on top; few points, and held-out cells, as they are."""
    known = np.isfinite(values)
    step, values = step[known], values[known]
    held_out, window = column.startswith(VALIDATION), len(values) // 25
    if held_out or window < 2:
        line = ax.plot(step, values, color=colour, linewidth=1.4, marker="o", markersize=3.6, markeredgewidth=0)[0]
        line.set_linestyle((0, (3, 1.2)) if held_out else "-")
        return line
    ax.plot(step, values, color=colour, linewidth=0.6, alpha=0.3)
    return ax.plot(step, _running_mean(values, window), color=colour, linewidth=1.8)[0]


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over `window` steps at either side; at the steep start as few ahead as behind, at the flat end what there is."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    here = np.arange(len(values))
    behind = np.minimum(window, here)
    ahead = np.minimum(behind, len(values) - 1 - here)
    return (total[here + ahead + 1] - total[here - behind]) / (behind + ahead + 1)


def _new_axes() -> Axes:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(6.4, 3.4), layout="constrained")[1]
