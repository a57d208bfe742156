"""Shapes of networks by name, our own sizes and those of the systems scbin unites; and what numbers may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from scbin._arguments import check_fields, shown
from scbin._errors import ScbinInputError

if TYPE_CHECKING:
    from collections.abc import Mapping

SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
SHAPE = (*SIZES, "hidden_act", "hidden_dropout_prob", "initializer_range")


# the keys of config.json that are read: choices, or the least and the largest number; whatever else the file says has no effect
CONFIG_KEYS: dict[str, tuple[Any, ...]] = {
    "vocab_size": (2, 2**22),
    "max_position_embeddings": (1, 2**18),
    "type_vocab_size": (1, 16),
    "num_hidden_layers": (1, 96),
    "hidden_size": (8, 8192),
    "num_attention_heads": (1, 256),
    "intermediate_size": (8, 65_536),
    "hidden_act": ("gelu", "gelu_new", "relu", "silu"),
    "hidden_dropout_prob": (0.0, 1.0),
    "attention_probs_dropout_prob": (0.0, 1.0),
    "layer_norm_eps": (1e-15, 1e-2),
    "initializer_range": (1e-6, 1.0),
    "pad_token_id": (0, 2**22),
    "tie_word_embeddings": (True, False),
}
MOST_TIMES_HIDDEN = 8  # how many times the hidden size the intermediate size may be


def misfit(value: Any, allowed: tuple[Any, ...]) -> str | None:
    """Return what a value needs to be, where it is not; `None` where it is.

    Examples
    --------
    >>> misfit(0, (1, 96)), misfit(-0.1, (0.0, 1.0)), misfit(3, (1, 96))
    ('a whole number from 1 to 96', 'a number from 0 to 1', None)
    """
    low, high = allowed[0], allowed[-1]
    if isinstance(low, str | bool):
        fits, need = type(value) is type(low) and value in allowed, f"one of {', '.join(map(repr, allowed))}"
    else:
        whole = type(low) is int
        fits = type(value) in ((int,) if whole else (int, float)) and low <= value <= high
        need = f"a whole number from {low:,} to {high:,}" if whole else f"a number from {low:g} to {high:g}"
    return None if fits else need


def shape_misfit(shape: Mapping[str, Any]) -> str | None:
    """Return what does not fit together in the shape of a network, or `None`."""
    hidden, inner, heads = (shape[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    if hidden % heads:
        return f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}"
    if inner > MOST_TIMES_HIDDEN * hidden:
        return f"intermediate_size={inner} is more than {MOST_TIMES_HIDDEN} times hidden_size={hidden}"
    return None


def check_limits(values: Mapping[str, Any], limits: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise for the first value that its limits do not allow; `None` passes."""
    for name, allowed in limits.items():
        if values[name] is not None and (words := misfit(values[name], allowed)):
            raise ScbinInputError("A02", f"{name} is {shown(values[name])}; it needs to be {words}.")


@dataclass(frozen=True)
class Network:
    """Shape of a network. For its training see :class:`scbin.Training`.

    The names are those of `transformers.BertConfig`. A backbone ignores settings that it does not need.

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
        Dropout on the hidden states. In the attention there is none.
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
    initializer_range: float = 0.02
    max_length: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        limits = {name: CONFIG_KEYS[name] for name in SHAPE}
        check_limits(vars(self), limits | {"max_length": CONFIG_KEYS["max_position_embeddings"]})
        if fault := shape_misfit(vars(self)):
            raise ScbinInputError("A02", f"{fault}.")


PRESETS: dict[str, Network] = {
    "tiny": Network(2, 64, 128, 2, hidden_dropout_prob=0.0),
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


def preset_for(n_cells: int) -> str:
    """Return the name of the preset that fits a number of cells: beyond it the next one has enough to learn from.

    Examples
    --------
    >>> preset_for(3_000), preset_for(50_000)
    ('tiny', 'small')
    """
    return "tiny" if n_cells <= 20_000 else "small" if n_cells <= 200_000 else "base"


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
