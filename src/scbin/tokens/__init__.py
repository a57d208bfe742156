"""Cells as rows of tokens: the encodings, the vocabulary, and what holds the rows."""

from __future__ import annotations

from scbin.tokens import bins, rank  # each puts its encodings into ENCODINGS
