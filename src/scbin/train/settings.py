"""How to train: everything but the data and the network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from scbin._arguments import check_fields, instances, numbers, plain
from scbin._errors import ScbinInputError
from scbin.nn.presets import check_limits
from scbin.nn.run import Precision  # noqa: TC001 (`check_fields` reads its choices)

if TYPE_CHECKING:
    from collections.abc import Callable

_COUNTS = ("epochs", "cells_per_step", "token_budget", "validate_every", "patience", "checkpoint_every")
_LIMITS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_COUNTS, (1, 2**31)),
    "max_steps": (0, 2**31),
    **dict.fromkeys(("learning_rate", "weight_decay"), (0.0, 100.0)),
    "warmup": (0.0, 1e9),
    **dict.fromkeys(("clip", "timeout"), (1e-6, math.inf)),
    "held_out": (0.0, 0.99),
}
_PROBABILITIES = ("gene_mask_prob", "phenotype_mask_prob", "phenotype_drop", "zero_swap", "nonzero_ratio")
# what a run's result does not depend on
_INCIDENTAL = ("token_budget", "checkpoint_every", "timeout", "callbacks")


@dataclass(frozen=True)
class Training:
    """How a network is trained.

    The defaults of the first eight parameters are those of the preset.

    Parameters
    ----------
    epochs
        Number of passes over the cells.
    cells_per_step
        Cells whose gradients make one step of the optimiser, over all processes.
    learning_rate
        Peak of the learning rate. That of the count head is five times as high.
    schedule
        How the learning rate falls after its peak.
    warmup
        Steps until the peak of the learning rate; below 1, a fraction of all steps.
    weight_decay
        Weight decay of AdamW. Biases and norms do not decay.
    clip
        Maximum norm of the gradient; `float("inf")` does not clip.
    precision
        Type of the matrix products: `"float32"`, `"bfloat16"`, or `"auto"` for what is fastest. Weights and optimiser are float32.
    max_steps
        Maximum number of steps.
    token_budget
        Most tokens that go through the network at once. Memory follows it; what is learned does not.
    held_out
        Fraction of the cells that are held out for validation, at most about 2,000 cells.
    validate_every
        Steps between validations. Default: a twelfth of the run, and at least 25.
    patience
        Number of validations without a better loss after which training stops. The best weights are kept, possibly those at the
        start. `None` trains to the end and keeps the last weights.
    checkpoint_every
        Steps between checkpoints, of which the newest two stay. Default: once per epoch.
    timeout
        Minutes that a process waits for the others before it gives up; more than the slowest step, end of an epoch or save takes.
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
    schedule: Literal["cosine", "linear"] | None = None
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
        if self.epochs is not None:
            return how
        fewest, most = STEPS.get(name, (0, math.inf))
        of_epoch = math.ceil(max(n_cells, 1) / how.cells_per_step)
        return replace(how, epochs=max(1, math.ceil(min(max(how.epochs, fewest / of_epoch), most / of_epoch))))

    def learned(self) -> dict[str, Any]:
        """Return the settings that what is learned depends on, as plain values; a resumed run must have the same ones."""
        plain = asdict(replace(self.complete(), callbacks=()))  # in JSON there is no infinity
        return {name: None if plain[name] == math.inf else plain[name] for name in plain if name not in _INCIDENTAL}


