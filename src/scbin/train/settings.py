"""How to train: everything but the data, the network and what is to be learned."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from scbin._arguments import flags, numbers, paths, plain, texts, whole_numbers
from scbin._errors import ScbinInputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from scbin.nn.device import Precision


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a training run.

    Parameters
    ----------
    epochs
        Times every cell is seen.
    max_steps
        Stop after so many steps even if epochs are left; `None` for no such limit.
    cells_per_step
        Cells whose gradients make one step of the optimiser, over all processes.
    token_budget
        Most tokens to go through the network at once. Memory follows it; what is learned does not.
    learning_rate, schedule, warmup
        Peak, shape behind it, and length of the rise to it: a share of all steps below 1, else steps.
    weight_decay, betas, epsilon
        Of AdamW; biases and LayerNorms do not decay.
    clip
        Largest norm of the gradient; `None` leaves it as it is.
    rate_scale
        Factors on the learning rate by part of a parameter's name, such as `{"position_embeddings": 0.1}`.
    precision
        Of the matrix products; weights, optimiser, softmax and pooling stay in float32.
    device
        `"auto"` takes cuda, then mps, then cpu.
    seed
        Of the order, the masks, the validation cells and dropout.
    validation_share, validation_most, validate_every
        Share of cells held out, about how many at most, and steps between validations (`None`: once per epoch).
    patience
        Validations in a row without a better loss after which training stops, and the best state counts, the start included.
        `None`: neither.
    save_dir, checkpoint_every, keep, resume
        Where to keep checkpoints, steps between them (`None`: once per epoch), how many, and whether to go on from the newest.
    gradient_checkpointing
        Compute activations twice instead of keeping them: longer cells, a third slower.
    compile
        Let `torch.compile` fuse the feed-forward blocks. It pays on GPUs in long runs; on CPU nothing was gained.
    progress
        Show a progress bar.
    tensorboard
        Directory for TensorBoard; `None` for none.
    wandb
        Name of a Weights & Biases project; `None` for none.

    Examples
    --------
    >>> TrainSettings(epochs=3, learning_rate=1e-4).schedule
    'cosine'
    """

    epochs: int = 10
    max_steps: int | None = None
    cells_per_step: int = 64
    token_budget: int = 32_768
    learning_rate: float = 5e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    clip: float | None = 1.0
    rate_scale: Mapping[str, float] = field(default_factory=dict)
    precision: Precision = "auto"
    device: str = "auto"
    seed: int = 0
    validation_share: float = 0.05
    validation_most: int = 2_000
    validate_every: int | None = None
    patience: int | None = None
    save_dir: str | Path | None = None
    checkpoint_every: int | None = None
    keep: int = 2
    resume: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    progress: bool = True
    tensorboard: str | Path | None = None
    wandb: str | None = None

    def __post_init__(self) -> None:
        self._check_types()
        for item in fields(self):
            object.__setattr__(self, item.name, plain(getattr(self, item.name)))
        for name in ("epochs", "cells_per_step", "token_budget", "keep"):
            if getattr(self, name) < 1:
                raise ScbinInputError("T30", f"{name} is {getattr(self, name)}; it needs to be at least 1.")
        if self.seed < 0:
            raise ScbinInputError("T30", f"seed is {self.seed}; it needs to be 0 or more.")
        for name in ("max_steps", "checkpoint_every", "validate_every", "patience"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ScbinInputError("T30", f"{name} is {getattr(self, name)}; it needs to be at least 1, or None.")
        for name in ("learning_rate", "warmup", "weight_decay", "epsilon"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ScbinInputError("T30", f"{name} is {getattr(self, name)}; it needs a finite number, not below 0.")
        if not 0 <= self.validation_share < 1:
            raise ScbinInputError("T30", f"validation_share is {self.validation_share}; it needs to be in [0, 1).")
        if self.schedule not in ("cosine", "linear", "constant"):
            raise ScbinInputError("T30", f"schedule is {self.schedule!r}; choose 'cosine', 'linear' or 'constant'.")
        if self.resume and self.save_dir is None:
            raise ScbinInputError("T31", "resume=True needs save_dir, the directory with the checkpoints.")
        if self.checkpoint_every is not None and self.save_dir is None:
            raise ScbinInputError(
                "T35",
                f"checkpoint_every={self.checkpoint_every} needs save_dir, the directory to write checkpoints to.",
            )

    def _check_types(self) -> None:
        whole = ("epochs", "cells_per_step", "token_budget", "seed", "validation_most", "keep")
        whole_numbers(**{name: getattr(self, name) for name in whole})
        maybe = ("max_steps", "validate_every", "checkpoint_every", "patience")
        whole_numbers(optional=True, **{name: getattr(self, name) for name in maybe})
        real = ("learning_rate", "warmup", "weight_decay", "epsilon", "validation_share")
        numbers(**{name: getattr(self, name) for name in real})
        numbers(optional=True, clip=self.clip)
        switches = ("resume", "gradient_checkpointing", "compile", "progress")
        flags(**{name: getattr(self, name) for name in switches})
        paths(optional=True, save_dir=self.save_dir, tensorboard=self.tensorboard)
        texts(optional=True, wandb=self.wandb)

    def learned(self) -> dict[str, Any]:
        """Return the settings that what is learned depends on; a resumed run must have the same ones."""
        incidental = {"token_budget", "device", "save_dir", "checkpoint_every", "keep", "resume", "progress", "compile"}
        incidental |= {"tensorboard", "wandb", "gradient_checkpointing"}
        return {key: value for key, value in asdict(self).items() if key not in incidental}
