"""What a step learns."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from scbin.nn.network import CellNetwork
    from scbin.nn.packs import Pack
    from scbin.tokens.tokens import Tokens

EVALUATION = -1
"""The epoch of validation: what is hidden is then a function of (seed, cell) alone."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Some cells prepared for a step, on the host: packs within the token budget, each with what is asked about it.

    Targets are tensors, or tuples, lists, dicts and dataclasses of them, which the loop moves to the device; whatever else
    stands among them stays on the host.
    """

    packs: list[tuple[Pack, Any]]  # (pack, targets); what the targets are, the task knows
    counts: np.ndarray  # (losses,) float64, how much is asked for each loss


@runtime_checkable
class Task(Protocol):
    """What the trainer asks of a task; it is an `nn.Module` too, whose parameters are trained beside the network's.

    A task may have more: `layer`, whose hidden states it reads (default: -1, the last; `None`: none); `watched`, the name of
    the loss by which the best weights are chosen (default: their weighted sum); `describe()`, plain values that a resumed run
    must have too.
    """

    losses: tuple[str, ...]  # names
    weights: tuple[float, ...]  # of the losses in their sum

    def prepare(self, tokens: Tokens, cells: np.ndarray, *, seed: int, epoch: int, token_budget: int) -> Batch:
        """Hide tokens of some cells and note what is asked, as a function of (seed, epoch, cell)."""
        ...

    def loss(self, network: CellNetwork, hidden: Tensor | None, pack: Pack, targets: Any) -> Tensor:
        """Return the loss of a pack by name (losses,), summed over what is asked."""
        ...


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a pack, targets, or anything made of them, with every tensor changed.

    Examples
    --------
    >>> map_tensors({"labels": torch.ones(2), "names": ["a"]}, lambda tensor: tensor + 1)
    {'labels': tensor([2., 2.]), 'names': ['a']}
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, tuple | list) and not all(isinstance(item, int | str) for item in value[:1]):
        return type(value)(map_tensors(item, change) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: map_tensors(getattr(value, f.name), change) for f in fields(value)})
    return value


def to_device(value: Any, device: torch.device) -> Any:
    """Return a pack or targets on a device, without waiting for it where they are in pinned memory."""
    return value if device.type == "cpu" else map_tensors(value, lambda t: t.to(device, non_blocking=True))
