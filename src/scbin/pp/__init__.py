"""From an AnnData with counts or log1p values to tokens."""

from __future__ import annotations

from scbin.pp._tokenize import check, tokenize

__all__ = ["check", "tokenize"]
