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
from collections.abc import Mapping
from dataclasses import fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

import numpy as np

from scbin._errors import ScbinInputError, ScbinTypeError

if TYPE_CHECKING:
    from collections.abc import Callable

    Function = TypeVar("Function", bound=Callable[..., Any])

_PLAIN: dict[str, tuple[Any, str]] = {
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
    "bool": (bool, "True or False"),
    "str": (str, "a text"),
    "os.PathLike[str]": (os.PathLike, "a path"),
    "Path": (os.PathLike, "a path"),
    "None": (type(None), "None"),
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
    signature, annotations = inspect.signature(function), function.__annotations__

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            bound.arguments[name] = _fitting(name, value, annotations.get(name, ""), function.__globals__)
        return function(*bound.args, **bound.kwargs)

    return wrapper  # type: ignore[return-value]


def check_fields(config: Any) -> None:
    """Check the fields of a frozen dataclass by their annotations; for its `__post_init__`."""
    scope = vars(sys.modules[type(config).__module__])
    for field in fields(config):
        value = _fitting(field.name, getattr(config, field.name), str(field.type), scope)
        object.__setattr__(config, field.name, value)


def _fitting(name: str, value: Any, annotation: str, scope: Mapping[str, Any]) -> Any:
    """Return a value that an annotation allows, raise for any other; one with a part that is not plain allows all."""
    value, kinds, choices = plain(value), [], []
    for part in re.split(r" \| (?![^\[]*\])", annotation):  # not within the brackets of a Literal
        if part in _PLAIN:
            kinds.append(part)
        elif part.startswith("Literal["):
            choices += ast.literal_eval(part.removeprefix("Literal"))
        elif get_origin(scope.get(part)) is Literal:
            choices += get_args(scope[part])
        else:
            return value
    if name == "seed" and isinstance(value, int) and value < 0:
        raise ScbinInputError("A02", f"seed is {value}; a seed is at least 0.")
    is_kind = any(isinstance(value, _PLAIN[kind][0]) and (kind == "bool" or type(value) is not bool) for kind in kinds)
    if is_kind or any(type(value) is type(choice) and value == choice for choice in choices):
        return value
    if choices and set(kinds) <= {"None"}:
        raise ScbinInputError("A02", f"{name} is {shown(value)}; choose one of {', '.join(map(repr, choices))}.")
    words = dict.fromkeys([*map(repr, choices), *(_PLAIN[kind][1] for kind in kinds)])
    instances((), " or ".join(words), **{name: value})


def config(kind: Any, value: Any) -> Any:
    """Return a config object: as it is, from a mapping of its fields, from the value of its first field, or the default."""
    known = list(kind.__dataclass_fields__)
    fields: Any = {known[0]: value} if isinstance(value, str) else {} if value is None else value
    if isinstance(fields, Mapping) and set(fields) <= set(known):
        return kind(**fields)
    instances(kind, f"a mapping with some of the fields {', '.join(known)}", **{kind.__name__.lower(): value})
    return value


def plain(value: Any) -> Any:
    """Return a number of numpy as one of Python, which JSON and torch take; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def numbers(**arguments: object) -> None:
    """Raise for the first argument that is not a number."""
    for name, value in arguments.items():
        _fitting(name, value, "float", {})


def choices(allowed: Mapping[str, tuple[Any, ...]], **arguments: object) -> None:
    """Raise for the first argument that is not one of those `allowed` for its name."""
    for name, value in arguments.items():
        _fitting(name, value, f"Literal{list(allowed[name])!r}", {})


def instances(kind: type | tuple[type, ...], what: str, /, *, optional: bool = False, **arguments: object) -> None:
    """Raise for the first argument that is not of a kind; `what` says in words what to pass."""
    for name, value in arguments.items():
        if not isinstance(value, kind) and not (value is None and optional):
            found = shown(value) if value is None else f"{shown(value)} (a {type(value).__name__})"
            raise ScbinTypeError("A01", f"{name} is {found}; pass {what}{' or None' if optional else ''}.")


def shown(value: object) -> str:
    """Return a value as it would be typed, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
