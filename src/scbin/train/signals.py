"""Being asked to stop: remembered, and obeyed between two steps."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

EXIT_RESUMABLE = 75
"""Exit status of a run that was asked to stop and has saved its state: start it again with `resume=True`."""


class StopRequest:
    """Which signal asked the run to stop, if one did."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def note(self, number: int, frame: Any = None) -> None:
        """Remember the signal; a second Ctrl-C does not wait for the end of the step."""
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def obey(self) -> None:
        """Leave as the signal asks."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(EXIT_RESUMABLE)


@contextmanager
def stop_requests(active: bool) -> Iterator[StopRequest]:
    """Listen to SIGTERM, SIGUSR1 and Ctrl-C for a while, then put the former handlers back.

    Only the main thread may listen, and only runs with a directory have something to save: otherwise nothing is set.
    """
    request = StopRequest()
    if not active or threading.current_thread() is not threading.main_thread():
        yield request
        return
    names = ("SIGTERM", "SIGUSR1", "SIGINT")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    former = {number: signal.signal(number, request.note) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
