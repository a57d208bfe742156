"""What the numbers of a network may be: one table for networks that are made and for those that are read from files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_TIMES_HIDDEN = 8
"""How many times the hidden size the intermediate size may be."""


@dataclass(frozen=True)
class Limit:
    """A kind of value and its bounds; `words` say both."""

    kinds: tuple[type, ...]
    words: str
    low: float = 0
    high: float = 0
    values: tuple[Any, ...] = ()

    def __call__(self, value: Any) -> bool:
        """Return whether a value is of the kind and within the bounds."""
        if type(value) not in self.kinds:
            return False
        return value in self.values if self.values else self.low <= value <= self.high


def _whole(low: int, high: int) -> Limit:
    return Limit((int,), f"a whole number from {low:,} to {high:,}", low, high)


def _real(low: float, high: float) -> Limit:
    return Limit((int, float), f"a number from {low:g} to {high:g}", low, high)


def _one_of(*values: Any) -> Limit:
    return Limit((type(values[0]),), f"one of {', '.join(map(repr, values))}", values=values)


# the keys of config.json that are read, and what they may be; whatever else the file says has no effect
CONFIG_KEYS: dict[str, Limit] = {
    "vocab_size": _whole(2, 2**22),
    "max_position_embeddings": _whole(1, 2**18),
    "type_vocab_size": _whole(1, 16),
    "num_hidden_layers": _whole(1, 96),
    "hidden_size": _whole(8, 8192),
    "num_attention_heads": _whole(1, 256),
    "intermediate_size": _whole(8, 65_536),
    "hidden_act": _one_of("gelu", "gelu_new", "relu", "silu"),
    "hidden_dropout_prob": _real(0, 1),
    "attention_probs_dropout_prob": _real(0, 1),
    "layer_norm_eps": _real(1e-15, 1e-2),
    "initializer_range": _real(1e-6, 1),
    "pad_token_id": _whole(0, 2**22),
    "tie_word_embeddings": _one_of(True, False),
}


def misfit(shape: Mapping[str, Any]) -> str | None:
    """Return what does not fit together in the shape of a network, or `None`."""
    hidden, inner, heads = (shape[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    if hidden % heads:
        return f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}"
    if inner > MOST_TIMES_HIDDEN * hidden:
        return f"intermediate_size={inner} is more than {MOST_TIMES_HIDDEN} times hidden_size={hidden}"
    return None
