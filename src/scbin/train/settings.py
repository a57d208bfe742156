"""How to train: everything but the data, the network and what is to be learned."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from scbin._arguments import check_fields, instances
from scbin.nn.device import Precision  # noqa: TC001 (`check_fields` reads its choices)
from scbin.nn.limits import check_limits

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_MOST = 2**31
_COUNTS = ("epochs", "cells_per_step", "token_budget", "validate_every", "patience", "checkpoint_every")
_LIMITS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_COUNTS, (1, _MOST)),
    "max_steps": (0, _MOST),
    **dict.fromkeys(("learning_rate", "weight_decay"), (0.0, 100.0)),
    "warmup": (0.0, 1e9),
    **dict.fromkeys(("clip", "timeout"), (1e-6, math.inf)),
    "held_out": (0.0, 0.99),
}
# what a run's result does not depend on
_INCIDENTAL = ("token_budget", "checkpoint_every", "timeout", "callbacks")


@dataclass(frozen=True)
class Training:
    """How a network is trained.

    The defaults of the first eight parameters are those of the preset, which a parameter of yours overrides.

    Parameters
    ----------
    epochs
        Times every cell is seen.
    cells_per_step
        Cells whose gradients make one step of the optimiser, over all processes.
    learning_rate
        Its peak. The count head learns at five times this rate.
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
    max_steps
        Stop after so many steps even if epochs are left.
    token_budget
        Most tokens that go through the network at once. Memory follows it; what is learned does not.
    held_out
        Fraction of the cells that are held out for validation, about 2,000 at most.
    validate_every
        Steps between validations. Default: a twelfth of the run, and at least 25.
    patience
        Validations in a row without a better loss after which training stops. The best weights are kept, those at the start
        included. `None` trains to the end and keeps the last weights.
    checkpoint_every
        Steps between checkpoints, of which the newest two stay. Default: once per epoch.
    timeout
        Minutes that a process waits for the others before it gives up: longer than the slowest step, epoch end or save.
    callbacks
        Functions called with the record of every step and of every validation, a dict with at least `step`: `(wandb.log,)`
        sends them to Weights & Biases. One that raises ends the run.

    Examples
    --------
    >>> Training(epochs=3).schedule is None  # the preset's
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
    max_steps: int | None = None
    token_budget: int = 32_768
    held_out: float = 0.05
    validate_every: int | None = None
    patience: int | None = 4
    checkpoint_every: int | None = None
    timeout: float = 10.0
    callbacks: tuple[Callable[[Mapping[str, float]], None], ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        check_limits(vars(self), _LIMITS)
        instances(tuple, "a tuple of functions", callbacks=self.callbacks)

    def filled(self, **defaults: Any) -> Training:
        """Return the settings with these values where nothing was chosen."""
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    def complete(self) -> Training:
        """Return the settings with scbin's own values where nothing was chosen."""
        return self.filled(**DEFAULTS)

    def for_preset(self, name: str, n_cells: int) -> Training:
        """Return the settings with those of a preset where nothing was chosen, to train on so many cells.

        Our own sizes take more epochs where the cells are too few to make enough steps, and fewer where they would make too many.

        Examples
        --------
        >>> Training().for_preset("tiny", 700).epochs, Training().for_preset("tiny", 20_000).epochs
        (50, 10)
        """
        how: Any = self.filled(**RECIPES.get(name, {})).complete()
        if self.epochs is None:
            fewest, most = STEPS.get(name, (0, math.inf))
            of_epoch = math.ceil(max(n_cells, 1) / how.cells_per_step)
            how = replace(how, epochs=max(1, math.ceil(min(max(how.epochs, fewest / of_epoch), most / of_epoch))))
        return how

    def learned(self) -> dict[str, Any]:
        """Return the settings that what is learned depends on, as plain values; a resumed run must have the same ones."""
        values = {
            name: value
            for name, value in asdict(replace(self.complete(), callbacks=())).items()
            if name not in _INCIDENTAL
        }
        return {**values, "clip": None if values["clip"] == math.inf else values["clip"]}


DEFAULTS: dict[str, Any] = {
    **{"epochs": 10, "cells_per_step": 64, "learning_rate": 1e-3, "schedule": "cosine", "warmup": 0.05},
    **{"weight_decay": 0.01, "clip": 1.0, "precision": "auto"},
}
_LINEAR = {"schedule": "linear", "warmup": 0.1}
_V1 = {"schedule": "linear", "warmup": 10_000, "weight_decay": 0.001, "epochs": 3}
_V2 = {"learning_rate": 2e-4, "warmup": 0.007, "weight_decay": 0.0, "cells_per_step": 234, "epochs": 3}

RECIPES: dict[str, dict[str, Any]] = {
    "tiny": {"cells_per_step": 128, "epochs": 38},
    "small": {"cells_per_step": 128, "epochs": 2, "learning_rate": 5e-4},
    "base": {"cells_per_step": 128, "epochs": 5, "learning_rate": 3e-4},
    "geneformer-v1-6l": {"learning_rate": 1e-3, "cells_per_step": 144, **_V1},
    "geneformer-v1-12l": {"learning_rate": 5e-4, "cells_per_step": 48, **_V1},
    "geneformer-v2-104m": _V2,
    "geneformer-v2-316m": _V2,
    "polygene": {"learning_rate": 2e-5, "weight_decay": 0.0, "cells_per_step": 36, "epochs": 100, **_LINEAR},
    "perturbgene-base": {"learning_rate": 1e-4, "weight_decay": 0.05, "cells_per_step": 256, **_LINEAR},
    "perturbgene-large": {"learning_rate": 5e-5, "weight_decay": 0.05, "cells_per_step": 128, **_LINEAR},
    "bioformers": {"learning_rate": 2e-4, "warmup": 2000, "cells_per_step": 2, "clip": math.inf},
}
"""Where the settings of a preset differ from `DEFAULTS`."""

STEPS: dict[str, tuple[float, float]] = {"tiny": (300, 1500), "small": (400, math.inf), "base": (5000, math.inf)}
"""Fewest and most steps of our own sizes."""
