"""Shapes and optimiser settings by name: our own sizes and those of the systems scbin unites."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from scbin._arguments import check_fields, instances, numbers, shown
from scbin._errors import ScbinInputError
from scbin.nn.limits import CONFIG_KEYS, LARGEST, TINY, check_limits, shape_misfit

SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
SHAPE = (*SIZES, "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range")
_LIMITS = {name: CONFIG_KEYS[name] for name in SHAPE} | {
    "max_length": CONFIG_KEYS["max_position_embeddings"],
    **dict.fromkeys(("learning_rate", "warmup", "weight_decay"), (0.0, LARGEST)),
    **dict.fromkeys(("cells_per_step", "epochs", "most_steps"), (1, sys.maxsize)),
    "fewest_steps": (0, sys.maxsize),
    "clip": (TINY, LARGEST),
}


@dataclass(frozen=True)
class Network:
    """Shape of a network and how it was, or is best, trained.

    The names of the shape are those of `transformers.BertConfig`; what one backbone has no use for, it leaves alone.

    Parameters
    ----------
    num_hidden_layers
        Layers of the backbone.
    hidden_size
        Width of the hidden states.
    intermediate_size
        Width inside the feed-forward blocks.
    num_attention_heads
        Heads of attention, a divisor of the hidden size.
    hidden_act
        Activation in the feed-forward blocks.
    hidden_dropout_prob
        Dropout on the hidden states.
    attention_probs_dropout_prob
        Dropout in the attention. The packed kernel has none, and on CPU it is the largest single cost.
    initializer_range
        Standard deviation of random weights.
    max_length
        Positions. Default: as many as the vocabulary has.
    learning_rate
        Its peak.
    schedule
        How the learning rate falls behind its peak.
    warmup
        Steps until the learning rate is at its peak; below 1, the fraction of all steps.
    weight_decay
        Weight decay of AdamW.
    cells_per_step
        Cells whose gradients make one step.
    epochs
        Times every cell is seen.
    fewest_steps
        More epochs where the cells are too few to make so many steps.
    most_steps
        Fewer epochs, but one at least, where they would make more steps.
    precision
        Type of the matrix products.
    clip
        Largest norm of the gradient; `None` leaves it as it is.
    rates
        Factors on the learning rate, by part of the network.

    Examples
    --------
    >>> Network(2, 64, 128, 4).schedule
    'cosine'
    """

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    hidden_act: Literal["gelu", "gelu_new", "relu", "silu"] = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    max_length: int | None = None
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.01
    cells_per_step: int = 64
    epochs: int = 10
    fewest_steps: int = 0
    most_steps: int | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    clip: float | None = 1.0
    rates: Mapping[str, float] = field(default_factory=lambda: {"counts": 5.0})

    def __post_init__(self) -> None:
        check_fields(self)
        check_limits(vars(self), _LIMITS)
        instances(Mapping, "a dict of factors by part", rates=self.rates)
        factors: dict[str, Any] = {f"rates[{part!r}]": factor for part, factor in self.rates.items()}
        numbers(**factors)
        object.__setattr__(self, "rates", {str(part): float(factor) for part, factor in self.rates.items()})
        object.__setattr__(self, "initializer_range", float(self.initializer_range))  # transformers takes no 1
        fault = shape_misfit(vars(self))
        if fault is not None:
            raise ScbinInputError("A02", f"{fault}.")

    @property
    def n_encoder_weights(self) -> int:
        """Weights of the matrices in the layers, which the embedding tables come on top of."""
        return self.num_hidden_layers * (4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size)

    def epochs_for(self, n_cells: int) -> int:
        """Return how often to see each of so many cells: `epochs` times, within `fewest_steps` and `most_steps`.

        Examples
        --------
        >>> Network(2, 64, 128, 4, epochs=1, fewest_steps=600, cells_per_step=64).epochs_for(700)
        55
        """
        steps = math.ceil(max(n_cells, 1) / self.cells_per_step)  # of one epoch
        most = math.inf if self.most_steps is None else self.most_steps / steps
        return max(1, math.ceil(min(max(self.epochs, self.fewest_steps / steps), most)))


_BASE = (12, 768, 3072, 12)
_V1 = {"hidden_act": "relu", "hidden_dropout_prob": 0.02, "max_length": 2048, "schedule": "linear", "warmup": 10_000}
_V1 |= {"weight_decay": 0.001, "epochs": 3, "precision": "float32"}
_V2 = {"hidden_act": "relu", "max_length": 4096, "learning_rate": 2e-4, "warmup": 0.007, "weight_decay": 0.0}
_V2 |= {"cells_per_step": 234, "epochs": 3}

PRESETS: dict[str, Network] = {
    "tiny": Network(
        2, 64, 128, 4, hidden_dropout_prob=0.0, cells_per_step=128, epochs=38, fewest_steps=300, most_steps=1500
    ),
    "small": Network(
        3, 128, 256, 4, hidden_dropout_prob=0.0, learning_rate=5e-4, cells_per_step=128, epochs=2, fewest_steps=400
    ),
    "base": Network(
        6, 256, 1024, 8, hidden_dropout_prob=0.0, learning_rate=3e-4, cells_per_step=128, epochs=5, fewest_steps=5000
    ),
    "geneformer-v1-6l": Network(6, 256, 512, 4, learning_rate=1e-3, cells_per_step=144, **_V1),  # type: ignore[arg-type]
    "geneformer-v1-12l": Network(12, 512, 1024, 8, learning_rate=5e-4, cells_per_step=48, **_V1),  # type: ignore[arg-type]
    "geneformer-v2-104m": Network(12, 768, 3072, 12, **_V2),  # type: ignore[arg-type]
    "geneformer-v2-316m": Network(18, 1152, 4608, 18, **_V2),  # type: ignore[arg-type]
    "polygene": Network(
        *_BASE, learning_rate=2e-5, schedule="linear", warmup=0.1, weight_decay=0.0, cells_per_step=36, epochs=100
    ),
    "perturbgene-base": Network(
        *_BASE, learning_rate=1e-4, schedule="linear", warmup=0.1, weight_decay=0.05, cells_per_step=256
    ),
    "perturbgene-large": Network(
        24, 1024, 4096, 16, learning_rate=5e-5, schedule="linear", warmup=0.1, weight_decay=0.05, cells_per_step=128
    ),
    "bioformers": Network(
        *_BASE, learning_rate=2e-4, warmup=2000, weight_decay=0.01, cells_per_step=2, precision="float32", clip=None
    ),
}


# the largest number of cells for which a size is chosen: beyond it the next one has enough to learn from
_AUTO = (("tiny", 20_000), ("small", 200_000), ("base", math.inf))


def preset_for(n_cells: int) -> str:
    """Return the name of the preset that fits a number of cells.

    Examples
    --------
    >>> preset_for(3_000), preset_for(50_000)
    ('tiny', 'small')
    """
    return next(name for name, most in _AUTO if n_cells <= most)


def preset(name: str | Network) -> Network:
    """Return a preset by name; a `Network` of one's own passes through.

    Examples
    --------
    >>> preset("geneformer-v2-104m").hidden_size
    768
    """
    if isinstance(name, Network):
        return name
    if not isinstance(name, str) or name not in PRESETS:
        raise ScbinInputError("A02", f"there is no preset {shown(name)}. Choose one of: {', '.join(PRESETS)}.")
    return PRESETS[name]
