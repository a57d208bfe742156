"""Real cells for trying things out, without a download."""

from __future__ import annotations

from scbin.datasets._pbmc68k import pbmc68k_reduced

__all__ = ["pbmc68k_reduced"]
