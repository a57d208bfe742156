"""What scbin left in an AnnData, as tables."""

from __future__ import annotations

from scbin.get.perturbation import perturb_df
from scbin.get.predictions import evaluate_df, gap_df
from scbin.get.tables import history_df, tokens_df

__all__ = ["evaluate_df", "gap_df", "history_df", "perturb_df", "tokens_df"]
