"""What a search tries: spaces of settings, Geneformer's among them, and how a trial draws from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scbin._arguments import plain
from scbin._errors import ScbinInputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WEIGHT = "task_weight"
# (low, high) between two numbers, whole where both are; "log" on a logarithmic scale; a list: one of its values
CELLS: dict[str, Any] = {
    "learning_rate": (1e-6, 1e-3, "log"),
    "weight_decay": (0.0, 0.3),
    "schedule": ["linear", "cosine"],  # Geneformer's third, "polynomial", is of power 1 there: the linear one again
    "warmup": (100, 2_000),
    "seed": (0, 100),
}
MULTITASK: dict[str, Any] = {
    "learning_rate": (1e-5, 1e-3, "log"),
    "warmup": (0.005, 0.01),
    "weight_decay": (0.01, 0.1),
    "dropout": (0.0, 0.7),
    WEIGHT: (0.1, 2.0),
}
FIXED: dict[str, dict[str, Any]] = {"cells": {"epochs": 1}, "multitask": {"schedule": "cosine"}}


def default_space(n_targets: int, n_layers: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return Geneformer's space, for one target or for several, and what it keeps fixed."""
    if n_targets == 1:
        return dict(CELLS), FIXED["cells"]
    return {**MULTITASK, "freeze": (min(1, n_layers - 1), max(n_layers - 1, 0))}, FIXED["multitask"]


def plain_space(space: Mapping[str, Any]) -> dict[str, Any]:
    """Return a space whose numbers of numpy are Python's, which a storage takes, and whose arrays are lists."""

    def made_plain(choices: Any) -> Any:
        if isinstance(choices, np.ndarray):
            return choices.tolist()
        return type(choices)(map(plain, choices)) if type(choices) in (list, tuple) else choices

    return {name: made_plain(choices) for name, choices in space.items()}


def check_space(space: Mapping[str, Any], known: Sequence[str], fixed: Mapping[str, Any]) -> None:
    """Raise where an entry is no setting of `tl.finetune`, or says nothing to choose from."""
    for name, choices in space.items():
        if name != WEIGHT and name not in known:
            raise ScbinInputError(
                "E31", f"{name!r} in space= is no argument of scbin.tl.finetune. There are: {', '.join(known)}."
            )
        if name in fixed:
            raise ScbinInputError(
                "E37", f"{name!r} is in space= and given as a fixed argument; leave one of the two out."
            )
        if isinstance(choices, list) and choices:
            continue
        low_high = choices[:2] if isinstance(choices, tuple) and len(choices) in (2, 3) else (None, None)
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in low_high)
        as_log = isinstance(choices, tuple) and len(choices) == 3
        if not numbers or low_high[0] > low_high[1] or (as_log and (choices[2] != "log" or low_high[0] <= 0)):
            raise ScbinInputError(
                "E38",
                f"{name!r} in space= is {choices!r}; pass (low, high), (low, high, 'log') with positive numbers, or a list of "
                "values.",
            )


def draw(trial: Any, space: Mapping[str, Any], targets: Sequence[str]) -> dict[str, Any]:
    """Let a trial choose a value for every entry; returns arguments of `tl.finetune`, weights of targets under their name."""
    chosen: dict[str, Any] = {}
    for name, choices in space.items():
        if name == WEIGHT:
            chosen[WEIGHT] = {target: _one(trial, f"weight of {target}", choices) for target in targets}
        else:
            chosen[name] = _one(trial, name, choices)
    return chosen


def _one(trial: Any, name: str, choices: Any) -> Any:
    if isinstance(choices, list):
        # by number, because a storage holds plain values only
        plain = all(value is None or isinstance(value, str | int | float | bool) for value in choices)
        if plain:
            return trial.suggest_categorical(name, choices)
        return choices[trial.suggest_int(name, 0, len(choices) - 1)]
    low, high, *scale = choices
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(name, low, high, log=bool(scale))
    return trial.suggest_float(name, low, high, log=bool(scale))
