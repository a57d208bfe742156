"""BERT on single cells, inside AnnData."""

from __future__ import annotations

__version__ = "0.1.0"
