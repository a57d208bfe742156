"""Quantiles of many genes at once, in one pass over row blocks that can be split and merged."""

from __future__ import annotations

import numpy as np

MANTISSA_BITS = 6  # an interval is 1.6 % wide, an interpolated quantile within 0.8 %
LOWEST, OCTAVES = -16, 40  # 2^-16 .. 2^24
EXACT = 1 << 24  # values kept as they are: 128 MB; beyond, counted per interval
INTERVALS = OCTAVES << MANTISSA_BITS


class QuantileSketch:
    """Quantiles of the positive values of each group (gene).

    Exact up to 16 million values. Beyond, values are counted in intervals of 1.6 % (the upper bits of a float32). Adding
    blocks in any split and merging sketches gives the same numbers.
    """

    def __init__(self, n_groups: int, *, exact: int = EXACT):
        self.n_groups = n_groups
        self._exact = exact
        self._values: list[np.ndarray] = []
        self._groups: list[np.ndarray] = []
        self._n = 0
        self._counts: np.ndarray | None = None
        self._lowest = 0  # first interval that _counts covers

    def add(self, groups: np.ndarray, values: np.ndarray) -> None:
        """Take in positive values and their groups."""
        groups, values = np.asarray(groups, dtype=np.int32), np.asarray(values, dtype=np.float32)
        if self._counts is not None:
            _count(self._counts, groups, values)
            return
        self._groups.append(groups)
        self._values.append(values)
        self._n += len(values)
        if self._n > self._exact:
            self._collapse()

    def merge(self, other: QuantileSketch) -> None:
        """Take in everything that another sketch has seen."""
        for groups, values in zip(other._groups, other._values, strict=True):
            self.add(groups, values)
        if other._counts is not None:
            counts = self._collapse()
            counts += other._counts

    def quantiles(self, shares: np.ndarray) -> np.ndarray:
        """Return (groups, shares): NaN for a group without values."""
        shares = np.asarray(shares, dtype=np.float64)
        return self._of_values(shares) if self._counts is None else _of_counts(self._counts, shares)

    def medians(self) -> np.ndarray:
        """Return the median of each group (groups,)."""
        return self.quantiles(np.array([0.5]))[:, 0]

    def _collapse(self) -> np.ndarray:
        if self._counts is None:
            self._counts = np.zeros((self.n_groups, INTERVALS), dtype=np.uint32)
            for groups, values in zip(self._groups, self._values, strict=True):
                _count(self._counts, groups, values)
            self._groups, self._values = [], []
        return self._counts

    def _of_values(self, shares: np.ndarray) -> np.ndarray:
        out = np.full((self.n_groups, len(shares)), np.nan)
        groups = np.concatenate([np.zeros(0, dtype=np.int32), *self._groups])
        values = np.concatenate([np.zeros(0, dtype=np.float32), *self._values]).astype(np.float64)
        order = np.lexsort((values, groups))
        groups, values = groups[order], values[order]
        starts = np.searchsorted(groups, np.arange(self.n_groups + 1))
        sizes = np.diff(starts)
        seen = sizes > 0
        place = (sizes[seen, None] - 1) * shares[None, :]
        low = np.floor(place).astype(np.int64)
        high = np.minimum(low + 1, sizes[seen, None] - 1)
        lower, upper = values[starts[:-1][seen, None] + low], values[starts[:-1][seen, None] + high]
        out[seen] = lower + (upper - lower) * (place - low)
        return out


def _count(counts: np.ndarray, groups: np.ndarray, values: np.ndarray) -> None:
    intervals = (values.view(np.int32) >> (23 - MANTISSA_BITS)) - ((LOWEST + 127) << MANTISSA_BITS)
    intervals = np.clip(intervals, 0, INTERVALS - 1)
    np.add.at(counts.reshape(-1), groups.astype(np.int64) * INTERVALS + intervals, 1)


def _of_counts(counts: np.ndarray, shares: np.ndarray) -> np.ndarray:
    bounds = np.exp2(np.arange(INTERVALS + 1) // (1 << MANTISSA_BITS) + LOWEST).astype(np.float64)
    bounds *= 1 + (np.arange(INTERVALS + 1) % (1 << MANTISSA_BITS)) / (1 << MANTISSA_BITS)
    out = np.full((len(counts), len(shares)), np.nan)
    for group in np.flatnonzero(counts.any(axis=1)):
        total = np.concatenate([[0], np.cumsum(counts[group], dtype=np.int64)])
        goal = np.clip(shares * total[-1], 0.5, total[-1] - 0.5)
        k = np.clip(np.searchsorted(total, goal, side="left") - 1, 0, INTERVALS - 1)
        inside = (goal - total[k]) / np.maximum(total[k + 1] - total[k], 1)
        out[group] = bounds[k] + (bounds[k + 1] - bounds[k]) * inside
    return out
