"""Token models for single-cell data, BERT included, inside AnnData."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from scbin._errors import (
    ScbinError,
    ScbinInputError,
    ScbinInputWarning,
    ScbinModelError,
    ScbinTrainingError,
    ScbinTrainingWarning,
    ScbinTypeError,
)

__version__ = "0.2.0.dev0"

if TYPE_CHECKING:
    from scbin import datasets, get, pl, pp, tl
    from scbin._session import session_info
    from scbin.io.corpus import open_tokens
    from scbin.model import Model
    from scbin.nn.presets import Network
    from scbin.tl._perturb_statistics import Statistics
    from scbin.tokens.rules import Tokenization
    from scbin.tokens.vocabulary import Vocabulary
    from scbin.train.settings import Finetuning, Loss, Masking, Training

_ROOMS = ("datasets", "get", "pl", "pp", "tl")
# loaded when first used: torch takes seconds, and `import scbin` shall not
_CLASSES = {
    "Model": "scbin.model",
    "open_tokens": "scbin.io.corpus",
    "session_info": "scbin._session",
    "Vocabulary": "scbin.tokens.vocabulary",
    "Tokenization": "scbin.tokens.rules",
    "Network": "scbin.nn.presets",
    **dict.fromkeys(("Training", "Finetuning", "Masking", "Loss"), "scbin.train.settings"),
    "Statistics": "scbin.tl._perturb_statistics",
}

__all__ = ["datasets", "get", "pl", "pp", "tl"]
__all__ += ["Finetuning", "Loss", "Masking", "Model", "Network", "Statistics", "Tokenization", "Training", "Vocabulary"]
__all__ += ["ScbinError", "ScbinInputError", "ScbinModelError", "ScbinTrainingError", "ScbinTypeError"]
__all__ += ["ScbinInputWarning", "ScbinTrainingWarning", "open_tokens", "session_info"]


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(importlib.import_module(_CLASSES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"scbin.{name}")
    raise AttributeError(f"module 'scbin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
