"""Pictures: each takes `ax=`, returns `Axes`, never saves and never shows."""

from __future__ import annotations

from scbin.pl._embedding import embedding
from scbin.pl._tokens import tokens
from scbin.pl._training import training

__all__ = ["embedding", "tokens", "training"]
