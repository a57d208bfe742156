"""Arguments of the face: their types and choices, checked before anything is computed.

`checked` reads them off a signature. The other checkers take arguments by their own names,
`numbers(rate=rate)`, so that the error can name them.
"""

from __future__ import annotations

import ast
import functools
import inspect
import os
import re
import sys
from dataclasses import fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

import numpy as np

from scbin._errors import ScbinInputError, ScbinTypeError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Function = TypeVar("Function", bound=Callable[..., Any])

_PLAIN: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((Integral,), "a whole number"),
    "float": ((Real,), "a number"),
    "bool": ((bool, np.bool_), "True or False"),
    "str": ((str,), "a text"),
    "os.PathLike[str]": ((os.PathLike,), "a path"),
    "Path": ((os.PathLike,), "a path"),
}


def checked(function: Function) -> Function:
    """Check the arguments of a function by its annotations before each call.

    Of numbers, texts, flags, paths and `Literal` choices, also with `| None`; an annotation with any other part is left to the
    function. Numbers of numpy become Python's.

    Examples
    --------
    >>> @checked
    ... def double(n: int) -> int:
    ...     return 2 * n
    >>> double(np.int64(2))
    4
    """
    signature = inspect.signature(function)
    rules = {name: _rule(function.__annotations__.get(name, ""), function.__globals__) for name in signature.parameters}

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            bound.arguments[name] = _checked(name, plain(value), rules[name])
        return function(*bound.args, **bound.kwargs)

    return wrapper  # type: ignore[return-value]


def check_fields(config: Any) -> None:
    """Check the fields of a frozen dataclass by their annotations; for its `__post_init__`."""
    scope = vars(sys.modules[type(config).__module__])
    for field in fields(config):
        value = plain(getattr(config, field.name))
        object.__setattr__(config, field.name, _checked(field.name, value, _rule(str(field.type), scope)))


def _rule(annotation: str, scope: Mapping[str, Any]) -> list[Any]:
    """Return what an annotation allows: names of kinds, "None" and choices (tuples); nothing if it has a part that is not plain."""
    rule: list[Any] = []
    for part in re.split(r" \| (?![^\[]*\])", annotation):  # not within the brackets of a Literal
        if part in _PLAIN or part == "None":
            rule.append(part)
        elif part.startswith("Literal["):
            rule.append(ast.literal_eval(f"({part[len('Literal[') : -1]},)"))
        elif get_origin(scope.get(part)) is Literal:
            rule.append(get_args(scope[part]))
        else:
            return []
    return rule


def _checked(name: str, value: Any, rule: list[Any]) -> Any:
    """Return a value that a rule allows, and raise for any other; without a rule everything is."""
    kinds = [part for part in rule if part in _PLAIN]
    choices = [choice for part in rule if isinstance(part, tuple) for choice in part]
    if (
        not rule
        or (value is None and "None" in rule)
        or any(value is choice or (type(value) is type(choice) and value == choice) for choice in choices)
        or any(isinstance(value, _PLAIN[k][0]) and (k == "bool" or not isinstance(value, bool)) for k in kinds)
    ):
        return value
    if choices and not kinds:
        raise ScbinInputError("A02", f"{name} is {shown(value)}; choose one of {', '.join(map(repr, choices))}.")
    words = " or ".join(dict.fromkeys([*(_PLAIN[kind][1] for kind in kinds), *map(repr, choices)]))
    instances((), words, optional="None" in rule, **{name: value})


def plain(value: Any) -> Any:
    """Return a number of numpy as one of Python, which JSON and torch take; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def numbers(**arguments: object) -> None:
    """Raise for the first argument that is not a number."""
    for name, value in arguments.items():
        _checked(name, value, ["float"])


def texts(**arguments: object) -> None:
    """Raise for the first argument that is not a text."""
    for name, value in arguments.items():
        _checked(name, value, ["str"])


def choices(allowed: Mapping[str, tuple[Any, ...]], **arguments: object) -> None:
    """Raise for the first argument that is not one of those `allowed` for its name."""
    for name, value in arguments.items():
        _checked(name, value, [allowed[name]])


def instances(kind: type | tuple[type, ...], what: str, /, *, optional: bool = False, **arguments: object) -> None:
    """Raise for the first argument that is not of a kind; `what` says in words what to pass."""
    for name, value in arguments.items():
        if not isinstance(value, kind) and not (value is None and optional):
            found = shown(value) if value is None else f"{shown(value)} (a {type(value).__name__})"
            raise ScbinTypeError("A01", f"{name} is {found}; pass {what}{', or None' if optional else ''}.")


def shown(value: object) -> str:
    """Return a value as it would be typed, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
