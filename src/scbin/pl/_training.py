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

COLOURS = {"loss": _style.MAIN_COLOUR, "validation_loss": _style.SECOND_COLOUR}


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
        Which columns of the history to draw. Default: `loss` and `validation_loss`.
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
    columns = [column for column in COLOURS if column in history] if columns is None else list(columns)
    unknown = [column for column in columns if column not in history]
    if unknown:
        known = ", ".join(map(repr, history.columns))
        raise ScbinInputError("P10", f"the history has no column {unknown[0]!r}. Available: {known}.")
    ax = _new_axes() if ax is None else ax
    spare = iter(_style.PALETTE[2:])
    colours = [COLOURS.get(column) or next(spare) for column in columns]
    for column, colour in zip(columns, colours, strict=True):
        _draw_curve(ax, history["step"].to_numpy(), history[column].to_numpy(dtype=float), colour)
    _style.frame(ax)
    epochs = f" ({_whole(history['epoch'].max())} epochs)" if "epoch" in history and history["epoch"].max() > 0 else ""
    ax.set_xlabel(f"step{epochs}", fontsize=9, color=_style.TEXT_COLOUR)
    ax.set_ylabel("loss", fontsize=9, color=_style.TEXT_COLOUR)
    ax.grid(axis="y", color="#ececec", linewidth=0.8)
    ax.set_axisbelow(True)
    labels = {"loss": "training", "validation_loss": "held-out cells"}
    _style.legend_beside(ax, colours, [labels.get(column, column.replace("_", " ")) for column in columns])
    return ax


def _draw_curve(ax: Axes, step: np.ndarray, values: np.ndarray, colour: str) -> None:
    """Draw what was measured faintly and its running mean on top; a few points are joined as they are."""
    known = np.isfinite(values)
    step, values = step[known], values[known]
    window = len(values) // 25
    if window < 2:
        ax.plot(step, values, color=colour, linewidth=1.6, marker="o", markersize=3.2, markeredgewidth=0)
        return
    ax.plot(step, values, color=colour, linewidth=0.6, alpha=0.3)
    ax.plot(step, _running_mean(values, window), color=colour, linewidth=1.8)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over `window` steps at either side; over fewer, but still as many at both, near the ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    here = np.arange(len(values))
    reach = np.minimum(window, np.minimum(here, len(values) - 1 - here))
    return (total[here + reach + 1] - total[here - reach]) / (2 * reach + 1)


def _whole(number: float) -> str:
    return f"{number:,.0f}" if float(number).is_integer() else f"{number:,.1f}"


def _new_axes() -> Axes:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(6.4, 3.4), layout="constrained")[1]
