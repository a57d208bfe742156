"""Plots: each takes `ax=`, returns `Axes`, never saves and never shows."""

from __future__ import annotations

from scbin.pl._embedding import embedding
from scbin.pl._generated import generated
from scbin.pl._perturbation import perturbation, perturbation_map, perturbation_matrix, perturbation_volcano
from scbin.pl._prediction import calibration, confusion, prediction, roc
from scbin.pl._tokens import tokens
from scbin.pl._training import training

__all__ = [
    "calibration",
    "confusion",
    "embedding",
    "generated",
    "perturbation",
    "perturbation_map",
    "perturbation_matrix",
    "perturbation_volcano",
    "prediction",
    "roc",
    "tokens",
    "training",
]
