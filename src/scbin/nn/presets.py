"""Shapes and optimiser settings by name: our own sizes and those of the systems scbin unites."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, fields
from typing import Literal

from scbin._arguments import plain, shown
from scbin._errors import ScbinInputError
from scbin.nn.limits import CONFIG_KEYS, Limit, misfit

_FROM_ZERO = Limit((int, float), "a finite number, not below 0", 0, sys.float_info.max)
_COUNT = Limit((int,), "a whole number, at least 1", 1, sys.maxsize)
_TRAINING = {
    "learning_rate": _FROM_ZERO,
    "schedule": Limit((str,), "'cosine', 'linear' or 'constant'", values=("cosine", "linear", "constant")),
    "warmup": _FROM_ZERO,
    "weight_decay": _FROM_ZERO,
    "cells_per_step": _COUNT,
    "epochs": _COUNT,
    "fewest_steps": Limit((int,), "a whole number, not below 0", 0, sys.maxsize),
    "precision": Limit((str,), "'auto', 'float32' or 'bfloat16'", values=("auto", "float32", "bfloat16")),
    "clip": Limit((int, float), "a finite number above 0, or None", sys.float_info.min, sys.float_info.max),
}


@dataclass(frozen=True)
class Preset:
    """Shape of a network and how it was, or is best, trained."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    hidden_act: Literal["gelu", "gelu_new", "relu", "silu"] = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.0  # the packed kernel has none, and on CPU it is the largest single cost
    initializer_range: float = 0.02  # standard deviation of random weights
    max_length: int | None = None  # positions; None: as many as the vocabulary has
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.05  # below 1: share of all steps; else steps
    weight_decay: float = 0.01
    cells_per_step: int = 64
    epochs: int = 10
    fewest_steps: int = 0  # more epochs where the cells are too few to make so many steps
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    clip: float | None = 1.0  # largest norm of the gradient; None: as it is

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, plain(getattr(self, item.name)))
        limits = {**CONFIG_KEYS, "max_length": CONFIG_KEYS["max_position_embeddings"], **_TRAINING}
        for item in fields(self):
            value, limit = getattr(self, item.name), limits[item.name]
            if not limit(value) and not (value is None and item.name in ("max_length", "clip")):
                raise ScbinInputError("T12", f"{item.name} is {shown(value)}; it needs to be {limit.words}.")
        object.__setattr__(self, "initializer_range", float(self.initializer_range))  # transformers takes no 1
        fault = misfit(vars(self))
        if fault is not None:
            raise ScbinInputError("T12", f"{fault}.")

    @property
    def n_encoder_weights(self) -> int:
        """Weights of the matrices in the layers, which the embedding tables come on top of."""
        return self.num_hidden_layers * (4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size)

    def epochs_for(self, n_cells: int) -> int:
        """Return how often to see each of so many cells: `epochs` times, or as often as `fewest_steps` needs.

        Examples
        --------
        >>> Preset(2, 64, 128, 4, epochs=1, fewest_steps=600, cells_per_step=64).epochs_for(700)
        55
        """
        return max(self.epochs, math.ceil(self.fewest_steps / math.ceil(max(n_cells, 1) / self.cells_per_step)))


_BASE = (12, 768, 3072, 12)
_V1 = {"hidden_act": "relu", "hidden_dropout_prob": 0.02, "max_length": 2048, "schedule": "linear", "warmup": 10_000}
_V1 |= {"weight_decay": 0.001, "epochs": 3, "precision": "float32"}
_V2 = {"hidden_act": "relu", "max_length": 4096, "learning_rate": 2e-4, "warmup": 0.007, "weight_decay": 0.0}
_V2 |= {"cells_per_step": 234, "epochs": 3}

PRESETS: dict[str, Preset] = {
    "tiny": Preset(2, 64, 128, 4, hidden_dropout_prob=0.0, epochs=1, fewest_steps=200),
    "small": Preset(3, 128, 256, 4, hidden_dropout_prob=0.0, learning_rate=5e-4, epochs=2, fewest_steps=400),
    "base": Preset(
        6, 256, 1024, 8, hidden_dropout_prob=0.0, learning_rate=3e-4, cells_per_step=128, epochs=5, fewest_steps=5000
    ),
    "geneformer-v1-6l": Preset(6, 256, 512, 4, learning_rate=1e-3, cells_per_step=144, **_V1),  # type: ignore[arg-type]
    "geneformer-v1-12l": Preset(12, 512, 1024, 8, learning_rate=5e-4, cells_per_step=48, **_V1),  # type: ignore[arg-type]
    "geneformer-v2-104m": Preset(12, 768, 3072, 12, **_V2),  # type: ignore[arg-type]
    "geneformer-v2-316m": Preset(18, 1152, 4608, 18, **_V2),  # type: ignore[arg-type]
    "polygene": Preset(
        *_BASE, learning_rate=2e-5, schedule="linear", warmup=0.1, weight_decay=0.0, cells_per_step=36, epochs=100
    ),
    "perturbgene-base": Preset(
        *_BASE, learning_rate=1e-4, schedule="linear", warmup=0.1, weight_decay=0.05, cells_per_step=256
    ),
    "perturbgene-large": Preset(
        24, 1024, 4096, 16, learning_rate=5e-5, schedule="linear", warmup=0.1, weight_decay=0.05, cells_per_step=128
    ),
    "bioformers": Preset(
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


def preset(name: str | Preset) -> Preset:
    """Return a preset by name; a `Preset` of one's own passes through.

    Examples
    --------
    >>> preset("geneformer-v2-104m").hidden_size
    768
    """
    if isinstance(name, Preset):
        return name
    if not isinstance(name, str) or name not in PRESETS:
        raise ScbinInputError("T10", f"there is no preset {shown(name)}. Choose one of: {', '.join(PRESETS)}.")
    return PRESETS[name]
