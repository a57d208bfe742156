"""What is learned from cells before they are tokenized: variable genes, medians, quantiles. Passes over row blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from scbin.tokens.kernels import gene_moments, over_rows, pearson_moments
from scbin.tokens.rules import six_digits
from scbin.tokens.values import TARGET, RowReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from scbin.tokens.values import Reading, Rows

MEAN_BINS = 20
THETA = 100.0  # overdispersion of the counts, as in scanpy
MOST_VALUES = 1 << 24  # that quantiles are of, 200 MB; where there are more, every second, third ... cell is looked at


@dataclass(frozen=True, eq=False)
class Cells:
    """The cells that a vocabulary is made from."""

    genes: tuple[str, ...]
    columns: np.ndarray  # gene of each column; -1: none, -2: no gene count
    reading: Reading
    blocks: Callable[[], Iterator[Any]]  # goes through the rows from the start
    marked: np.ndarray | None = None  # the genes to use, if they are not to be chosen
    n_genes: int = 2000

    def rows(self, unit: Literal["counts", "log1p", "any"] | None = None) -> Iterator[Rows]:
        """Go through the rows in a unit; by default counts where they are known, else as they are."""
        reader = RowReader(self.columns, self.reading)
        for block in self.blocks():
            yield reader.read(block, unit or ("counts" if self.reading.exact else "any"))

    @cached_property
    def moments(self) -> pd.DataFrame:
        """What all cells together say of each gene: how many express it, mean and (unbiased) variance of counts per 10,000, largest value, sum.

        The attributes are the number of cells (`"n"`) and the sum over all gene columns (`"all"`).
        """
        n, everything, n_cells = 0, 0.0, np.zeros(len(self.genes), dtype=np.int64)
        total, squares, largest, sums = np.zeros((4, len(self.genes)))
        for rows in self.rows():
            read = (rows.data, rows.indices, rows.columns, rows.totals, TARGET, rows.logs)
            over_rows(gene_moments, rows.indptr, read, (n_cells, total, squares, largest, sums), parts=1)
            n += rows.n
            everything = float(sum(rows.totals.tolist(), everything))  # one by one: the same bits for any blocks
        mean = total / max(1, n)
        variance = np.maximum(squares / max(1, n) - mean**2, 0) * n / max(1, n - 1)
        columns = {"n_cells": n_cells, "mean": mean, "variance": variance, "largest": largest, "sum": sums}
        table = pd.DataFrame(columns)
        table.attrs = {"n": n, "all": max(everything, 1e-300)}
        return table

    def shares(self, genes: np.ndarray) -> list[float]:
        """Return the share of all stored counts (or logs) that each of some genes holds."""
        sums = self.moments["sum"].to_numpy()
        return six_digits(sums[genes] / max(sums.sum(), 1e-300)).tolist()

    def choose_genes(self) -> np.ndarray:
        """Return the indices of the genes to use, rising: those marked, or the most variable ones that three cells express.

        Of counts, by the variance of their analytic Pearson residuals, as `sc.experimental.pp.highly_variable_genes`; else by
        scanpy's default (Seurat's), the dispersion of expression per 10,000 standardised among genes of like mean.
        """
        if self.marked is not None:
            return self.marked
        if len(self.genes) <= self.n_genes:
            return np.arange(len(self.genes))
        seen = np.flatnonzero(self.moments["n_cells"] >= min(3, max(1, self.moments.attrs["n"])))
        if len(seen) <= self.n_genes:
            return seen if len(seen) else np.arange(self.n_genes)
        score = _residual_variance(self)[seen] if self.reading.counted else _dispersion(self.moments.iloc[seen])
        return np.sort(seen[np.argsort(-np.nan_to_num(score, nan=-np.inf), kind="stable")[: self.n_genes]])


def _residual_variance(cells: Cells) -> np.ndarray:
    """Variance of the Pearson residuals of each gene (genes,), clipped at the root of the number of cells."""
    shares, n = cells.moments["sum"].to_numpy() / cells.moments.attrs["all"], cells.moments.attrs["n"]
    total, squares = np.zeros((2, len(shares)))
    for rows in cells.rows():
        read = (rows.indptr, rows.data, rows.indices, rows.columns, rows.totals, shares, THETA, float(np.sqrt(n)))
        over_rows(pearson_moments, np.arange(len(shares) + 1) * rows.n, read, (total, squares))  # genes as rows
    return squares / n - (total / n) ** 2


def _dispersion(moments: pd.DataFrame) -> np.ndarray:
    """Standardise log(variance / mean) of genes within 20 bins of log1p(mean); a bin of one gene gives it 1."""
    value = np.log(moments["variance"].replace(0, np.nan) / moments["mean"])
    groups = value.groupby(pd.cut(np.log1p(moments["mean"]), bins=MEAN_BINS, labels=False))
    centre, spread = groups.transform("mean"), groups.transform("std")
    alone = spread.isna()
    return ((value - centre.where(~alone, 0.0)) / spread.where(~alone, centre)).to_numpy(dtype=np.float64)


def gene_medians(cells: Cells) -> np.ndarray:
    """Return the median of each gene over the cells that express it, per 10,000 counts (genes,); 0 where none does."""
    values = _expressed(cells, logs=False)
    # with 20 bits, count / median of two genes is either equal or further apart than float64 can blur: scaling a cell by a
    # whole number can then never change an order
    mantissa, exponent = np.frexp(group_quantiles(*values, len(cells.genes), np.array([0.5]))[:, 0])
    return np.nan_to_num(np.ldexp(np.rint(mantissa * 2**20), exponent - 20))


def quantile_edges(cells: Cells, genes: np.ndarray, n_bins: int, *, per_gene: bool) -> np.ndarray:
    """Return quantiles of the expressed log1p values of some genes: (bins,), or (genes, bins).

    The lowest bin begins just above zero, each holds about equally many values.
    """
    place = np.full(len(cells.genes), -1, dtype=np.int32)
    place[genes] = np.arange(len(genes))
    own, values = _expressed(cells, logs=True)
    kept, shares = place[own] >= 0, np.linspace(0, 1, n_bins, endpoint=False)
    quantiles = group_quantiles(place[own][kept] * per_gene, values[kept], len(genes) if per_gene else 1, shares)
    edges = np.where(np.isnan(quantiles), np.linspace(0.1, 8, n_bins)[None, :], quantiles)
    edges[:, 0] = np.nanmin(quantiles, initial=1.0) / 2
    edges = np.maximum.accumulate(edges, axis=1)
    return edges if per_gene else edges[0]


def _expressed(cells: Cells, *, logs: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the genes and values of what the cells express, per 10,000 counts, or log1p of that."""
    step, first, parts = 1 + int(cells.moments["n_cells"].sum()) // MOST_VALUES, 0, []
    for rows in cells.rows("log1p" if logs else None):
        row, genes = np.repeat(np.arange(rows.n), np.diff(rows.indptr)), rows.columns[rows.indices]
        values = np.where(genes > -2, np.maximum(rows.data, 0).astype(np.float64), 0.0)
        if not (rows.logs and logs):
            values = np.expm1(values) if rows.logs else values
            sums = np.bincount(row, weights=values, minlength=rows.n)
            values *= (TARGET / np.where(sums > 0, sums, 1.0))[row]
            values = np.log1p(values) if logs else values
        kept = (genes >= 0) & (values > 0) & ((first + row) % step == 0)
        parts.append((genes[kept], values[kept].astype(np.float32)))
        first += rows.n
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))  # type: ignore[return-value]


def group_quantiles(groups: np.ndarray, values: np.ndarray, n_groups: int, shares: np.ndarray) -> np.ndarray:
    """Return quantiles of the positive float32 values of each group (groups, shares); NaN for a group without values."""
    # floats above 0 are in the order of their bits, so that one sort of integers sorts each group
    values = np.sort(groups.astype(np.int64) << 32 | values.view(np.int32)).astype(np.int32).view(np.float32)
    sizes = np.bincount(groups, minlength=n_groups)[:, None]
    goal = shares * np.maximum(sizes - 1, 0)  # between which values each quantile lies
    at, last = np.cumsum(sizes)[:, None] - sizes + goal.astype(np.int64), max(len(values) - 1, 0)
    low, high = (np.append(values, np.nan)[np.minimum(k, last)].astype(np.float64) for k in (at, at + 1))
    inside = goal % 1
    return np.where(sizes > 0, np.where(inside > 0, low + (high - low) * inside, low), np.nan)
