"""The learning rate over the steps, and the parameter groups it is applied to."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from scbin.train.settings import TrainSettings


def learning_rate_factor(step: int, n_steps: int, warmup: float, schedule: str) -> float:
    """Return the share of the peak learning rate at a step (counted from 0).

    Examples
    --------
    >>> [learning_rate_factor(step, 10, 2, "linear") for step in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 0.125]
    """
    n_warm = math.ceil(warmup * n_steps) if warmup < 1 else int(warmup)
    if step < n_warm:
        return (step + 1) / n_warm
    if schedule == "constant":
        return 1.0
    progress = (step - n_warm) / max(n_steps - n_warm, 1)
    return max(1 - progress, 0.0) if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], settings: TrainSettings) -> torch.optim.AdamW:
    """Return a fused AdamW whose groups hold the decaying and the other parameters, by factor on the learning rate."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        scale = math.prod(factor for part, factor in settings.rate_scale.items() if part in name)
        decay = settings.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": p, "weight_decay": decay, "scale": scale} for (scale, decay), p in groups.items()],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group, each with its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
