"""BERT on single cells, inside AnnData."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from scbin import datasets, get, pl, pp, tl
    from scbin._errors import ScbinError, ScbinInputWarning
    from scbin.encoding.vocabulary import Vocabulary
    from scbin.model import Model

__all__ = ["Model", "ScbinError", "ScbinInputWarning", "Vocabulary", "datasets", "get", "pl", "pp", "tl"]

# loaded when first used: torch takes seconds, and `import scbin` shall not
_CLASSES = {"Model": "scbin.model", "Vocabulary": "scbin.encoding.vocabulary"}
_CLASSES |= {"ScbinError": "scbin._errors", "ScbinInputWarning": "scbin._errors"}


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(importlib.import_module(_CLASSES[name]), name)
    if name in __all__:
        return importlib.import_module(f"scbin.{name}")
    raise AttributeError(f"module 'scbin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
