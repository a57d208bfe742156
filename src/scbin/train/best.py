"""The best state of a run by its validation loss, the start included, and when to stop looking for a better one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping


class Best(nn.Module):
    """A copy of everything trainable as it was when the validation loss was least.

    Its numbers are parameters that rest, so that checkpoints keep them and a resumed run stops where it would have stopped.

    Parameters
    ----------
    modules
        What is trained.
    weights
        Of each task in the validation loss.
    patience
        Looks without a better loss until the run may stop.
    """

    def __init__(self, modules: Mapping[str, nn.Module], weights: Mapping[str, float], patience: int):
        super().__init__()
        self.weights, self.patience = weights, patience
        self._trained = {
            f"{prefix}.{name}".replace(".", "/"): parameter
            for prefix, module in modules.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self.copies = nn.ParameterDict(
            {
                name: nn.Parameter(parameter.detach().clone(), requires_grad=False)
                for name, parameter in self._trained.items()
            }
        )
        # loss, looks so far, looks since the best one; in 64 bits, so that comparisons are those of the run before
        self.record = nn.Parameter(torch.tensor([torch.inf, 0, 0], dtype=torch.float64), requires_grad=False)

    @property
    def loss(self) -> float:
        """The least loss seen."""
        return float(self.record[0])

    @property
    def exhausted(self) -> bool:
        """Whether so many looks in a row found nothing better that it is time to stop."""
        return bool(self.record[2] >= self.patience)

    @torch.no_grad()
    def look(self, validation: Mapping[str, float]) -> None:
        """Compare the state as it is now, with these validation losses, with the best so far."""
        there = {name: w for name, w in self.weights.items() if f"validation_{name}" in validation}
        loss = sum(w * validation[f"validation_{name}"] for name, w in there.items()) / max(sum(there.values()), 1e-12)
        better = loss < self.loss
        if better:
            for name, parameter in self._trained.items():
                self.copies[name].copy_(parameter)
        self.record.copy_(
            torch.tensor(
                [loss if better else self.loss, float(self.record[1]) + 1, 0 if better else float(self.record[2]) + 1],
                dtype=torch.float64,
            )
        )

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best state back."""
        for name, parameter in self._trained.items():
            parameter.copy_(self.copies[name])
