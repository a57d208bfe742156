"""What scbin left in an AnnData, as tables."""

from __future__ import annotations

from scbin.get._evaluate import evaluate_df
from scbin.get._gap import gap_df
from scbin.get._history import history_df
from scbin.get._perturb import perturb_df
from scbin.get._tokens import tokens_df

__all__ = ["evaluate_df", "gap_df", "history_df", "perturb_df", "tokens_df"]
