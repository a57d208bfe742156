"""What scbin left in an AnnData, as tables."""

from __future__ import annotations

from scbin.get.measured import perturbations_df
from scbin.get.perturbation import perturb_df
from scbin.get.tables import evaluate_df, history_df, network_df, tokens_df

__all__ = [
    "evaluate_df",
    "history_df",
    "network_df",
    "perturb_df",
    "perturbations_df",
    "tokens_df",
]
