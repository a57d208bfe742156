"""What is learned from cells before they are tokenized: variable genes, medians, quantiles. Passes over row blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from scbin.tokens.kernels import frozen, gene_moments, over_genes, pearson_moments
from scbin.tokens.values import TARGET, RowReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from scbin.tokens.values import Reading, Rows

Flavor = Literal["pearson_residuals", "dispersion"]
MEAN_BINS = 20
THETA = 100.0  # overdispersion of the counts, as in scanpy
MANTISSA_BITS = 6  # an interval is 1.6 % wide, an interpolated quantile within 0.8 %
LOWEST, OCTAVES = -16, 40  # 2^-16 .. 2^24
EXACT = 1 << 24  # values kept as they are: 128 MB; beyond, counted per interval
INTERVALS = OCTAVES << MANTISSA_BITS


@dataclass(frozen=True, eq=False)
class Moments:
    """Per gene (genes,): what all cells together say. Mean and variance are of counts per 10,000; logs are undone first."""

    n_obs: int
    n_cells: np.ndarray  # cells that express the gene
    mean: np.ndarray
    variance: np.ndarray  # unbiased
    largest: np.ndarray
    raw_sums: np.ndarray  # of the values as they are
    all_counts: float  # over all gene columns

    @property
    def shares(self) -> np.ndarray:
        """Share of all stored counts (or logs) that each gene holds (genes,), to six digits."""
        shares = self.raw_sums / max(self.raw_sums.sum(), 1e-300)
        return np.array(("%.6g " * len(shares) % tuple(shares.tolist())).split(), dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Cells:
    """The cells that a vocabulary is made from."""

    genes: tuple[str, ...]
    columns: np.ndarray  # gene of each column; -1: none, -2: no gene count
    reading: Reading
    blocks: Callable[[], Iterator[Any]]  # goes through the rows from the start
    marked: np.ndarray | None = None  # the genes to use, if they are not to be chosen
    n_genes: int = 2000
    flavor: Flavor | None = None  # by default after the values

    def rows(self, unit: Literal["counts", "log1p", "any"] | None = None) -> Iterator[Rows]:
        """Go through the rows in a unit; by default counts where they are known, else as they are."""
        unit = unit or ("counts" if self.reading.exact else "any")
        reader = RowReader(self.columns, self.reading)
        for block in self.blocks():
            yield reader.read(block, unit)

    @cached_property
    def moments(self) -> Moments:
        """Moments of each gene."""
        n, all_counts, n_cells = 0, 0.0, np.zeros(len(self.genes), dtype=np.int64)
        total, squares, largest, raw_sums = np.zeros((4, len(self.genes)))
        for rows in self.rows():
            arrays = map(frozen, (rows.indptr, rows.data, rows.indices, rows.columns, rows.totals))
            gene_moments(*arrays, TARGET, rows.logs, n_cells, total, squares, largest, raw_sums)  # type: ignore[call-arg]
            n += rows.n
            all_counts = float(sum(rows.totals.tolist(), all_counts))  # one by one: the same bits for any blocks
        mean = total / max(1, n)
        variance = np.maximum(squares / max(1, n) - mean**2, 0) * n / max(1, n - 1)
        return Moments(n, n_cells, mean, variance, largest, raw_sums, all_counts)

    def choose_genes(self) -> np.ndarray:
        """Return the indices of the genes to use, rising."""
        flavor = self.flavor or ("pearson_residuals" if self.reading.counted else "dispersion")
        return variable_genes(self, self.n_genes, flavor) if self.marked is None else self.marked


def variable_genes(cells: Cells, n_genes: int, flavor: Flavor) -> np.ndarray:
    """Return the indices of the `n_genes` most variable genes, in the order of the columns.

    "pearson_residuals": variance of analytic Pearson residuals of the counts, as `sc.experimental.pp.highly_variable_genes`;
    "dispersion": scanpy's default (Seurat's), dispersion of counts per 10,000 standardised among genes of like mean. Only genes
    that three cells express take part.
    """
    if len(cells.genes) <= n_genes:
        return np.arange(len(cells.genes))
    seen = np.flatnonzero(cells.moments.n_cells >= min(3, max(1, cells.moments.n_obs)))
    if len(seen) <= n_genes:
        return seen if len(seen) else np.arange(n_genes)
    score = _residual_variance(cells)[seen] if flavor == "pearson_residuals" else _dispersion(cells.moments, seen)
    return np.sort(seen[np.argsort(-np.nan_to_num(score, nan=-np.inf), kind="stable")[:n_genes]])


def _residual_variance(cells: Cells) -> np.ndarray:
    """Variance of the Pearson residuals of each gene (genes,), clipped at the root of the number of cells."""
    shares, n = cells.moments.raw_sums / max(cells.moments.all_counts, 1e-300), cells.moments.n_obs
    total, squares = np.zeros((2, len(shares)))
    for rows in cells.rows():
        arrays = (rows.indptr, rows.data, rows.indices, rows.columns, rows.totals, shares)
        over_genes(pearson_moments, len(shares), *map(frozen, arrays), THETA, float(np.sqrt(n)), total, squares)
    return squares / n - (total / n) ** 2


def _dispersion(moments: Moments, seen: np.ndarray) -> np.ndarray:
    """Standardise log(variance / mean) of the genes `seen` within 20 bins of log1p(mean); a bin of one gene gives it 1."""
    mean, variance = moments.mean[seen], moments.variance[seen]
    ratio = variance / np.where(mean == 0, 1e-12, mean)
    value = pd.Series(np.log(np.where(ratio == 0, np.nan, ratio)))
    groups = value.groupby(pd.cut(np.log1p(mean), bins=MEAN_BINS), observed=True)
    centre, spread = groups.transform("mean"), groups.transform("std")
    alone = spread.isna()
    score = (value - centre.where(~alone, 0.0)) / spread.where(~alone, centre)
    return score.to_numpy(dtype=np.float64)


def gene_medians(cells: Cells) -> np.ndarray:
    """Return the median of each gene over the cells that express it, per 10,000 counts (genes,); NaN where none does."""
    sketch = QuantileSketch(len(cells.genes))
    for rows in cells.rows():
        sketch.add(*_expressed(rows, logs=False))
    # with 20 bits, count / median of two genes is either equal or further apart than float64 can blur: scaling a cell by a
    # whole number can then never change an order
    mantissa, exponent = np.frexp(sketch.quantiles(np.array([0.5]))[:, 0])
    return np.ldexp(np.rint(mantissa * 2**20), exponent - 20)


def quantile_edges(cells: Cells, genes: np.ndarray, n_bins: int, *, per_gene: bool) -> np.ndarray:
    """Return quantiles of the expressed log1p values of some genes: (bins,), or (genes, bins).

    The lowest bin begins just above zero, each holds about equally many values.
    """
    sketch = QuantileSketch(len(genes) if per_gene else 1)
    place = np.full(len(cells.genes), -1, dtype=np.int32)
    place[genes] = np.arange(len(genes))
    for rows in cells.rows("log1p"):
        own, values = _expressed(rows, logs=True)
        kept = place[own] >= 0
        sketch.add(place[own][kept] * per_gene, values[kept])
    quantiles = sketch.quantiles(np.linspace(0, 1, n_bins, endpoint=False))
    edges = np.where(np.isnan(quantiles), np.linspace(0.1, 8, n_bins)[None, :], quantiles)
    edges[:, 0] = np.nanmin(quantiles, initial=1.0) / 2
    edges = np.maximum.accumulate(edges, axis=1)
    return edges if per_gene else edges[0]


def _expressed(rows: Rows, *, logs: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the genes and values of what the rows express, per 10,000 counts, or log1p of that."""
    genes = rows.columns[rows.indices]
    values = np.where(genes > -2, np.maximum(rows.data, 0).astype(np.float64), 0.0)
    if not (rows.logs and logs):
        row = np.repeat(np.arange(rows.n), np.diff(rows.indptr))
        values = np.expm1(values) if rows.logs else values
        sums = np.bincount(row, weights=values, minlength=rows.n)
        values *= (TARGET / np.where(sums > 0, sums, 1.0))[row]
        values = np.log1p(values) if logs else values
    kept = (genes >= 0) & (values > 0)
    return genes[kept], values[kept]


