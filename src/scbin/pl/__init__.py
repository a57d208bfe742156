"""Plots: each takes `ax=`, returns `Axes`, never saves and never shows."""

from __future__ import annotations

from scbin.pl._embedding import compare, embedding, generated
from scbin.pl._knowledge import age_gap, clock, gene_network, gene_roc
from scbin.pl._model import tokens, training
from scbin.pl._perturbation import (
    perturbation,
    perturbation_map,
    perturbation_matrix,
    perturbation_response,
    perturbation_retrieval,
    perturbation_scores,
    perturbation_volcano,
)
from scbin.pl._prediction import calibration, confusion, prediction, roc

__all__ = [
    "age_gap",
    "calibration",
    "clock",
    "compare",
    "confusion",
    "embedding",
    "gene_network",
    "gene_roc",
    "generated",
    "perturbation",
    "perturbation_map",
    "perturbation_matrix",
    "perturbation_response",
    "perturbation_retrieval",
    "perturbation_scores",
    "perturbation_volcano",
    "prediction",
    "roc",
    "tokens",
    "training",
]
