"""What numbers may be: of networks that are made, of those that are read from files, and of settings."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

from scbin._arguments import shown
from scbin._errors import ScbinInputError

if TYPE_CHECKING:
    from collections.abc import Mapping

TINY, LARGEST, BELOW_1 = sys.float_info.min, sys.float_info.max, math.nextafter(1, 0)

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
    >>> misfit(0, (1, 96)), misfit(-0.1, (0.0, BELOW_1)), misfit(3, (1, 96))
    ('a whole number from 1 to 96', 'a number from 0 to below 1', None)
    """
    low, high = allowed[0], allowed[-1]
    if isinstance(low, str | bool):
        is_one = type(value) is type(low) and value in allowed
        return None if is_one else f"one of {', '.join(map(repr, allowed))}"
    whole = type(low) is int
    if type(value) in ((int,) if whole else (int, float)) and low <= value <= high:
        return None
    first = "above 0" if low == TINY else f"from {low:,}" if whole else f"from {low:g}"
    last = (
        ""
        if high >= sys.maxsize
        else " to below 1"
        if high == BELOW_1
        else f" to {high:,}"
        if whole
        else f" to {high:g}"
    )
    return f"{'a whole number' if whole else 'a number'} {first}{last}"


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
