"""Several processes as one: what `torchrun` started, or this process alone."""

from __future__ import annotations

import atexit
import os
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from scbin._errors import ScbinTrainingError
from scbin.nn.run import resolve_device

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn


@dataclass(frozen=True)
class World:
    """The processes of a run. Alone, every method returns what it was given."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def share(self, items: np.ndarray) -> np.ndarray:
        """Return this process's part, as even as can be; of several, each has a stretch of the sorted items, and reads that of files."""
        return items if self.size == 1 else np.array_split(np.sort(items), self.size)[self.rank]

    def device(self, name: str) -> torch.device:
        """Return the device of this process: under `torchrun` each takes a GPU of its own."""
        chosen = resolve_device(name)
        if chosen.type == "cuda" and chosen.index is None:
            return torch.device("cuda", self.local_rank if self.size > 1 else torch.cuda.current_device())
        return chosen

    def gather(self, value: Any = None) -> list[Any]:
        """Return the value that each process has, in order, when all of them are here."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def check_same(self, value: Any) -> None:
        """Raise where the processes have different values."""
        if any(other != value for other in self.gather(value)):
            told = f"the {self.size} processes that train together have different data, settings or tasks."
            raise ScbinTrainingError("T04", f"{told} Call this with the same arguments in all of them.")

    def sum(self, values: Any) -> Any:
        """Sum a tensor over all processes where it is, or a small array of float64 on the host."""
        if self.size > 1:
            dist.all_reduce(values if isinstance(values, torch.Tensor) else torch.from_numpy(values))
        return values

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients over all processes.

        In place of `DistributedDataParallel`, whose reducer expects one backward per process: here one process may have three
        packs and another none, and the sum over targets must be exact. What has a gradient in no process keeps none, so that
        the optimiser leaves it alone as in a run of one process.
        """
        if self.size == 1:
            return
        moved, sent = self.sum(np.array([float(p.grad is not None) for p in parameters])), []
        for parameter, moves in zip(parameters, moved, strict=True):
            if moves:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                sent.append(dist.all_reduce(parameter.grad, async_op=True))
        for message in sent:
            message.wait()

    def broadcast(self, module: nn.Module) -> None:
        """Give every process the first one's parameters and buffers."""
        for tensor in [*module.parameters(), *module.buffers()] if self.size > 1 else []:
            dist.broadcast(tensor.data, 0)


def is_first_process() -> bool:
    """Whether this process is the one that writes files: the first under `torchrun`, or the only one."""
    return dist.get_rank() == 0 if dist.is_initialized() else not _launched() or os.environ["RANK"] == "0"


@contextmanager
def joined_world(timeout: float = 10.0) -> Iterator[World]:
    """Join the processes that `torchrun` (or any launcher with its environment variables) started; else be alone.

    A process group that exists already is used, if it has gloo for the CPU. One that is made here stays until the process ends: the processes cannot meet a
    second time over the same address. `timeout` is how many minutes a process waits for the others.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if not dist.is_initialized():
        if not _launched():
            yield World()
            return
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"  # what is on the host stays there
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout))
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    world = World(dist.get_rank(), dist.get_world_size(), local_rank)
    yield world
    world.gather()


def _launched() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and "MASTER_ADDR" in os.environ
