"""Looking at a run from outside while it goes, whoever started it: for pruning."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_watcher: ContextVar[Callable[[Mapping[str, float]], None] | None] = ContextVar("watcher", default=None)


@contextmanager
def watched(watcher: Callable[[Mapping[str, float]], None]) -> Iterator[None]:
    """Show each row of the history of the runs inside to `watcher`, which may raise to end the run.

    Examples
    --------
    >>> rows = []
    >>> with watched(rows.append):
    ...     show({"step": 0, "loss": 1.0})
    >>> rows
    [{'step': 0, 'loss': 1.0}]
    """
    before = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(before)


def show(row: Mapping[str, float]) -> None:
    """Show a row to whoever watches."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher(row)
