"""Several processes as one: what `torchrun` started, or this process alone."""

from __future__ import annotations

import atexit
import hashlib
import os
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from scbin._errors import ScbinTrainingError
from scbin.nn.device import resolve_device

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor, nn

_BUCKET = 32 * 2**20  # bytes of gradient in one message


@dataclass(frozen=True)
class World:
    """The processes of a run. Alone, every method returns what it was given."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    host_group: Any = None  # gloo: flags and counts travel without touching the GPU

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def share(self, items: np.ndarray) -> np.ndarray:
        """Return this process's part: contiguous, in order, as even as can be."""
        return np.array_split(items, self.size)[self.rank]

    def device(self, name: str) -> torch.device:
        """Return the device of this process: under `torchrun` each takes a GPU of its own."""
        chosen = resolve_device(name)
        if chosen.type == "cuda" and chosen.index is None:
            return torch.device("cuda", self.local_rank if self.size > 1 else torch.cuda.current_device())
        return chosen

    def sum_host(self, values: np.ndarray) -> np.ndarray:
        """Sum small float64 arrays over all processes, on the host."""
        if self.size == 1:
            return values
        tensor = torch.from_numpy(values.astype(np.float64))
        dist.all_reduce(tensor, group=self.host_group)
        return tensor.numpy()

    def min_host(self, value: int) -> int:
        """Return the smallest of the processes' numbers."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self.host_group)
        return int(tensor)

    def check_same(self, text: str) -> None:
        """Raise where the processes were given different texts."""
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
        if self.min_host(number) != -self.min_host(-number):
            raise ScbinTrainingError(
                "T04",
                f"the {self.size} processes that train together have different data, settings or tasks. Call this with the same "
                "arguments in all of them.",
            )

    def gather(self, rows: np.ndarray, n_rows: int) -> np.ndarray:
        """Return the float32 rows of all processes; each has computed its `share` of `n_rows`."""
        if self.size == 1:
            return rows
        shares = [len(part) for part in np.array_split(np.arange(n_rows), self.size)]
        padded = torch.zeros(max(shares), rows.shape[1])
        padded[: len(rows)] = torch.from_numpy(rows)
        parts = [torch.empty_like(padded) for _ in shares]
        dist.all_gather(parts, padded, group=self.host_group)
        return torch.cat([part[:n] for part, n in zip(parts, shares, strict=True)]).numpy()

    def sum_device(self, values: Tensor) -> Tensor:
        """Sum a tensor over all processes where it is."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients over all processes, in buckets that travel while the next is filled.

        In place of `DistributedDataParallel`, whose reducer expects one backward per process: here one process may have three
        packs and another none, and the sum over targets must be exact. What has a gradient in no process keeps none, so that
        the optimiser leaves it alone as in a run of one process.
        """
        if self.size == 1:
            return
        parameters = list(parameters)
        moved = self.sum_host(np.array([float(p.grad is not None) for p in parameters])) > 0
        buckets: list[list[nn.Parameter]] = [[]]
        n_bytes = 0
        for parameter in (p for p, moves in zip(parameters, moved, strict=True) if moves):
            if n_bytes >= _BUCKET:
                buckets, n_bytes = [*buckets, []], 0
            buckets[-1].append(parameter)
            n_bytes += parameter.numel() * parameter.element_size()
        sent = []
        for bucket in buckets if moved.any() else ():
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket])
            sent.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        for bucket, flat, message in sent:
            message.wait()
            for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = part.view_as(parameter)

    def broadcast(self, module: nn.Module) -> None:
        """Give every process the first one's parameters and buffers."""
        if self.size > 1:
            for tensor in [*module.parameters(), *module.buffers()]:
                dist.broadcast(tensor.data, 0)

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier(group=self.host_group)


def is_first_process() -> bool:
    """Whether this process is the one that writes files: the first under `torchrun`, or the only one."""
    if dist.is_initialized():
        return dist.get_rank() == 0
    return not _launched() or os.environ["RANK"] == "0"


@contextmanager
def joined_world(timeout: float = 30.0) -> Iterator[World]:
    """Join the processes that `torchrun` (or any launcher with its environment variables) started; else be alone.

    A process group that exists already is used. One that is made here stays until the process ends: the processes cannot meet a
    second time over the same address. `timeout` is how many minutes a process waits for the others.
    """
    local_rank, limit = int(os.environ.get("LOCAL_RANK", "0")), timedelta(minutes=timeout)
    if not dist.is_initialized():
        if not _launched():
            yield World()
            return
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=limit)
        atexit.register(_leave)
    whole = dist.group.WORLD
    if whole not in _host_groups:
        _host_groups.clear()  # of a group that is no more
        _host_groups[whole] = dist.new_group(backend="gloo", timeout=limit)
    world = World(dist.get_rank(), dist.get_world_size(), local_rank, _host_groups[whole])
    yield world
    world.barrier()


_host_groups: dict[Any, Any] = {}  # by process group: the same processes, talking over their hosts


def _launched() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and "MASTER_ADDR" in os.environ


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