@dataclass(frozen=True)
class Masking:
    """Which tokens are masked in training, how often, and by what they are replaced.

    The defaults hide 15 % of the genes and half of the phenotypes. If rows have no zeros, some unexpressed genes are masked, too,
    so that bin 0 is as frequent among the labels as the other bins on average. Randomness is a function of (seed, epoch, cell):
    neither batches nor processes change which tokens are hidden.

    Parameters
    ----------
    gene_mask_prob
        Probability that a gene is masked and predicted.
    phenotype_mask_prob
        Probability that a phenotype is masked and predicted; `[NO_X]` never is.
    replacement
        Fractions of hidden genes that become `[MASK]`, become a random token, stay as they are. They sum to 1. `None` is (0.8,
        0.1, 0.1), and (1, 0, 0) where tokens hold counts, whose sum a random one would change.
    random_from
        Where random tokens come from: the position's `"group"`, or the whole `"vocabulary"`.
    mask_specials
        Mask and predict `[CLS]`, `[START]` and `[END]`, too, as in Geneformer.
    phenotype_drop
        Fraction of the masked phenotypes that are removed without being predicted.
    zero_swap
        For rows without zeros: probability per cell that hidden genes give their place to unexpressed ones, so that 1 / bins of
        all labels are bin 0 (PerturbGene: 0.9). Then no others are asked for.
    nonzero_ratio
        For rows with zeros: hide exactly `gene_mask_prob` times the number of genes, this fraction of them expressed
        (Bioformers: 0.5), no refill where there are too few.
    attend_zeros
        For rows with zeros: whether zeros are attended to, hidden or not (Polygene: `False`).

    Examples
    --------
    >>> Masking(gene_mask_prob=0.3, replacement=(1, 0, 0)).gene_mask_prob
    0.3
    """

    gene_mask_prob: float = 0.15
    phenotype_mask_prob: float = 0.5
    replacement: tuple[float, float, float] | None = None
    random_from: Literal["group", "vocabulary"] = "group"
    mask_specials: bool = False
    phenotype_drop: float = 0.0
    zero_swap: float = 0.0
    nonzero_ratio: float | None = None
    attend_zeros: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_limits(vars(self), dict.fromkeys(_PROBABILITIES, (0.0, 1.0)))
        if self.replacement is not None:
            parts = tuple(float(part) for part in self.replacement)
            if len(parts) != 3 or min(parts) < 0 or not abs(sum(parts) - 1) < 1e-6:
                raise ScbinInputError("A02", f"replacement is {parts}; it needs three fractions that sum to 1.")
            object.__setattr__(self, "replacement", parts)


@dataclass(frozen=True)
class Loss:
    """How the prediction of a hidden gene or phenotype is scored.

    Parameters
    ----------
    kind
        Score of genes: `"cross_entropy"`, which with two levels is the binary one, or `"ordinal"`, the cross entropy against a
        Gaussian around the true bin, so that near misses cost less. Phenotypes always have the cross entropy.
    label_smoothing
        Fraction of the target that is spread evenly over the group (or vocabulary).
    sigma
        Standard deviation of the Gaussian, in bins.
    over
        Probabilities sum to one over the `"group"` of the position (the levels of a gene, the values of a phenotype), or over
        the whole `"vocabulary"`, as in Geneformer, Polygene and PerturbGene.
    positions
        Score the `"masked"` positions, or `"all"` positions, as in Bioformers.
    weights
        Weight of each loss, which is a mean, in the sum: `{"genes": 1.0, "cell_vector": 0.5}`. Default 1.

    Examples
    --------
    >>> Loss("ordinal", sigma=0.7).over
    'group'
    """

    kind: Literal["cross_entropy", "ordinal"] = "cross_entropy"
    label_smoothing: float = 0.0
    sigma: float = 1.0
    over: Literal["group", "vocabulary"] = "group"
    positions: Literal["masked", "all"] = "masked"
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        instances(Mapping, "a dict by loss", weights=self.weights)
        weights = {f"weights[{name!r}]": plain(weight) for name, weight in self.weights.items()}
        numbers(**weights)
        limits = {"label_smoothing": (0.0, 0.99), "sigma": (1e-3, 1e3), **dict.fromkeys(weights, (0.0, 1e9))}
        check_limits(vars(self) | weights, limits)
        if self.kind == "ordinal" and self.over == "vocabulary":
            raise ScbinInputError("A03", 'kind="ordinal" goes with over="group": bins of one gene follow one another.')
        object.__setattr__(self, "weights", {name: float(weight) for name, weight in self.weights.items()})


@dataclass(frozen=True)
class Finetuning:
    """How labels are held out and learned.

    Parameters
    ----------
    validation
        Fraction of the labelled cells (or genes) that are held out for early stopping, model selection and calibration.
    gene_dropout
        Fraction of the genes of a cell that are left out at random in each epoch.
    label_smoothing
        Fraction of each label that is distributed evenly over all classes.

    Examples
    --------
    >>> Finetuning(validation=0.2).gene_dropout
    0.3
    """

    validation: float = 0.1
    gene_dropout: float = 0.3
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        check_fields(self)
        check_limits(vars(self), dict.fromkeys(("validation", "gene_dropout", "label_smoothing"), (0.0, 0.99)))


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
