"""What happened in each step: a table, and callbacks that show it while it happens."""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any

import pandas as pd
from tqdm.auto import tqdm

from scbin._errors import ScbinInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from scbin.train.settings import Training


class History:
    """The record of a run: a row per step, numbered by the steps taken so far, and row 0 for the network at its start.

    Validation losses stand in the row of the step after which they were taken.
    """

    def __init__(self, columns: Mapping[str, list[float | None]] | None = None):
        self.rows: list[dict[str, float]] = []
        for values in zip(*(columns or {}).values(), strict=True):
            row = zip(columns or {}, values, strict=True)
            self.rows.append({name: value for name, value in row if value is not None})

    def add(self, row: Mapping[str, float], callbacks: Iterable[Callable[[dict[str, float]], None]] = ()) -> None:
        """Append a row, and show it; what concerns the last step again is added to its row."""
        if self.rows and self.rows[-1]["step"] == row["step"]:
            self.rows[-1].update(row)
        else:
            self.rows.append(dict(row))
        for callback in callbacks:
            callback(dict(row))

    def values(self, name: str) -> list[tuple[int, float]]:
        """Return a column as (step, value) where there is one."""
        return [(int(row["step"]), row[name]) for row in self.rows if name in row]

    def frame(self) -> pd.DataFrame:
        """Return the record as a table."""
        names = list(dict.fromkeys(["step", "epoch", "loss", *(name for row in self.rows for name in row)]))
        frame = pd.DataFrame(self.rows, columns=names)
        for column in ("step", "epoch", "skipped"):
            if column in frame:
                frame[column] = frame[column].fillna(0).astype("int64")
        return frame

    def to_dict(self) -> dict[str, list[float | None]]:
        """Return columns of plain numbers for JSON; what was not measured is None."""
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        return {name: [row.get(name) for row in self.rows] for name in names}


# ---- callbacks: called with every row, closed in the end --------------------------------------------------------------


class ProgressBar:
    """A bar with the loss, the speed and the time left."""

    def __init__(self, n_steps: int, first_step: int = 0):
        self.bar = tqdm(total=n_steps, initial=first_step, desc="training", unit="step")

    def __call__(self, row: Mapping[str, float]) -> None:
        """Show one step."""
        rates = {"cells/s": "cells_per_second", "tokens/s": "tokens_per_second"}
        shown = {"loss": f"{row['loss']:.4g}"} if "loss" in row else {}
        shown |= {name: f"{row[column]:,.0f}" for name, column in rates.items() if column in row}
        if shown:
            self.bar.set_postfix(shown, refresh=False)
        self.bar.update(int(row["step"]) - self.bar.n)

    def close(self) -> None:
        """Finish the bar."""
        self.bar.close()


class TensorBoard:
    """Every finite number as a scalar of TensorBoard."""

    def __init__(self, directory: str | Path):
        self.writer = _optional("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(directory))

    def __call__(self, row: Mapping[str, float]) -> None:
        """Write one step."""
        for name, value in _finite(row).items():
            self.writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Finish the files."""
        self.writer.close()


class Wandb:
    """Every finite number to a project of Weights & Biases."""

    def __init__(self, project: str):
        self.run = _optional("wandb", "wandb").init(project=project)

    def __call__(self, row: Mapping[str, float]) -> None:
        """Send one step."""
        self.run.log(_finite(row), step=int(row["step"]))

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


def boards(training: Training, n_steps: int, first_step: int, progress: bool) -> list[Any]:
    """Return who is shown a run."""
    shown: list[Any] = [ProgressBar(n_steps, first_step)] if progress else []
    shown += [TensorBoard(training.tensorboard)] if training.tensorboard is not None else []
    return shown + ([Wandb(training.wandb)] if training.wandb is not None else [])


def _finite(row: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step" and math.isfinite(value)}


def _optional(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ScbinInputError("A05", f"{package} is not installed; install it, or leave the argument out.") from error
