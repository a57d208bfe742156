"""From an AnnData with counts or log1p values to tokens."""

from __future__ import annotations

from scbin.pp._check import check
from scbin.pp._tokenize import tokenize

__all__ = ["check", "tokenize"]
