"""Arguments of the face: their types and choices, checked before anything is computed.

Each checker takes the arguments by their own names, `whole_numbers(epochs=epochs, seed=seed)`, so that the error can name them.
"""

from __future__ import annotations

import os
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from scbin._errors import ScbinInputError, ScbinTypeError

if TYPE_CHECKING:
    from collections.abc import Mapping


def plain(value: Any) -> Any:
    """Return a number of numpy as one of Python, which JSON and torch take; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def whole_numbers(*, optional: bool = False, **arguments: object) -> None:
    """Raise for the first argument that is not a whole number; `None` passes where it is `optional`."""
    for name, value in arguments.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            _refuse(name, value, "a whole number", optional)


def numbers(*, optional: bool = False, **arguments: object) -> None:
    """Raise for the first argument that is not a number."""
    for name, value in arguments.items():
        if not isinstance(value, Real) or isinstance(value, bool):
            _refuse(name, value, "a number", optional)


def flags(**arguments: object) -> None:
    """Raise for the first argument that is neither True nor False."""
    for name, value in arguments.items():
        if not isinstance(value, bool | np.bool_):
            _refuse(name, value, "True or False", optional=False)


def texts(*, optional: bool = False, **arguments: object) -> None:
    """Raise for the first argument that is not a text."""
    for name, value in arguments.items():
        if not isinstance(value, str):
            _refuse(name, value, "a text", optional)


def paths(*, optional: bool = False, **arguments: object) -> None:
    """Raise for the first argument that is not a path."""
    for name, value in arguments.items():
        if not isinstance(value, str | os.PathLike):
            _refuse(name, value, "a path", optional)


def instances(kind: type | tuple[type, ...], what: str, *, optional: bool = False, **arguments: object) -> None:
    """Raise for the first argument that is not of a kind; `what` says in words what to pass."""
    for name, value in arguments.items():
        if not isinstance(value, kind):
            _refuse(name, value, what, optional)


def choices(allowed: Mapping[str, tuple[Any, ...]], **arguments: object) -> None:
    """Raise for the first argument that is not one of those `allowed` for its name."""
    for name, value in arguments.items():
        if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in allowed[name]):
            listed = ", ".join(repr(choice) for choice in allowed[name])
            raise ScbinInputError("A02", f"{name} is {shown(value)}; choose one of {listed}.")


def shown(value: object) -> str:
    """Return a value as it would be typed, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse(name: str, value: object, what: str, optional: bool) -> None:
    if value is None and optional:
        return
    kind = "" if value is None else f" (a {type(value).__name__})"
    raise ScbinTypeError("A01", f"{name} is {shown(value)}{kind}; pass {what}{', or None' if optional else ''}.")
