"""What numbers may be: of networks that are made, of those that are read from files, and of settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scbin._arguments import shown
from scbin._errors import ScbinInputError

if TYPE_CHECKING:
    from collections.abc import Mapping

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
        fits = type(value) is type(low) and value in allowed
        return None if fits else f"one of {', '.join(map(repr, allowed))}"
    if type(low) is int:
        fits = type(value) is int and low <= value <= high
        return None if fits else f"a whole number from {low:,} to {high:,}"
    fits = type(value) in (int, float) and low <= value <= high
    return None if fits else f"a number from {low:g} to {high:g}"


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
        words = None if values[name] is None else misfit(values[name], allowed)
        if words:
            raise ScbinInputError("A02", f"{name} is {shown(values[name])}; it needs to be {words}.")
