"""Shapes of networks by name: our own sizes and those of the systems scbin unites."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from scbin._arguments import check_fields, shown
from scbin._errors import ScbinInputError
from scbin.nn.limits import CONFIG_KEYS, check_limits, shape_misfit

SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
SHAPE = (*SIZES, "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range")


@dataclass(frozen=True)
class Network:
    """Shape of a network. How it is trained is a :class:`scbin.Training`.

    The names are those of `transformers.BertConfig`; what one backbone has no use for, it leaves alone.

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

    Examples
    --------
    >>> Network(2, 64, 128, 4).hidden_act
    'gelu'
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

    def __post_init__(self) -> None:
        check_fields(self)
        limits = {name: CONFIG_KEYS[name] for name in SHAPE}
        check_limits(vars(self), limits | {"max_length": CONFIG_KEYS["max_position_embeddings"]})
        object.__setattr__(self, "initializer_range", float(self.initializer_range))  # transformers takes no 1
        fault = shape_misfit(vars(self))
        if fault is not None:
            raise ScbinInputError("A02", f"{fault}.")

    @property
    def n_encoder_weights(self) -> int:
        """Weights of the matrices in the layers, which the embedding tables come on top of."""
        return self.num_hidden_layers * (4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size)


PRESETS: dict[str, Network] = {
    "tiny": Network(2, 64, 128, 4, hidden_dropout_prob=0.0),
    "small": Network(3, 128, 256, 4, hidden_dropout_prob=0.0),
    "base": Network(6, 256, 1024, 8, hidden_dropout_prob=0.0),
    "geneformer-v1-6l": Network(6, 256, 512, 4, "relu", 0.02, max_length=2048),
    "geneformer-v1-12l": Network(12, 512, 1024, 8, "relu", 0.02, max_length=2048),
    "geneformer-v2-104m": Network(12, 768, 3072, 12, "relu", max_length=4096),
    "geneformer-v2-316m": Network(18, 1152, 4608, 18, "relu", max_length=4096),
    "polygene": Network(12, 768, 3072, 12),
    "perturbgene-base": Network(12, 768, 3072, 12),
    "perturbgene-large": Network(24, 1024, 4096, 16),
    "bioformers": Network(12, 768, 3072, 12),
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
