"""`pl.training`: the loss curves of a training run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scbin import _docs
from scbin._errors import ScbinInputError, count
from scbin.get.tables import history_df
from scbin.pl import _style

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

VALIDATION = "validation_"


@_docs.shared
def training(
    source: AnnData | pd.DataFrame | Any, *, columns: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the losses of a training run, in training and on the held-out cells.

    A loss that rises on the held-out cells while it falls in training is overfitting: train for fewer epochs, or take a
    smaller model. The dotted line is the loss of the held-out cells before the first step: a curve that does not get below
    it says that training added nothing to the start.

    Parameters
    ----------
    source
        The `Model` that was trained, or the `AnnData` that it was trained on.
    columns
        Which columns of :func:`scbin.get.history_df` to draw. Default: each loss that was measured on held-out cells, in
        training and on those.
    {ax}

    Returns
    -------
    The axes.

    Raises
    ------
    ScbinInputError
        If there is no history, or no such column.

    Examples
    --------
    >>> import pandas, scbin
    >>> history = pandas.DataFrame({"step": [1, 2, 3], "loss": [3.0, 2.0, 1.5]})
    >>> scbin.pl.training(history).get_xlabel()
    'step'
    """
    history = history_df(source)
    if columns is None:
        measured = [str(name).removeprefix(VALIDATION) for name in history if str(name).startswith(VALIDATION)]
        pairs = [(f"loss_{name}", f"{VALIDATION}{name}") for name in measured if f"loss_{name}" in history]
        columns = [column for pair in pairs for column in pair] or ["loss"]
    unknown = [column for column in columns if column not in history]
    if unknown or not len(columns):
        known = ", ".join(map(repr, history.columns))
        what = f"the history has no column {unknown[0]!r}" if unknown else "columns is empty"
        raise ScbinInputError("A06", f"{what}. Available: {known}.")
    ax = _style.new_axes() if ax is None else ax
    losses = {column: column.removeprefix(VALIDATION).removeprefix("loss_").replace("_", " ") for column in columns}
    several = list(dict.fromkeys(losses.values()))
    colours = dict(zip(several, _style.palette(len(several)), strict=True))
    lines, names = [], []
    for column, loss in losses.items():
        held_out, prefix = column.startswith(VALIDATION), f"{loss}, " if len(several) > 1 else ""
        colour = colours[loss] if len(several) > 1 else _style.SECOND if held_out else _style.MAIN
        values = history.set_index("step")[column].dropna()
        window = len(values) // 12
        if held_out or window < 4:
            lines += ax.plot(values, color=colour, linewidth=1.4, marker="o", markersize=3.5)
        else:  # what was measured faintly, and its running mean
            ax.plot(values, color=colour, linewidth=0.6, alpha=0.3)
            lines += ax.plot(values.rolling(window, center=True, min_periods=1).mean(), color=colour, linewidth=1.8)
        kind = "held-out cells" if held_out else "training"
        names.append(prefix + kind if column.startswith((VALIDATION, "loss")) else loss)
        if held_out and 0 in values.index:
            lines.append(ax.axhline(float(values.loc[0]), color=colour, linewidth=1, linestyle=":"))
            names.append(f"{prefix}at the start")
    n_epochs = int(history.loc[history["step"] > 0, "epoch"].nunique()) if "epoch" in history else 0
    ax.set_xlabel("step" + (f" ({count(n_epochs, 'epoch')})" if n_epochs else ""))
    ax.set_ylabel("loss" if len(several) > 1 or several == ["loss"] else f"loss: {several[0]}")
    ax.spines[["top", "right"]].set_visible(False)
    _style.legend_beside(ax, lines, names)
    return ax
