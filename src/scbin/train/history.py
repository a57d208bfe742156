"""What happened in each step: rows of numbers, one per step, with row 0 for the network at its start."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pandas as pd
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


def history_frame(rows: Sequence[Mapping[str, float]]) -> pd.DataFrame:
    """Return the record of a run as a table; validation losses stand in the row of the step after which they were taken."""
    names = dict.fromkeys(["step", "epoch", "loss", *(name for row in rows for name in row)])
    frame = pd.DataFrame(list(rows), columns=list(names))
    whole = [name for name in ("step", "epoch", "skipped") if name in frame]
    return frame.fillna(dict.fromkeys(whole, 0)).astype(dict.fromkeys(whole, "int64"))


class ProgressBar:
    """A bar with the loss, the speed and the time left."""

    def __init__(self, n_steps: int, first_step: int = 0, *, shown: bool = True):
        self.bar = tqdm(total=n_steps, initial=first_step, desc="training", unit="step", disable=not shown)

    def __call__(self, row: Mapping[str, float]) -> None:
        """Show one step."""
        if "loss" in row:
            rates = {f"{what}/s": f"{row[f'{what}_per_second']:,.0f}" for what in ("cells", "tokens")}
            self.bar.set_postfix(loss=f"{row['loss']:.4g}", **rates, refresh=False)
        self.bar.update(int(row["step"]) - self.bar.n)


@contextmanager
def stage(what: str, *, shown: bool = True) -> Iterator[None]:
    """Say what is being done for as long as it takes."""
    with tqdm(total=0, desc=what, bar_format="{desc} ...", leave=False, disable=not shown):
        yield
