"""How to train: everything but the data, the network and what is to be learned."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from scbin._arguments import check_fields, instances, numbers
from scbin.nn.device import Precision  # noqa: TC001 (`check_fields` reads its choices)
from scbin.nn.limits import BELOW_1, LARGEST, TINY, check_limits
from scbin.nn.presets import Network

if TYPE_CHECKING:
    from pathlib import Path

_OF_PRESET = ("epochs", "cells_per_step", "learning_rate", "schedule", "warmup", "weight_decay", "clip", "precision")
_DEFAULTS = {item.name: item.default for item in fields(Network) if item.name in _OF_PRESET} | {"rates": {}}
_INCIDENTAL = (
    *("token_budget", "checkpoint_every", "keep_checkpoints", "gradient_checkpointing", "compile", "timeout"),
    *("tensorboard", "wandb", "callbacks"),
)
_COUNTS = ("epochs", "cells_per_step", "token_budget", "most_held_out", "validate_every", "patience")
_LIMITS = {
    **dict.fromkeys((*_COUNTS, "checkpoint_every", "keep_checkpoints"), (1, sys.maxsize)),
    "max_steps": (0, sys.maxsize),
    **dict.fromkeys(("learning_rate", "warmup", "weight_decay", "epsilon"), (0.0, LARGEST)),
    **dict.fromkeys(("clip", "timeout"), (TINY, math.inf)),
    "held_out": (0.0, BELOW_1),
}


@dataclass(frozen=True)
class Training:
    """How a network is trained.

    The defaults of the first eight parameters are those of the preset (:class:`scbin.Network`).

    Parameters
    ----------
    epochs
        Times every cell is seen.
    cells_per_step
        Cells whose gradients make one step of the optimiser, over all processes.
    learning_rate
        Its peak.
    schedule
        How the learning rate falls behind its peak.
    warmup
        Steps until the learning rate is at its peak; below 1, the fraction of all steps.
    weight_decay
        Weight decay of AdamW. Biases and norms do not decay.
    clip
        Largest norm of the gradient; `float("inf")` leaves it as it is.
    precision
        Type of the matrix products: `"float32"`, `"bfloat16"`, or `"auto"` for what is fastest. Weights and optimiser are float32.
    rates
        Factors on the learning rate by part of the network, such as `{"backbone": 0.1, "counts": 3}`. A key is the beginning of
        the names of parameters; the longest that fits counts. A factor of 0 freezes a part.
    betas
        Decay rates of the moments of AdamW.
    epsilon
        Epsilon of AdamW.
    max_steps
        Stop after so many steps even if epochs are left.
    token_budget
        Most tokens that go through the network at once. Memory follows it; what is learned does not.
    held_out
        Fraction of the cells that are held out for validation.
    most_held_out
        About how many cells are held out at most.
    validate_every
        Steps between validations. Default: a twelfth of the run, and at least 25.
    patience
        Validations in a row without a better loss after which training stops. The best weights are kept, those at the start
        included. `None` trains to the end and keeps the last weights.
    checkpoint_every
        Steps between checkpoints. Default: once per epoch.
    keep_checkpoints
        How many checkpoints are kept.
    gradient_checkpointing
        Compute activations twice instead of keeping them: longer cells fit, steps take a third longer.
    compile
        Let `torch.compile` fuse the feed-forward blocks. It pays on GPUs in long runs.
    timeout
        Minutes that a process waits for the others before it gives up.
    tensorboard
        Directory for TensorBoard.
    wandb
        Name of a Weights & Biases project.
    callbacks
        Functions called with the record of every step and of every validation, a dict with at least `step`. One that raises
        ends the run.

    Examples
    --------
    >>> Training(epochs=3, rates={"backbone": 0.1}).schedule is None  # the preset's
    True
    >>> Training(epochs=3).filled(epochs=10, learning_rate=3e-4).epochs
    3
    """

    epochs: int | None = None
    cells_per_step: int | None = None
    learning_rate: float | None = None
    schedule: Literal["cosine", "linear", "constant"] | None = None
    warmup: float | None = None
    weight_decay: float | None = None
    clip: float | None = None
    precision: Precision | None = None
    rates: Mapping[str, float] | None = None
    betas: tuple[float, float] = (0.9, 0.99)
    epsilon: float = 1e-8
    max_steps: int | None = None
    token_budget: int = 32_768
    held_out: float = 0.05
    most_held_out: int = 2_000
    validate_every: int | None = None
    patience: int | None = 4
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    gradient_checkpointing: bool = False
    compile: bool = False
    timeout: float = 30.0
    tensorboard: str | Path | None = None
    wandb: str | None = None
    callbacks: tuple[Callable[[Mapping[str, float]], None], ...] = field(default=())

    def __post_init__(self) -> None:
        check_fields(self)
        check_limits(vars(self), _LIMITS)
        instances(Mapping, "a dict of factors", optional=True, rates=self.rates)
        instances(tuple, "a tuple of functions", callbacks=self.callbacks)
        factors: dict[str, Any] = {f"rates[{part!r}]": factor for part, factor in (self.rates or {}).items()}
        numbers(**factors)
        check_limits(factors, dict.fromkeys(factors, (0.0, LARGEST)))

    def filled(self, **defaults: Any) -> Training:
        """Return the settings with these values where nothing was chosen."""
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    def complete(self) -> Training:
        """Return the settings with scbin's own values where nothing was chosen."""
        return self.filled(**_DEFAULTS)

    def learned(self) -> dict[str, Any]:
        """Return the settings that what is learned depends on, as plain values; a resumed run must have the same ones."""
        kept = replace(self, callbacks=(), rates=dict(self.rates or {})).complete()
        values = {name: value for name, value in asdict(kept).items() if name not in _INCIDENTAL}
        return {**values, "betas": list(self.betas), "clip": None if values["clip"] == math.inf else values["clip"]}
