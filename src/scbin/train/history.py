"""What happened in each step: a table, a progress bar, and TensorBoard or Weights & Biases on request."""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any

import pandas as pd

from scbin._errors import ScbinInputError
from scbin.train.watching import show

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from transformers import BertConfig

    from scbin.train.settings import TrainSettings

# dense bfloat16 peak by name of the GPU, FLOP/s
_PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "A10": 125e12}


class History:
    """The record of a run, one row per step; validation losses stand in the row of the step they were taken after."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def add(self, row: Mapping[str, float]) -> None:
        """Append a step, and show it to whoever watches the run."""
        self.rows.append(dict(row))
        show(row)

    def frame(self) -> pd.DataFrame:
        """Return the record as a table."""
        frame = pd.DataFrame(self.rows)
        for column in ("step", "epoch", "skipped"):
            if column in frame:
                frame[column] = frame[column].astype("int64")
        return frame

    def to_dict(self) -> dict[str, list[float | None]]:
        """Return columns of plain numbers for JSON; what was not measured is None."""
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        return {name: [_plain(row.get(name)) for row in self.rows] for name in names}

    @classmethod
    def from_dict(cls, columns: Mapping[str, list[float | None]]) -> History:
        """Read back `to_dict`."""
        history = cls()
        for values in zip(*columns.values(), strict=True):
            history.rows.append({name: value for name, value in zip(columns, values, strict=True) if value is not None})
        return history


def _plain(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


class Board:
    """The progress bar and whoever else wants to see the numbers live; silent on all processes but the first."""

    def __init__(self, settings: TrainSettings, n_steps: int, first_step: int, is_first: bool):
        from tqdm.auto import tqdm

        self.bar = tqdm(
            total=n_steps,
            initial=first_step,
            desc="training",
            unit="step",
            disable=not (settings.progress and is_first),
        )
        self.writer: Any = None
        self.run: Any = None
        if is_first and settings.tensorboard is not None:
            self.writer = _optional("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(settings.tensorboard))
        if is_first and settings.wandb is not None:
            self.run = _optional("wandb", "wandb").init(project=settings.wandb)

    def show(self, row: Mapping[str, float]) -> None:
        """Show one step."""
        step = int(row["step"])
        shown = {"loss": f"{row.get('loss', float('nan')):.4g}"}
        shown |= {name: f"{row[column]:,.0f}" for name, column in _RATES if column in row}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(1)
        numbers = {name: value for name, value in row.items() if name != "step" and math.isfinite(value)}
        if self.writer is not None:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, step)
        if self.run is not None:
            self.run.log(numbers, step=step)

    def close(self) -> None:
        """Finish the bar and the files."""
        self.bar.close()
        if self.writer is not None:
            self.writer.close()
        if self.run is not None:
            self.run.finish()


_RATES = (("cells/s", "cells_per_second"), ("tokens/s", "tokens_per_second"))


def _optional(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ScbinInputError("T32", f"{package} is not installed; install it, or leave the argument out.") from error


def step_flops(config: BertConfig, lengths_squared: float, n_tokens: float, head: float) -> float:
    """Return the floating-point operations a training step needs: forward, and twice that for the backward.

    `lengths_squared` is the sum of the squared row lengths, `head` the number of logits computed.
    """
    h, ff, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    forward = layers * (n_tokens * (8 * h * h + 4 * h * ff) + 4 * h * lengths_squared) + 2 * h * head
    return 3 * forward


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bfloat16 peak of a GPU, where it is known."""
    if device.type != "cuda":
        return None
    import torch

    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK.items() if part in name), None)
