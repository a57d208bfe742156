"""The numbers of a step on their way from the device to the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from scbin.train.step import Share


class Pending:
    """A step whose numbers are still on the device; on a GPU they travel to the host while the next step is launched."""

    def __init__(self, step: int, share: Share, numbers: torch.Tensor, names: list[str], learning_rate: float):
        self.step, self.share, self.names, self.learning_rate = step, share, names, learning_rate
        self.seconds = 0.0  # that it took, once they are known
        self._arrived: Any = None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(numbers.device))
        else:
            self._numbers = numbers

    def wait(self) -> None:
        """Wait until the numbers are here."""
        if self._arrived is not None:
            self._arrived.synchronize()

    @property
    def numbers(self) -> torch.Tensor:
        """The numbers, once they are here."""
        self.wait()
        return self._numbers
