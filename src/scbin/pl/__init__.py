"""Pictures: each takes `ax=`, returns `Axes`, never saves and never shows."""

from __future__ import annotations

from scbin.pl._calibration import calibration
from scbin.pl._confusion import confusion
from scbin.pl._embedding import embedding
from scbin.pl._prediction import prediction
from scbin.pl._roc import roc
from scbin.pl._tokens import tokens
from scbin.pl._training import training

__all__ = ["calibration", "confusion", "embedding", "prediction", "roc", "tokens", "training"]
