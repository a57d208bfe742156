"""How often what was promised came true: read by scores and pictures alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

N_BINS = 15


@dataclass(frozen=True, eq=False)
class Reliability:
    """How often predictions made with a probability were right, in bins of that probability; empty bins are left out."""

    confidence: np.ndarray  # (bins,) mean probability
    accuracy: np.ndarray  # (bins,) share that was right
    count: np.ndarray  # (bins,)
    left: np.ndarray  # (bins,) lower edge

    @property
    def error(self) -> float:
        """Mean distance of the two, weighted by the cells: the expected calibration error."""
        return float(np.average(np.abs(self.accuracy - self.confidence), weights=self.count))


def reliability(confidence: np.ndarray, right: np.ndarray, *, n_bins: int = N_BINS) -> Reliability:
    """Compare what was promised with what came true, in `n_bins` bins of equal width."""
    confidence = np.asarray(confidence, dtype=np.float64)
    number = np.clip((confidence * n_bins).astype(np.int64), 0, n_bins - 1)
    count = np.bincount(number, minlength=n_bins)
    filled = np.flatnonzero(count)
    promised = np.bincount(number, weights=confidence, minlength=n_bins)[filled] / count[filled]
    true = np.bincount(number, weights=np.asarray(right, dtype=np.float64), minlength=n_bins)[filled] / count[filled]
    return Reliability(promised, true, count[filled], filled / n_bins)
