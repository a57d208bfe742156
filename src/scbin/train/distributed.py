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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor, nn

_BUCKET = 32 * 2**20  # bytes of gradient to a message


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

    def any_host(self, flag: bool) -> bool:
        """Return whether the flag is set anywhere."""
        return -self.min_host(-int(flag)) > 0

    def sum_device(self, values: Tensor) -> Tensor:
        """Sum a tensor over all processes where it is."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather_rows(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Return the rows of all processes, one process behind the other; `counts` are their numbers of rows."""
        if self.size == 1:
            return rows
        padded = rows.new_zeros(max(counts), rows.shape[1])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients over all processes, in buckets that travel while the next is filled.

        In place of `DistributedDataParallel`, whose reducer expects one backward per process: here one process may have three
        packs and another none, and the sum over targets must be exact.
        """
        if self.size == 1:
            return
        sent = []
        for bucket in _buckets([p for p in parameters if p.requires_grad]):
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket])
            sent.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        for bucket, flat, message in sent:
            message.wait()
            for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = part.view_as(parameter)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's values."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def from_first(self, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the float64 matrix that `make()` gives in the first process; the others wait for it."""
        if self.size == 1:
            return make()
        made = torch.from_numpy(np.ascontiguousarray(make(), dtype=np.float64)) if self.is_first else torch.zeros(0, 0)
        rows, columns = self.sum_host(np.array(made.shape if self.is_first else (0, 0), dtype=np.float64))
        matrix = made if self.is_first else torch.empty(int(rows), int(columns), dtype=torch.float64)
        dist.broadcast(matrix, 0, group=self.host_group)
        return matrix.numpy()

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier(group=self.host_group)


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    n_bytes = 0
    for parameter in parameters:
        bucket.append(parameter)
        n_bytes += parameter.numel() * parameter.element_size()
        if n_bytes >= _BUCKET:
            yield bucket
            bucket, n_bytes = [], 0
    if bucket:
        yield bucket


def is_first_process() -> bool:
    """Whether this process is the one that writes files: the first under `torchrun`, or the only one."""
    if dist.is_initialized():
        return dist.get_rank() == 0
    return not _launched() or os.environ["RANK"] == "0"


@contextmanager
def joined_world(timeout: timedelta = timedelta(minutes=30)) -> Iterator[World]:
    """Join the processes that `torchrun` (or any launcher with its environment variables) started; else be alone.

    A process group that exists already is used. One that is made here stays until the process ends: the processes cannot meet a
    second time over the same address.
    """
    if not dist.is_initialized():
        if not _launched():
            yield World()
            return
        if torch.cuda.is_available():
            torch.cuda.set_device(_local_rank() % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timeout)
        atexit.register(_leave)
    whole = dist.group.WORLD
    if whole not in _on_hosts:
        _on_hosts.clear()  # of a group that is no more
        _on_hosts[whole] = dist.new_group(backend="gloo", timeout=timeout)
    world = World(dist.get_rank(), dist.get_world_size(), _local_rank(), _on_hosts[whole])
    yield world
    world.barrier()


_on_hosts: dict[Any, Any] = {}  # by process group: the same processes, talking over their hosts


def _launched() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and "MASTER_ADDR" in os.environ


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