class QuantileSketch:
    """Quantiles of the positive values of each group (gene), in one pass over blocks.

    Exact up to 16 million values. Beyond, values are counted in intervals of 1.6 % (the upper bits of a float32). Adding
    blocks in any split gives the same numbers.
    """

    def __init__(self, n_groups: int, *, exact: int = EXACT):
        self.n_groups, self._exact = n_groups, exact
        self._parts = [(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32))]  # groups and values
        self._counts: np.ndarray | None = None

    def add(self, groups: np.ndarray, values: np.ndarray) -> None:
        """Take in positive values and their groups."""
        self._parts.append((np.asarray(groups, dtype=np.int32), np.asarray(values, dtype=np.float32)))
        if self._counts is None:
            if sum(len(values) for _, values in self._parts) <= self._exact:
                return
            self._counts = np.zeros((self.n_groups, INTERVALS), dtype=np.uint32)
        for groups, values in self._parts:
            intervals = (values.view(np.int32) >> (23 - MANTISSA_BITS)) - ((LOWEST + 127) << MANTISSA_BITS)
            intervals = np.clip(intervals, 0, INTERVALS - 1)
            np.add.at(self._counts.reshape(-1), groups.astype(np.int64) * INTERVALS + intervals, 1)
        self._parts = []

    def quantiles(self, shares: np.ndarray) -> np.ndarray:
        """Return (groups, shares): NaN for a group without values."""
        if self._counts is not None:
            out = np.full((self.n_groups, len(shares)), np.nan)
            octave, part = np.divmod(np.arange(INTERVALS + 1), 1 << MANTISSA_BITS)
            bounds = np.exp2((octave + LOWEST).astype(np.float64)) * (1 + part / (1 << MANTISSA_BITS))
            for group in np.flatnonzero(self._counts.any(axis=1)):
                total = np.concatenate([[0], np.cumsum(self._counts[group], dtype=np.int64)])
                goal = np.clip(shares * total[-1], 0.5, total[-1] - 0.5)
                k = np.clip(np.searchsorted(total, goal, side="left") - 1, 0, INTERVALS - 1)
                inside = (goal - total[k]) / np.maximum(total[k + 1] - total[k], 1)
                out[group] = bounds[k] + (bounds[k + 1] - bounds[k]) * inside
            return out
        groups, values = (np.concatenate(parts) for parts in zip(*self._parts, strict=True))
        # floats above 0 are in the order of their bits, so that one sort of integers sorts each group
        values = np.sort(groups.astype(np.int64) << 32 | values.view(np.int32)).astype(np.int32).view(np.float32)
        sizes = np.bincount(groups, minlength=self.n_groups)[:, None]
        goal = shares * np.maximum(sizes - 1, 0)  # between which values each quantile lies
        at, last = np.cumsum(sizes)[:, None] - sizes + goal.astype(np.int64), max(len(values) - 1, 0)
        low, high = (np.append(values, np.nan)[np.minimum(k, last)].astype(np.float64) for k in (at, at + 1))
        inside = goal % 1
        return np.where(sizes > 0, np.where(inside > 0, low + (high - low) * inside, low), np.nan)
